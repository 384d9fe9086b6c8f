"""Finds where a loaded library keeps the addresses of the functions that it imports.

An ELF library calls what other libraries define through a table that the loader fills. Its
relocations say which place is for which name. All is read from memory, as it was loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
from collections.abc import Collection, Iterator

_DYNAMIC = 2  # PT_DYNAMIC
_STRINGS, _SYMBOLS = 5, 6  # DT_STRTAB, DT_SYMTAB
_RELOCATIONS = ((23, 2), (7, 8))  # DT_JMPREL with DT_PLTRELSZ, DT_RELA with DT_RELASZ
_FUNCTION_ADDRESSES = (6, 7)  # R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT
_PROGRAM_HEADER, _DYNAMIC_ENTRY = struct.Struct("<IIQQQQQQ"), struct.Struct("<qQ")
_RELOCATION, _SYMBOL_BYTES = struct.Struct("<QQq"), 24
_READ_WRITE = 3  # PROT_READ | PROT_WRITE


class _Found(ctypes.Structure):
    """What dladdr tells: ``Dl_info``."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def import_slots(function: int, names: Collection[str]) -> dict[str, int]:
    """Return the addresses of a library's slots, by the name of the imported function.

    Parameters
    ----------
    function : int
        The address of any function of the library.
    names : collection of str
        Those that the library does not import are not in the result.
    """
    found = _Found()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(function), ctypes.byref(found)):
        return {}
    base = found.base
    tags = _dynamic_tags(base)

    def place(tag: int) -> int:
        # glibc turns offsets into addresses when it loads a library.
        return tags[tag] if tags[tag] >= base else base + tags[tag]

    slots = {}
    for table, size in _RELOCATIONS:
        if table not in tags:
            continue
        relocations = ctypes.string_at(place(table), tags[size])
        for offset, info, _ in _RELOCATION.iter_unpack(relocations):
            if info & 0xFFFFFFFF in _FUNCTION_ADDRESSES:
                symbol = place(_SYMBOLS) + (info >> 32) * _SYMBOL_BYTES
                name = place(_STRINGS) + ctypes.c_uint32.from_address(symbol).value
                if (text := ctypes.string_at(name).decode()) in names:
                    slots[text] = base + offset
    return slots


def _dynamic_tags(base: int) -> dict[int, int]:
    """Return the values of a loaded library's dynamic section, by tag."""
    header = ctypes.string_at(base, 64)
    (table,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    for i in range(count):
        bytes_ = ctypes.string_at(base + table + i * size, _PROGRAM_HEADER.size)
        kind, _, _, address, _, _, length, _ = _PROGRAM_HEADER.unpack(bytes_)
        if kind == _DYNAMIC:
            entries = ctypes.string_at(base + address, length)
            return dict(_DYNAMIC_ENTRY.iter_unpack(entries))
    return {}


@contextlib.contextmanager
def replaced(slots: Collection[int], function: int) -> Iterator[None]:
    """Let imported functions be another one meanwhile, for the library's own calls.

    Parameters
    ----------
    slots : collection of int
        As `import_slots` found them.
    function : int
        The address of the other one.
    """
    libc = ctypes.CDLL(None)
    words = [ctypes.c_uint64.from_address(slot) for slot in slots]
    kept = [word.value for word in words]
    for slot in slots:  # a library that was bound at once has them in read-only pages
        page = slot // mmap.PAGESIZE * mmap.PAGESIZE
        libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _READ_WRITE)
    try:
        for word in words:
            word.value = function
        yield
    finally:
        for word, value in zip(words, kept, strict=True):
            word.value = value
