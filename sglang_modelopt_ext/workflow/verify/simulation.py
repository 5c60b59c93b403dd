"""ModelOpt's own simulation of a checkpoint: the base model under the recorded recipe, calibrated again on the recorded data.

ModelOpt changes transformers for the rest of the process: this comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.source import load_model
from sglang_modelopt_ext.workflow.common.text import load_tokenizer
from sglang_modelopt_ext.workflow.evaluate.measure import Logprobs
from sglang_modelopt_ext.workflow.quantize.calibrate import Calibrator, Processes
from sglang_modelopt_ext.workflow.quantize.calibration import CalibrationData, load_calibration
from sglang_modelopt_ext.workflow.quantize.recipes import Changes, build, find_recipe
from sglang_modelopt_ext.workflow.quantize.record import Record, read_record
from sglang_modelopt_ext.workflow.quantize.run import prepare


def objection(folder: Path) -> str | None:
    """Why a checkpoint cannot be simulated; None where it may be."""
    record = read_record(folder)
    if record is None:
        return "the checkpoint has no record of how it was made"
    if record.search is not None:
        return "its formats were searched for"
    if record.kv_cache is not None:
        return "its KV cache is quantized"
    return None


@torch.no_grad()
def simulate(
    folder: Path, base: Path, windows: Sequence[Sequence[int]], like: Sequence[Logprobs], progress: bool = True
) -> list[Logprobs]:
    """The log probabilities of ModelOpt's fake-quantized model, in the base model's type.

    Args:
        folder: the checkpoint, with a record that :func:`objection` has none to.
        base: the model it was made from.
        windows: tokens.
        like: the last rows of each window that are wanted.
        progress: show progress on standard error.

    Raises:
        ModelOptExtError: ModelOpt or the calibration data are not there, or are not what they were.
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
        Calibrator(model, data, base, None, Processes(), layerwise=False, progress=progress).run(steps)
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
    """The recorded calibration data, found to be the same."""
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
