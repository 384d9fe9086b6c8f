"""EMA scan and the dense layer behind it; used on GPUs, where it saves a launch."""
