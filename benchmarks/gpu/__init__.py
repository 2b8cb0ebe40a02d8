"""Checks and measures the Triton engine on a GPU, piece by piece: see `python -m benchmarks.gpu --help`."""
