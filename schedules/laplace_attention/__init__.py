"""L1-Laplace attention with an output gate."""
