"""Operators that are not Mega's own: heads and embeddings around a Mega."""
