"""Losses, a file a family, and the objective that sums them."""
