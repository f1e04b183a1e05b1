"""Grids of whole runs: experiments, search, benchmarks against peers."""
