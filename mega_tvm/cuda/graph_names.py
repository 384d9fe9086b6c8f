"""What the compiler and the runtime call the entries that run as CUDA graphs."""

SUFFIX = "__graph"
