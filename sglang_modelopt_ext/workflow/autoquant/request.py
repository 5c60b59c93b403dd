"""The inputs of ``auto-quantize``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.workflow.autoquant.latency import Table
from sglang_modelopt_ext.workflow.autoquant.solve import Method
from sglang_modelopt_ext.workflow.autoquant.state import LmHead, ScoredAs, Target
from sglang_modelopt_ext.workflow.quantize.calibration import SEED, SEQUENCE_LENGTH


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The text of a search: for calibration, scoring and measurement. None and empty stand for the defaults."""

    data: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    samples: int | None = None
    score_samples: int | None = None
    sequence_length: int = SEQUENCE_LENGTH
    seed: int = SEED


@dataclass(frozen=True, kw_only=True)
class Request:
    """The inputs of a search.

    Attributes:
        model: folder or name of the unquantized model.
        targets: budgets, one for each result.
        output: the folder to make. One target: the checkpoint itself; several: a folder for each.
        formats: names of the candidates; none beside a recipe.
        texts: the text.
        recipe: a recipe of ModelOpt that describes the search: its candidates, method, score samples and rules. ``targets`` and the
            score samples of ``texts`` come before its own.
        method: the sensitivity score, ``gradient`` or ``kl_div``.
        gpu: the target; None for this machine.
        lm_head: whether the ``lm_head`` is searched over, or counts in bits per weight unquantized.
        excluded: patterns of layers to leave unquantized.
        loss_scale: factor of the loss for the gradients; None to find one.
        device: device of the search; by default CUDA where there is a GPU.
        times: where times of the candidates are; None for none.
        scored_as: ``simulation`` or ``export``.
        kv_formats: recipes for the KV cache of each layer; none leaves the cache alone.
        kv_target: bits per cached element; None where there is one recipe.
        export: False to choose, measure and plot only.
        resume: continue an interrupted search for ``output``.
        overwrite: replace what an earlier run left in ``output``.
        progress: show progress on standard error.
    """

    model: str
    targets: tuple[Target, ...]
    output: Path
    formats: tuple[str, ...]
    texts: Texts
    recipe: str | None = None
    method: Method = "gradient"
    gpu: Device | None = None
    lm_head: LmHead = "excluded"
    excluded: tuple[str, ...] = ()
    loss_scale: float | None = None
    device: str | None = None
    times: Table | None = None
    scored_as: ScoredAs = "simulation"
    kv_formats: tuple[str, ...] = ()
    kv_target: float | None = None
    export: bool = True
    resume: bool = False
    overwrite: bool = False
    progress: bool = True
