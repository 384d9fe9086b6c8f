"""mega_tvm: compiles Mega models into shared libraries and runs them."""
