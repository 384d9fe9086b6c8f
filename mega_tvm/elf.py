"""What is checked of a shared library's ELF headers before the dynamic loader sees it.

The loader trusts what it reads: a segment that lies beyond the file's end kills the process.
"""

from __future__ import annotations

import struct

MAGIC = b"\x7fELF"

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_ET_DYN = 3
_EM_X86_64 = 62
_PT_LOAD, _PT_DYNAMIC = 1, 2
# e_machine of headers that a user may meet, for messages.
_MACHINES = {3: "x86", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}


def other_machine(head: bytes) -> str | None:
    """Return the kind of machine that a header names, or None if it is x86-64.

    Parameters
    ----------
    head : bytes
        The first 20 bytes of the file, or more.
    """
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    if head[4] == 2 and head[5] == 1 and machine == _EM_X86_64:
        return None
    bits = {1: "32-bit", 2: "64-bit"}.get(head[4], f"class {head[4]}")
    kind = _MACHINES.get(machine, f"machine {machine}")
    return f"{bits} {kind}{'' if head[5] == 1 else ', not little-endian'}"


def image_end(head: bytes) -> int:
    """Return where an ELF image ends by its header: its section table is its last part."""
    if len(head) < _HEADER.size:
        return _HEADER.size
    fields = _HEADER.unpack_from(head)
    sections, size, count = fields[6], fields[11], fields[12]
    return int(sections + size * count)


def elf_problem(image: bytes) -> str | None:
    """Return what is wrong with the headers of an x86-64 shared library, or None."""
    if len(image) < _HEADER.size:
        return "the ELF header is cut off"
    _, kind, _, _, _, programs, _, _, _, program_size, count, _, _, _ = _HEADER.unpack_from(image)
    if kind != _ET_DYN:
        return f"expected a shared library (ELF type {_ET_DYN}), found type {kind}"
    if program_size != _PROGRAM_HEADER.size or programs + program_size * count > len(image):
        return f"the {count} program headers at byte {programs} do not lie in the file"
    kinds = set()
    for i in range(count):
        at = programs + i * program_size
        kind, _, offset, address, _, in_file, in_memory, _ = _PROGRAM_HEADER.unpack_from(image, at)
        kinds.add(kind)
        if kind not in (_PT_LOAD, _PT_DYNAMIC):
            continue
        if offset + in_file > len(image):
            return f"segment {i} ends at byte {offset + in_file} of {len(image)}: it was cut off"
        if in_memory < in_file or address + in_memory >= 1 << 47:
            return f"segment {i} has {in_file} bytes in the file and {in_memory} in memory"
    if missing := {_PT_LOAD, _PT_DYNAMIC} - kinds:
        return f"it has no program header of type {min(missing)}"
    return None
