"""Exponential moving average over time."""
