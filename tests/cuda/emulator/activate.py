"""Builds the emulator and puts it in place of CUDA, in this process."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
# The libraries, by what they stand in for.
_SOURCES = {"libcuda.so.1": ("engine.cpp", "driver.cpp"), "libcudart.so.13": ("cudart.cpp",)}
_FLAGS = ("-std=c++17", "-O2", "-mf16c", "-fPIC", "-shared", "-fvisibility=hidden")
_KERNEL_FLAGS = (
    # -O1: quick to compile. No SRA: a vector is one access, whose alignment can be checked.
    "-x", "c++", "-std=c++17", "-O1", "-g1", "-w", "-fPIC", "-fvisibility=hidden",
    "-fno-strict-aliasing", "-fno-math-errno", "-fno-tree-sra", "-ffp-contract=fast", "-mfma",
    "-mf16c",
    "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0",
)  # fmt: skip
_SHARED = re.compile(r"__shared__ alignas\(\d+\) (\w+) (\w+)\[(\d+)\];")
_DYNAMIC = re.compile(r"extern __shared__ alignas\(\d+\) (\w+) (\w+)\[\];")
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\w+\) )?(\w+)\([^)]*\) \{')

_SIZES = {
    f"{kind}{n}": size * int(n or 1)
    for kind, size in {"float": 4, "int": 4, "uint": 4, "half": 2, "nv_bfloat16": 2}.items()
    for n in ("", "2", "4")
}
_GUARD = 256  # bytes between shared arrays, the alignment of each too

_engine: ctypes.CDLL | None = None


def libraries() -> list[Path]:
    """Return the stand-in libraries, built unless they are, in the order in which to load them."""
    folder = _cache_folder()
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            _build(Path(made))
            with contextlib.suppress(OSError):  # another process was first
                Path(made).rename(folder)
            Path(made).mkdir(exist_ok=True)
    return [folder / name for name in _SOURCES]


def _build(folder: Path) -> None:
    paths: list[Path] = []
    for name, sources in _SOURCES.items():
        versions, output = folder / f"{name}.map", folder / name
        export = "" if name == "libcuda.so.1" else f"{name} "
        versions.write_text(f"{export}{{ global: *; }};\n")
        run(["g++", *_FLAGS, f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}", "-o",
             output, *(HERE / source for source in sources), *paths, "-ldl"])  # fmt: skip
        paths.append(output)


def activate() -> None:
    """Put the emulator in place, then import TVM. Must run before anything imports it."""
    global _engine
    if "tvm" in sys.modules:
        raise RuntimeError("the emulator must be in place before tvm is imported")
    _engine, _ = (ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in libraries())
    _engine.emu_report.restype = ctypes.c_char_p
    for name in ("emu_report_count", "emu_launch_count"):
        getattr(_engine, name).restype = ctypes.c_uint64
    import tvm

    if not tvm.cuda(0).exist:
        raise RuntimeError("TVM's CUDA runtime did not load on the emulator")


def compile_kernels(source: str) -> bytes:
    """Compile generated CUDA C into an image that the stand-in driver loads."""
    source = _place_arrays(source)
    source = _DYNAMIC.sub(r"\1* const \2 = (\1*)emu_dynamic_shared();", source)
    if "__shared__" in source:
        raise ValueError("shared memory is declared in a way that the emulator does not know")
    kernels = _KERNEL.findall(source)
    source += "".join(f"\nEMU_KERNEL({name})" for name in kernels) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        code, output = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        headers = ("-I", HERE / "include", "-include", HERE / "device.h")
        run(["g++", *_KERNEL_FLAGS, *headers, "-c", "-o", code, "-"], source)
        run(["g++", "-shared", "-o", output, code])  # not with GCC's own race detector
        image = output.read_bytes()
    return b"EMULATED" + struct.pack("<Q", len(image)) + image


def _place_arrays(source: str) -> str:
    """Turn declarations of shared arrays into places in the engine's memory, between guards."""
    kernels = re.split(r'(?=extern "C" __global__ void [^;{]*\{)', source)
    for i, kernel in enumerate(kernels):
        offset = 0

        def place(match: re.Match[str]) -> str:
            nonlocal offset
            kind, name, count = match[1], match[2], int(match[3])
            size, start = count * _SIZES[kind], offset
            offset += -(-size // _GUARD) * _GUARD + _GUARD
            return f"{kind}* const {name} = ({kind}*)emu_shared({start}, {size});"

        kernels[i] = _SHARED.sub(place, kernel)
    return "".join(kernels)


def run(command: list, text: str | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command], input=text, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:2]))}: {done.stderr[:4000]}")


def set_order(order: int) -> None:
    """Let threads and blocks run in order (0), in reverse (1), or shuffled by a seed (2 and up)."""
    _engine.emu_set_order(order)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list that holds, after the context, what kernels did wrong within it."""
    _engine.emu_clear()
    found: list[str] = []
    yield found
    count = _engine.emu_report_count()
    for i in range(count):
        text = _engine.emu_report(ctypes.c_uint64(i))
        if text is None:
            found.append(f"and {count - i} more")
            break
        found.append(_with_line(text.decode()))


def launches() -> int:
    """Return how many kernels ran in the last `watched` context."""
    return int(_engine.emu_launch_count())


def _with_line(text: str) -> str:
    """Replace an address in an image by the line of the generated source."""
    head, at, place = text.partition(" @")
    if not at or not os.path.exists(place.split("+")[0]):
        return head
    path, _, offset = place.partition("+")
    done = subprocess.run(["addr2line", "-e", path, offset], capture_output=True, text=True)
    return f"{head}, line {done.stdout.strip().rpartition(':')[2]}"


def _cache_folder() -> Path:
    """Return a folder of this user's for the stand-in libraries of these very sources."""
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.[ch]*")):
        digest.update(path.read_bytes())
    return (
        Path(tempfile.gettempdir()) / f"mega-tvm-emulator-{os.getuid()}-{digest.hexdigest()[:12]}"
    )
