"""Parts of `benchmarks/zoo.py`: which models, their data, what one does by hand, and the clock."""
