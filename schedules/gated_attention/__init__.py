"""Causal softmax attention with an output gate."""
