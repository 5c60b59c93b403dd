"""Stand-ins for two things that SGLang asks of a CPU and that are not there, for attention data parallel and for LoRA.

They are installed in all processes of a server by a plugin of SGLang's, whose entry point lies in a folder of ``PYTHONPATH``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
GROUP = "sglang.srt.plugins"
FACTORIES = ("tensor", "zeros", "empty", "arange")
"""The functions of torch that SGLang's LoRA asks for pinned memory."""


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a server that has the stand-ins; ``folder`` is an empty one for the entry point."""
    metadata = folder / "stand_ins-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-ins\nVersion: 0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\nstand_ins = {__name__}:install\n", encoding="utf-8")
    places = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(place for place in places if place)}


def install() -> None:
    """Install the stand-ins in this process, once."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    # Attention data parallel fills batches up to one size for all ranks; of a CPU's backends intel_amx alone says how.
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1
    if torch.Tensor.pin_memory is not _unpinned:
        torch.Tensor.pin_memory = _unpinned  # type: ignore[assignment, method-assign]
        for name in FACTORIES:
            setattr(torch, name, without_pinning(getattr(torch, name)))


def _unpinned(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return self


def without_pinning(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function of torch that allocates unpinned memory where it is asked for pinned."""

    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        del pin_memory
        return original(*args, **kwargs)

    return make
