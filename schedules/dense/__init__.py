"""Dense layer on constant weights, with its epilogue."""
