"""Causal softmax attention of new frames over a cache of earlier ones."""
