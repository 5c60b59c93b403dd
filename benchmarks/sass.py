"""Analysis of machine code (SASS): registers, spills, the instructions of the main loop, and register races of wgmma."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ENDS = re.compile(r"BRA `|EXIT\b|RET\b")
"""An unconditional jump or an end."""
_NO_RESULT = (
    "ST",
    "LDGSTS",
    "LDGDEPBAR",
    "DEPBAR",
    "BAR",
    "WARP",
    "R2UR",
    "RED",
    "ISETP",
    "FSETP",
    "HSETP",
    "MEMBAR",
    "FENCE",
)
"""Instructions whose first register operand is a source."""
MATRIX = re.compile(r"\b(?:UTC\w*MMA|[HQIO]G?MMA)\b")


def inspect(cubin: bytes) -> tuple[int, int, str]:
    """Return the registers of a thread, its bytes of local memory, and the disassembly of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        sass = _tool("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers: {usage[-300:]}")
    # A stack that no instruction loads or stores belongs to a called division.
    spilled = int(found[2]) + int(found[3]) if re.search(r"\b(?:LDL|STL)\b", sass) else 0
    return int(found[1]), spilled, sass


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([_BINARIES / name, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-500:]}")
    return done.stdout


def main_loop(sass: str) -> list[str]:
    """Return the instructions of the innermost loop with most matrix instructions, the shorter of equals; empty for none."""
    instructions, targets = parse_sass(sass)
    last = {*targets, *(at for at, text in enumerate(instructions) if _ENDS.match(text))}
    starts = sorted({0, *targets.values(), *(at + 1 for at in last)} & set(range(len(instructions))))
    ends = dict(zip(starts, [*starts[1:], len(instructions)], strict=True))
    successors = {start: _successors(instructions, targets, ends[start] - 1) for start in starts}
    above = _dominators(starts, successors)
    loops: list[tuple[int, set[int], list[str]]] = []
    for block, next_blocks in successors.items():
        # Only a jump to a dominating block closes a loop: waits are placed behind the code and jump back into it.
        for head in next_blocks & above[block]:
            blocks = _natural_loop(head, block, successors)
            body = [instruction for start in sorted(blocks) for instruction in instructions[start : ends[start]]]
            loops.append((sum(bool(MATRIX.search(instruction)) for instruction in body), blocks, body))
    loops = [loop for loop in loops if loop[0] and not any(inner[0] and inner[1] < loop[1] for inner in loops)]
    return max(loops, default=(0, set[int](), list[str]()), key=lambda loop: (loop[0], -len(loop[2])))[2]


def register_races(sass: str) -> list[str]:
    """Find instructions that write a register which a ``wgmma`` in flight reads as its left operand (SM90).

    Each loop is read twice in the order of its text, so that products in flight at its edge are seen in the next iteration.
    ``HGMMA``/``QGMMA`` with ``gsb0`` closes a commit group, ``WARPGROUP.DEPBAR.LE gsb0, N`` waits until N are left.
    """
    instructions, targets = parse_sass(sass)
    found: dict[str, None] = {}
    for at, target in targets.items():
        if target <= at:
            body = instructions[target : at + 1]
            found |= dict.fromkeys(_overwrites([*body, *body]))
    return list(found)


def _overwrites(instructions: list[str]) -> Iterator[str]:
    groups: list[set[int]] = []
    current: set[int] = set()
    for text in instructions:
        product = re.search(r"\b[HQ]GMMA\S*\s+R\d+,\s*(?:R(\d+)\b)?", text)
        wait = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", text)
        if product:
            current |= set(range(int(product[1]), int(product[1]) + 4)) if product[1] else set()
            if "gsb0" in text:
                groups, current = [*groups, current], set()
        elif wait:
            groups = groups[max(len(groups) - int(wait[1], 16), 0) :]
        elif _written(text) & current.union(*groups):
            yield text.strip()


def _written(text: str) -> set[int]:
    """Return the general registers that an instruction writes: its first operand, of the width in its opcode."""
    match = re.match(r"(?:@!?\S+ )?([A-Z][\w.]*)\s+(?:!?U?P[\dT]\w*, )*R(\d+)\b", text)
    if match is None or match[1].startswith(_NO_RESULT):
        return set()
    width = 4 if ".128" in match[1] or match[1].endswith(".4") else 2 if re.search(r"\.64|WIDE|\.2$", match[1]) else 1
    return set(range(int(match[2]), int(match[2]) + width))


def parse_sass(sass: str) -> tuple[list[str], dict[int, int]]:
    """Return the instructions in order, and the target of each jump among them, by index."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction:
            instructions.append(instruction[1])
    jumps = {at: re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", text) for at, text in enumerate(instructions)}
    return instructions, {at: labels[jump[1]] for at, jump in jumps.items() if jump and jump[1] in labels}


def _successors(instructions: list[str], targets: dict[int, int], last: int) -> set[int]:
    """Return the indices that may follow the instruction at ``last``: its target, and the next one unless it ends the flow."""
    found = {targets[last]} if last in targets else set()
    if not _ENDS.match(instructions[last]):
        found.add(last + 1)
    return {place for place in found if place < len(instructions)}


def _dominators(starts: list[int], successors: dict[int, set[int]]) -> dict[int, set[int]]:
    """Return the dominators of each block: the blocks on every path to it, itself among them."""
    before: dict[int, set[int]] = {start: set() for start in starts}
    for block, next_blocks in successors.items():
        for start in next_blocks:
            before[start].add(block)
    above = {start: {start} if start == 0 else set(starts) for start in starts}
    changed = True
    while changed:
        changed = False
        for start in starts[1:]:
            paths = [above[block] for block in before[start]]
            found = {start} | (set.intersection(*paths) if paths else set())
            changed, above[start] = changed or found != above[start], found
    return above


def _natural_loop(head: int, tail: int, successors: dict[int, set[int]]) -> set[int]:
    """Return the natural loop of the jump from ``tail`` to ``head``: blocks that reach ``tail`` without ``head``, and ``head``."""
    loop, waiting = {head}, [tail]
    while waiting:
        block = waiting.pop()
        if block not in loop:
            loop.add(block)
            waiting += [other for other, next_blocks in successors.items() if block in next_blocks]
    return loop
