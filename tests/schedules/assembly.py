"""Reads x86 assembly (AT&T syntax) as LLVM prints it, and finds what its inner loops do.

Loops are cycles of basic blocks; an innermost loop holds no other. Only what a kernel test asks for
is understood: which instructions calculate on vectors, write memory, call, or fetch a spilled
register.
"""

from __future__ import annotations

import dataclasses
import re

_LABEL = re.compile(r"^([.\w$]+):")
_REGISTER = re.compile(r"%(\w+)")
_VECTOR = re.compile(r"%([xyz])mm\d+")
# Their last operand may be memory, but they only read it.
_READ_ONLY = ("cmp", "test", "bt", "prefetch", "nop", "j", "call", "push", "vucomis", "vcomis")
# Vector instructions that move, but do not calculate.
_MOVES = ("vmov", "vbroadcast", "vpbroadcast", "vperm", "vshuf", "vinsert", "vextract", "vunpck")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; operands are in AT&T order, the destination last."""

    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}".strip()

    @property
    def memory(self) -> str | None:
        """The memory operand, if there is one and it is accessed."""
        if self.opcode.startswith("lea"):
            return None
        return next((o for o in self.operands if "(" in o), None)

    @property
    def stores(self) -> bool:
        """Whether memory is written."""
        in_memory = bool(self.operands) and "(" in self.operands[-1]
        return in_memory and not self.opcode.startswith((*_READ_ONLY, "lea"))

    @property
    def calls(self) -> bool:
        """Whether a function is called."""
        return self.opcode.startswith("call")

    @property
    def vector_bits(self) -> int:
        """Width of the widest vector register named; 0 if none is."""
        widths = {"x": 128, "y": 256, "z": 512}
        return max((widths[v] for o in self.operands for v in _VECTOR.findall(o)), default=0)

    @property
    def calculates(self) -> bool:
        """Whether this is packed or scalar arithmetic in vector registers."""
        return self.vector_bits > 0 and not self.opcode.startswith(_MOVES)

    @property
    def is_fma(self) -> bool:
        """Whether this is a packed float32 fused multiply-add."""
        return self.opcode.startswith(("vfmadd", "vfnmadd")) and self.opcode.endswith("ps")

    @property
    def written(self) -> str | None:
        """The register that the last operand names."""
        if not self.operands or self.opcode.startswith(_READ_ONLY):
            return None
        match = re.match(r"^%(\w+)", self.operands[-1])
        return match.group(1) if match else None


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of one function."""

    function: str
    label: str
    body: tuple[Instruction, ...]
    blocks: int  # basic blocks

    def __str__(self) -> str:
        lines = "\n".join(f"    {i}" for i in self.body)
        return f"{self.function}, loop {self.label}:\n{lines}"

    @property
    def fma_count(self) -> int:
        """Number of packed fused multiply-adds."""
        return sum(i.is_fma for i in self.body)

    @property
    def arithmetic(self) -> list[Instruction]:
        """The instructions that calculate."""
        return [i for i in self.body if i.calculates]

    def opcodes(self) -> set[str]:
        """Names of all instructions."""
        return {i.opcode for i in self.body}

    @property
    def vector_bits(self) -> int:
        """Width of the widest vector register that arithmetic uses."""
        return max((i.vector_bits for i in self.arithmetic), default=0)

    def faults(self) -> list[str]:
        """What an accumulation in registers must not do: store vectors, call, branch.

        A spilled accumulator shows as a store, since it changes at each step. The store of one
        scalar is a loop's result (the score of a key), not a spill. Two blocks are one body that
        LLVM unrolled, with an exit in its middle.
        """
        found = [f"call: {i}" for i in self.body if i.calls]
        found += [f"store: {i}" for i in self.body if i.stores and i.opcode != "vmovss"]
        if self.blocks > 2:
            found.append(f"{self.blocks} basic blocks")
        return found

    def reloads(self) -> list[str]:
        """Vector loads from a place on the stack that stays the same: registers that ran out."""
        changed = {i.written for i in self.body}
        return [
            str(i)
            for i in self.body
            if i.vector_bits
            and i.memory is not None
            and (registers := set(_REGISTER.findall(i.memory))) & {"rsp", "rbp"}
            and not i.stores
            and not registers & changed
        ]


@dataclasses.dataclass
class _Block:
    """A basic block, and the indices of those that may follow it."""

    label: str
    body: list[Instruction] = dataclasses.field(default_factory=list)
    next: set[int] = dataclasses.field(default_factory=set)


def inner_loops(text: str) -> list[Loop]:
    """Return the innermost loops of all functions of an assembly listing."""
    loops: list[Loop] = []
    for name, lines in _functions(text):
        loops += _inner_loops_of(name, lines)
    return loops


