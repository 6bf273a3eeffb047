"""What `benchmarks/compression.py` is made of: networks, data, training, rows, timing and the table."""
