"""ModelOpt in several processes: when it may bring their results together, and scales that are the same in all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.workflow.common.base_model import import_modelopt
from sglang_modelopt_ext.workflow.common.processes import Processes
from sglang_modelopt_ext.workflow.quantize.calibrate import AGREEING


@contextmanager
def process_groups(processes: Processes, used: bool) -> Iterator[None]:
    """Make ModelOpt use its process groups, or find none, while the block runs; one process has none anyway.

    By default ModelOpt exchanges something at every step of a search, which processes that do different things would wait for.

    Raises:
        ModelOptExtError: ModelOpt is not installed.
    """
    if processes.world == 1:
        yield
        return
    import_modelopt()
    from modelopt.torch.utils.distributed import DistributedProcessGroup as Group

    before = Group.is_initialized

    def is_initialized(self: Any) -> bool:
        return used and torch.distributed.is_initialized() and self.group != -1

    Group.is_initialized = is_initialized
    try:
        yield
    finally:
        Group.is_initialized = before


@contextmanager
def first_one_shows(processes: Processes) -> Iterator[None]:
    """Drop messages and progress bars of all processes but the first while the block runs."""
    if processes.is_first:
        yield
        return
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
        yield


def reduces(algorithm: Any) -> bool:
    """Return whether ModelOpt calibrates to the same scales where every process has a part of the data.

    Args:
        algorithm: the field of a configuration: a name, a dict with the name as ``method``, a list of them, or None.
    """
    steps = algorithm if isinstance(algorithm, list) else [algorithm]
    methods = [step.get("method") if isinstance(step, dict) else step for step in steps]
    return all(method is None or method in AGREEING for method in methods)


def share_scales(model: Any, processes: Processes) -> None:
    """Give the quantizers of every process the state of the first one's."""
    from modelopt.torch.quantization.utils import get_quantizer_state_dict, set_quantizer_state_dict

    def state() -> dict[str, dict[str, Any]]:
        return {
            name: {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in own.items()}
            for name, own in get_quantizer_state_dict(model).items()
        }

    set_quantizer_state_dict(model, processes.from_first(state))
