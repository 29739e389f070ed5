"""Tuning for real: data, the loop, metrics, pictures."""
