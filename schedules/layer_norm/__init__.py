"""Layer normalization over the last axis."""
