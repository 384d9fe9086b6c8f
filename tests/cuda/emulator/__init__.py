"""Runs compiled CUDA kernels and their host code on the CPU, and checks every access of theirs.

`engine.cpp` says what is checked. A stand-in driver and CUDA runtime library (`driver.cpp`,
`cudart.cpp`) let TVM's real CUDA runtime load; kernels are the CUDA C that TVM generates, compiled
by g++ (`activate.py`). Both must be in place before TVM is imported, and make a GPU appear for the
whole process: so tests run in a process of their own (`worker.py`). Commands and servers that start
processes of their own find the emulator, and an nvcc that compiles for it, by their environment
(`environment.py`).

Halves, tensor cores and asynchronous copies are those of `schedules/common/half_types.cuh`, whose
functions `device_half.h` has again in terms of the engine: their PTX is not run. A copy's bytes
arrive when its thread waits for it; until then every access of them is reported.

Events tell a time that launches, blocks and threads make up. Not emulated: real time, caches,
memory that other blocks see in between, atomics (kernels that use them do not compile here); of
graphs, all but launches.
"""
