// Stands in for NVIDIA's header in generated CUDA C: all that kernels need is in device.h.
#pragma once
