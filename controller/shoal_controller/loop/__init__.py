"""The loop: telemetry -> findings (`monitor`, pure) -> the cheapest sufficient action (`policy`,
pure) -> done and recorded (`runner`)."""
