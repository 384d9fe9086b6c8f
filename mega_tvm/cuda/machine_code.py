"""Reads the machine code of a compiled library's kernels, without a GPU.

``cuobjdump`` of NVIDIA's tools tells what each kernel uses on each arch (``-res-usage``), and its
instructions (``-sass``). A kernel that spills shows instructions on local memory.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import tempfile
from collections import Counter
from pathlib import Path

from ..errors import MegaError
from .nvidia_files import find_tool
from .toolchain import run_tool

# A fatbin starts with this number, a version, the header's size and the size of what follows it.
_FATBIN = struct.Struct("<IHHQ")
_FATBIN_MAGIC = 0xBA55ED50

# What a multiprocessor has, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications): warps, blocks, bytes of shared memory.
_MULTIPROCESSORS = {
    80: (64, 32, 164 << 10),
    86: (48, 16, 100 << 10),
    87: (48, 16, 164 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    100: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
}
_REGISTERS = 64 << 10
_RESERVED_SHARED = 1 << 10  # of each block, by CUDA itself


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """What a kernel's machine code for one arch is.

    Parameters
    ----------
    name : str
    arch : int
    threads : int or None
        Of a block, where the source says.
    registers : int
        Of a thread.
    shared : int
        Bytes of a block.
    local : int
        Instructions that touch local memory: spilled registers, or arrays that are in none.
    instructions : Counter
        By name, ``LDG.E.128`` and the like.
    loop : Counter
        Those of the loop with the most FFMA, or HMMA; empty if there is no loop.
    """

    name: str
    arch: int
    threads: int | None
    registers: int
    shared: int
    local: int
    instructions: Counter[str]
    loop: Counter[str]

    def count(self, pattern: str) -> int:
        """Return how many instructions' names match a regular expression from their start."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    def loop_share(self, pattern: str) -> float:
        """Return the share of the loop's instructions whose names match."""
        matching = sum(n for name, n in self.loop.items() if re.match(pattern, name))
        return matching / max(1, sum(self.loop.values()))

    @property
    def occupancy(self) -> float | None:
        """Share of a multiprocessor's warps that fit at the same time, where known."""
        if self.threads is None or self.arch not in _MULTIPROCESSORS:
            return None
        warps_limit, blocks_limit, shared_limit = _MULTIPROCESSORS[self.arch]
        warps = -(-self.threads // 32)
        # Registers are handed out to warps in units of 256.
        per_warp = -(-self.registers * 32 // 256) * 256
        blocks = min(
            blocks_limit,
            warps_limit // warps,
            _REGISTERS // (per_warp * warps),
            shared_limit // (self.shared + _RESERVED_SHARED),
        )
        return blocks * warps / warps_limit


def find_fatbins(data: bytes) -> list[bytes]:
    """Return the fatbins in a file's bytes."""
    found, magic, at = [], struct.pack("<I", _FATBIN_MAGIC), 0
    while (at := data.find(magic, at)) >= 0:
        end = at + 4
        if at + _FATBIN.size <= len(data):
            _, version, header, size = _FATBIN.unpack_from(data, at)
            if version == 1 and header == _FATBIN.size and 0 < size <= len(data) - at - header:
                end = at + header + size
                found.append(data[at:end])
        at = end
    return found


def read_kernels(library: bytes, threads: dict[str, int] | None = None) -> list[KernelCode]:
    """Describe every kernel in a library's bytes, for every arch in it.

    Parameters
    ----------
    library : bytes
        A library that holds a fatbin, or the fatbin itself.
    threads : dict of str to int, optional
        Threads of a block by kernel.

    Raises
    ------
    MegaError
        If it holds none, or NVIDIA's tools are missing or do not read it.
    """
    fatbins = find_fatbins(library)
    if not fatbins:
        raise MegaError("the library holds no machine code for GPUs")
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None or find_tool("nvdisasm") is None:
        raise MegaError(
            "reading machine code needs NVIDIA's cuobjdump and nvdisasm, and they are not in "
            "CUDA_HOME, PATH, /usr/local/cuda or this Python environment: pip install "
            "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    kernels: list[KernelCode] = []
    with tempfile.TemporaryDirectory() as folder:
        for fatbin in fatbins:
            path = Path(folder) / "kernels.fatbin"
            path.write_bytes(fatbin)
            usage = run_tool([cuobjdump, "-res-usage", path], "cuobjdump cannot read the kernels")
            code = run_tool([cuobjdump, "-sass", path], "cuobjdump cannot read the kernels")
            kernels += _merge(_parse_usage(usage), _parse_code(code), threads or {})
    return kernels


# An instruction's address, its name, and where it jumps to.
_Code = list[tuple[int, str, int | None]]


def _merge(
    usage: dict[tuple[str, int], tuple[int, int]],
    code: dict[tuple[str, int], _Code],
    threads: dict[str, int],
) -> list[KernelCode]:
    kernels = []
    for (name, arch), (registers, shared) in sorted(usage.items()):
        lines = code.get((name, arch), [])
        instructions = Counter(op for _, op, _ in lines)
        local = sum(n for op, n in instructions.items() if re.match(r"(LDL|STL)\b", op))
        kernels.append(
            KernelCode(
                name, arch, threads.get(name), registers, shared, local, instructions, _loop(lines)
            )
        )
    return kernels


def _loop(lines: _Code) -> Counter[str]:
    best, most = Counter[str](), 0
    for end, _, start in lines:
        if start is None or start >= end:
            continue
        body = Counter(op for at, op, _ in lines if start <= at <= end)
        work = sum(n for op, n in body.items() if re.match(r"FFMA|HMMA", op))
        if work > most:
            best, most = body, work
    return best


def _parse_usage(text: str) -> dict[tuple[str, int], tuple[int, int]]:
    found, arch, name = {}, 0, ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line.strip()):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) .*SHARED:(\d+)", line):
            found[name, arch] = (int(match[1]), int(match[2]))
    return found


def _parse_code(text: str) -> dict[tuple[str, int], _Code]:
    found: dict[tuple[str, int], _Code] = {}
    arch, current = 0, _Code()
    for line in text.splitlines():
        if match := re.match(r"\s*code for sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function : (\w+)", line):
            current = found.setdefault((match[1], arch), [])
        elif match := _INSTRUCTION.match(line):
            target = re.search(r"\bBRA\b[^;]* 0x([0-9a-f]+)", line)
            current.append((int(match[1], 16), match[2], target and int(target[1], 16)))
    return found


_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][\w.]*)")
