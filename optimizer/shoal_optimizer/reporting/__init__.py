"""What the report's page is made of: figures as text, findings from the data, charts."""
