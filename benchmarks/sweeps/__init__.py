"""The settings over which benchmarks/selection.py measures every method, on text and on video."""
