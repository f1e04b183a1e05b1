"""Towers by name, heads, the logit scale, and the two-tower module."""
