"""CUDA: targets, the toolchain that compiles kernels, and the device at run time."""
