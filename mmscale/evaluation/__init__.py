"""Trained models on whole sets: encoded, compared, and found again."""
