"""The rows of `benchmarks/methods.py`, a file for each group of methods."""
