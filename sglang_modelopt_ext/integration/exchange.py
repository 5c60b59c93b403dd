"""Exchanges between ranks about a load: the tensors that they used, and their faults."""

from __future__ import annotations

from typing import Any

import torch


def used_and_fault(used: set[str], fault: str | None) -> tuple[set[str], str | None]:
    """Return the tensors that were used on any rank, and the first rank's fault, None where none has one.

    Pipeline stages and expert ranks skip each other's tensors, and one of them may be the only one to find a fault. It must be
    called on all ranks at once.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return used, fault
    from sglang.srt.distributed.parallel_state import get_world_group

    group = get_world_group().cpu_group
    gathered: list[tuple[set[str], str | None]] = [(set(), None)] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, (used, fault), group=group)
    faults = (found for _, found in gathered if found is not None)
    return set().union(*(found for found, _ in gathered)), next(faults, None)


def first_fault(fault: str | None, group: Any) -> str | None:
    """Return the first fault of all ranks of ``group``, None where no rank has one; called on all of them at once."""
    found: list[str | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, fault, group=group)
    return next((one for one in found if one is not None), None)
