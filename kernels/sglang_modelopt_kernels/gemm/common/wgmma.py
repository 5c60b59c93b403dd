"""Rejection of compiled kernels whose ``wgmma`` may read registers that the next iteration has already overwritten.

On Hopper ``wgmma.mma_async`` reads its left operand after it was issued. Where that operand was computed into registers (a 4-bit
weight decoded by the kernel), the registers may be written again only after a ``wgmma.wait_group`` that covers the instruction.
Triton pipelines such products: one or more stay in flight over the edge of the loop, and the next iteration waits with
``wgmma.wait_group N``, N > 0, behind its first product. ptxas (12.8 and 12.9) does not keep the registers until then: it gives
them to whatever the next iteration computes first. The result depends on timing. Measured on an H200 with Triton 3.8:
``benchmarks/results/2026-11-29-h200-race.md``.

The rule, whichever Triton compiled the kernel: **where a wgmma with a left operand in registers is in flight at a loop's edge, the
next iteration waits for all (``wgmma.wait_group 0``) before it issues a product**. ptxas keeps the registers until then. Kernels
obey it by :func:`.kernel.drain_wgmma`; :func:`checked` holds every kernel to it at its first launch, and ``benchmarks.aot`` looks
for overwritten registers in the machine code of every configuration.
"""

from __future__ import annotations

import re
from typing import Any

_STATEMENT = re.compile(
    r"(?P<label>^\s*\$\w+(?=:))"
    r"|\bbra(?:\.uni)?\s+(?P<jump>\$\w+)"
    r"|wgmma\.mma_async\S*\s+\{[^}]*\},\s*(?P<left>\{|%)"
    r"|(?P<commit>wgmma\.commit_group)"
    r"|wgmma\.wait_group\.sync\.aligned\s+(?P<wait>\d+)",
    re.M,
)
HOPPER = 90
"""The architecture that has wgmma, as Triton's targets name it."""
_accepted: set[str] = set()


def register_race(ptx: str) -> str | None:
    """Return where ``ptx`` breaks the rule of this module, in one phrase, or None.

    Loops are read in the order of their text; a branch inside one counts as not taken.
    """
    statements = [match.groupdict() for match in _STATEMENT.finditer(re.sub(r"//[^\n]*", "", ptx))]
    places: dict[str, int] = {}
    for at, statement in enumerate(statements):
        if statement["label"]:
            places[statement["label"].strip()] = at
        elif statement["jump"] in places:
            body = statements[places[statement["jump"]] : at]
            if _crosses(body):
                return f"loop {statement['jump']}: a wgmma may read registers that the next iteration has overwritten"
    return None


def _crosses(body: list[dict[str, Any]]) -> bool:
    """Return whether a product is issued while one of the previous iteration, its left operand in registers, may be in flight."""
    waiting = _run(body, [])
    for statement in body if any(waiting) else ():
        if statement["left"]:
            return True
        if statement["wait"] is not None:
            waiting = _run([statement], waiting)
            if not any(waiting):
                return False
    return False


def _run(body: list[dict[str, Any]], waiting: list[bool]) -> list[bool]:
    """Return for each commit group in flight after ``body``, oldest first, whether it has a left operand in registers."""
    in_registers = False
    for statement in body:
        if statement["left"]:
            in_registers = in_registers or statement["left"] == "{"
        elif statement["commit"]:
            waiting, in_registers = [*waiting, in_registers], False
        elif statement["wait"] is not None:
            waiting = waiting[max(len(waiting) - int(statement["wait"]), 0) :]
    return waiting


def checked(compiled: Any) -> None:
    """Check a kernel that Triton has just launched, once: ``checked(kernel[grid](...))``.

    Args:
        compiled: the compiled kernel that the launch returned; None in Triton's interpreter.

    Raises:
        ValueError: it breaks the rule of this module, or Triton kept no PTX of it and the GPU has wgmma. Do not use its result.
    """
    if compiled is None or compiled.hash in _accepted:
        return
    ptx = compiled.asm.get("ptx")
    if ptx is None and compiled.metadata.target.arch == HOPPER:
        raise ValueError(f"{compiled.name} cannot be checked for races without its PTX: unset TRITON_STORE_BINARY_ONLY")
    found = register_race(ptx or "")
    if found is not None:
        raise ValueError(f"{compiled.name} was compiled to a race: {found}")
    _accepted.add(compiled.hash)
