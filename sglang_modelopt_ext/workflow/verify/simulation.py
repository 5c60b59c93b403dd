"""ModelOpt's simulation of a checkpoint: the base model under the recorded recipe, recalibrated on the recorded data.

ModelOpt changes transformers for the rest of the process: run this last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sglang_modelopt_ext.checkpoint.quant_config import WITHOUT_MODELOPT
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.base_model import load_model
from sglang_modelopt_ext.workflow.common.processes import Processes
from sglang_modelopt_ext.workflow.common.text import load_tokenizer
from sglang_modelopt_ext.workflow.evaluate.measure import Logprobs
from sglang_modelopt_ext.workflow.quantize.calibrate import Calibrator
from sglang_modelopt_ext.workflow.quantize.calibration import CalibrationData, load_calibration
from sglang_modelopt_ext.workflow.quantize.recipes import Changes, build, find_recipe
from sglang_modelopt_ext.workflow.quantize.record import Record, read_record
from sglang_modelopt_ext.workflow.quantize.run import prepare


def objection(folder: Path) -> str | None:
    """Return the reason why a checkpoint cannot be simulated, or None."""
    record = read_record(folder)
    if record is None:
        return "the checkpoint has no record of how it was made"
    if record.simulation == WITHOUT_MODELOPT:
        return "it was quantized at load, without ModelOpt"
    if record.search is not None:
        return "its formats were searched for"
    if record.kv_cache is not None:
        return "its KV cache is quantized"
    return None


@torch.no_grad()
def simulate(
    folder: Path, base: Path, windows: Sequence[Sequence[int]], like: Sequence[Logprobs], progress: bool = True
) -> list[Logprobs]:
    """Return the log probabilities of ModelOpt's fake-quantized model, in the base model's dtype.

    Args:
        folder: the checkpoint, for which :func:`objection` is None.
        base: the unquantized model.
        windows: tokens.
        like: arrays with as many rows as are wanted of each window's end.
        progress: show progress on standard error.

    Raises:
        ModelOptExtError: ModelOpt or the calibration data are missing or differ from the record.
    """
    record = read_record(folder)
    assert record is not None, "asked after objection()"
    data = _data(folder, base, record, progress)
    recipe, config = find_recipe(record.recipe)
    config = build(config, Changes(overrides=record.selection.overrides))
    config["algorithm"] = [dict(step) for step in record.algorithm]
    model, _ = load_model(base, progress=progress)
    torch.manual_seed(record.calibration.seed if record.calibration else 0)
    steps = prepare(model, recipe, config, record.selection)
    if steps:
        Calibrator(
            model,
            data,
            base,
            None,
            Processes(),
            layerwise=any("layerwise" in step for step in steps),
            progress=progress,
        ).run(steps)
    found = []
    device = next(model.parameters()).device
    pairs = zip(windows, like, strict=True)
    for window, rows in tqdm(
        pairs, desc="ModelOpt's simulation", total=len(windows), unit="window", dynamic_ncols=True, disable=not progress
    ):
        logits = model(torch.tensor([list(window)], device=device), use_cache=False).logits[0, :-1]
        logprobs = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
        found.append(np.asarray(logprobs[-len(rows) :]))
    return found


def _data(folder: Path, base: Path, record: Record, progress: bool) -> CalibrationData | None:
    """Return the recorded calibration data, checked against the recorded digest."""
    recorded = record.calibration
    if recorded is None:
        return None
    data = load_calibration(
        recorded.data,
        load_tokenizer(base),
        samples=recorded.samples,
        sequence_length=recorded.sequence_length,
        batch_size=recorded.batch_size,
        seed=recorded.seed,
        progress=progress,
    )
    if data.record.sha256 != recorded.sha256:
        expected = f"the calibration data it records, sha256 {recorded.sha256[:12]}"
        raise ModelOptExtError.at(folder, "calibration", expected, data.record.sha256[:12])
    return data
