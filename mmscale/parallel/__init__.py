"""Ranks, the one gather and its reductions, devices and signals."""