def product_loops(text: str) -> list[Loop]:
    """Return the innermost loops that multiply and add.

    Loops with a division, or a shift (of an exponent), are exponentials, sigmoids or
    normalizations: elementwise work, which stores its results.
    """
    return [
        loop
        for loop in _accumulations(text)
        if any(i.is_fma for i in loop.body) and not _sums_distances(loop)
    ]


def distance_loops(text: str) -> list[Loop]:
    """Return the innermost loops that sum absolute differences."""
    return [loop for loop in _accumulations(text) if _sums_distances(loop)]


def assert_in_pairs(loop: Loop) -> None:
    """Two groups of a 10 x 2 tile: 80 additions, 80 FMAs in place, and every x an operand."""
    assert not loop.faults() and not loop.reloads(), str(loop)
    counts = [sum(i.opcode.startswith(op) for i in loop.body) for op in ("vadd", "vsub", "vf")]
    assert counts == [40, 40, 80]
    assert not any(i.opcode.startswith("vbroadcast") for i in loop.body)
    assert not any(i.opcode in ("vfmadd213ps", "vfnmadd213ps") for i in loop.body)
    assert sum("{1to16}" in str(i) for i in loop.body) == 120


def _sums_distances(loop: Loop) -> bool:
    opcodes = loop.opcodes()
    return "vsubps" in opcodes and any(opcode.startswith("vand") for opcode in opcodes)


def _accumulations(text: str) -> list[Loop]:
    elementwise = ("vpslld", "vdiv", "vsqrt")
    return [
        loop
        for loop in inner_loops(text)
        if not any(i.opcode.startswith(elementwise) for i in loop.body)
    ]


def _functions(text: str) -> list[tuple[str, list[str | Instruction]]]:
    """Split into functions of labels (strings) and instructions."""
    functions: list[tuple[str, list[str | Instruction]]] = []
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].rstrip()
        label = _LABEL.match(line)
        if label and not label.group(1).startswith("."):
            functions.append((label.group(1), []))
        elif functions and label:
            functions[-1][1].append(label.group(1))
        elif functions and line.startswith("\t") and not line.startswith("\t."):
            opcode, _, rest = line.strip().partition("\t")
            if not rest:
                opcode, _, rest = opcode.partition(" ")
            functions[-1][1].append(Instruction(opcode, _split_operands(rest)))
    return functions


def _split_operands(text: str) -> tuple[str, ...]:
    operands = re.findall(r"(?:[^,({]|\([^)]*\)|\{[^}]*\})+", text)
    return tuple(o.strip() for o in operands)


def _jump_target(item: str | Instruction) -> str | None:
    if isinstance(item, Instruction) and item.opcode.startswith("j") and item.operands:
        return item.operands[0]
    return None


def _blocks_of(lines: list[str | Instruction]) -> list[_Block]:
    """Split a function into basic blocks: a jump's target starts one, a jump ends one."""
    targets = {target for item in lines if (target := _jump_target(item))}
    blocks = [_Block(label="")]
    for item in lines:
        if isinstance(item, str):
            if item in targets:
                blocks.append(_Block(label=item))
            continue
        blocks[-1].body.append(item)
        if item.opcode.startswith(("j", "ret")):
            blocks.append(_Block(label=""))
    places = {block.label: i for i, block in enumerate(blocks) if block.label}
    for i, block in enumerate(blocks):
        last = block.body[-1] if block.body else None
        if last is None or not last.opcode.startswith(("jmp", "ret", "ud2")):
            block.next.update({i + 1} - {len(blocks)})
        if last and (target := _jump_target(last)) in places:
            block.next.add(places[target])
    return blocks


def _cycles(blocks: list[_Block], among: set[int]) -> list[set[int]]:
    """Return the strongly connected sets of blocks that hold a cycle."""

    def reached(start: int) -> set[int]:
        seen: set[int] = set()
        todo = [start]
        while todo:
            new = (blocks[todo.pop()].next & among) - seen
            seen |= new
            todo += new
        return seen

    reach = {i: reached(i) for i in among}
    found: list[set[int]] = []
    for i in sorted(among):
        if i in reach[i] and not any(i in cycle for cycle in found):
            found.append({j for j in reach[i] if i in reach[j]})
    return found


def _inner_loops_of(name: str, lines: list[str | Instruction]) -> list[Loop]:
    blocks = _blocks_of(lines)
    loops = []
    pending = _cycles(blocks, set(range(len(blocks))))
    while pending:
        cycle = pending.pop()
        outside = set(range(len(blocks))) - cycle
        headers = {j for i in outside for j in blocks[i].next & cycle}
        inner = _cycles(blocks, cycle - headers)
        # A loop whose header is itself a loop: the header's own jump is the inner one.
        inner += [{h} for h in headers if len(cycle) > 1 and h in blocks[h].next]
        if inner:
            pending += inner
            continue
        order = sorted(cycle)
        body = tuple(item for i in order for item in blocks[i].body)
        loops.append(Loop(name, blocks[order[0]].label, body, len(cycle)))
    return loops
