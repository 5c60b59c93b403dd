"""ModelOpt's calibration: layer by layer and resumable where possible, in several processes where results merge.

Layer by layer, each decoder layer's progress is kept in a private work folder as soon as it is done, in ModelOpt's own
files. These are pickles: they are read only from a folder of this user that no one else can write to, and only by a run
with the same inputs, whose digest is the folder's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.disk import full_disk
from sglang_modelopt_ext.workflow.common.base_model import activations_checked, import_modelopt
from sglang_modelopt_ext.workflow.common.processes import Processes
from sglang_modelopt_ext.workflow.common.products import fast_products
from sglang_modelopt_ext.workflow.quantize import checks, quantizers
from sglang_modelopt_ext.workflow.quantize.calibration import CalibrationData
from sglang_modelopt_ext.workflow.quantize.recipes import FP8_SMOOTHQUANT, FROM_QUANTIZED, SMOOTHQUANT
from sglang_modelopt_ext.workflow.quantize.smoothquant import register

AGREEING = ("max", "mse", SMOOTHQUANT, FP8_SMOOTHQUANT)
"""Algorithms that can run in several processes: they need only maxima of the data, which ModelOpt synchronizes."""

_WHOLE_MODEL = ("svdquant",)
"""Algorithms that ModelOpt cannot run layer by layer."""

_AMAX_ONLY = ("max", "mse", "local_hessian", "nvfp4_act_headroom")
"""Algorithms that do not change weights: their checkpoints hold scales only."""

_SMOOTHING = (SMOOTHQUANT, FP8_SMOOTHQUANT, "awq_lite", "awq_full", "svdquant")
_OF_A_MIX = ("mse", "local_hessian")
"""Algorithms that ModelOpt's recipes of several formats are calibrated with: they search the scales of one, ``max`` the others'."""

_SEARCHING = ("awq_lite", "awq_clip", "awq_full", "svdquant", "mse", "local_hessian")


@dataclass(frozen=True)
class Outcome:
    """The result of a calibration.

    Attributes:
        smoothed: number of linear layers with a smoothing scale.
        searched: number of linear layers whose scales were searched.
        resumed_from: number of decoder layers that an earlier run had done.
        layerwise: whether it ran layer by layer.
    """

    smoothed: int = 0
    searched: int = 0
    resumed_from: int = 0
    layerwise: bool = False


@dataclass
class Calibrator:
    """A calibration of a model that has quantizers.

    Attributes:
        model: the model.
        data: the calibration data; None where no step needs activations.
        where: the subject of error messages.
        work: folder that keeps the progress of layers; None for no progress.
        processes: the processes that run it.
        layerwise: run layer by layer where possible.
        progress: show progress on standard error.
    """

    model: Any
    data: CalibrationData | None
    where: object
    work: Path | None = None
    processes: Processes = field(default_factory=Processes)
    layerwise: bool = True
    progress: bool = True

    def run(self, steps: Sequence[Mapping[str, Any]]) -> Outcome:
        """Run the steps in order.

        Raises:
            ModelOptExtError: a step that would skip or has skipped a layer, or values that are not finite.
        """
        register()
        smoothed = searched = resumed = 0
        wanted = self.layerwise and self.data is not None and len(steps) == 1
        layerwise = wanted and self._layer_by_layer(steps[0]["method"])
        asking = [step["method"] for step in steps if "layerwise" in step]
        if asking and not layerwise:
            needed = "to go layer by layer: one step, one process, and all quantizers in decoder layers"
            raise ModelOptExtError.at("recipe", asking[0], needed, "the whole model at once")
        for step in steps:
            expected = self._expected(step)
            if layerwise and self.work is not None:
                resumed = resume_point(self.work)
            self._run_step(step, layerwise)
            self._check(step, expected)
            smoothed = max(smoothed, len(expected) if step["method"] in _SMOOTHING else 0)
            searched = max(searched, len(expected) if step["method"] in _SEARCHING else 0)
        return Outcome(smoothed, searched, resumed, layerwise)

    def _expected(self, step: Mapping[str, Any]) -> list[str]:
        """Return the layers of the step, which must be all quantized ones: ModelOpt skips others silently at times.

        A search for scales may be a part of a mix, whose other layers keep those of ``max``: it must find layers.
        """
        method = step["method"]
        if self.processes.world > 1 and method not in AGREEING:
            raise ModelOptExtError.at(
                "--calibration-algorithm",
                method,
                f"one of {', '.join(AGREEING[:3])} with several processes: ModelOpt brings no other's results together",
                f"{self.processes.world} processes",
            )
        if self.processes.world > 1 and (cache := quantizers.kv_cache(self.model)[1]) is not None and cache.affine:
            raise ModelOptExtError.at(
                "--kv", "affine", "one process: ModelOpt does not bring the biases together", f"{self.processes.world}"
            )
        takes, needs = checks.step_takes(step)
        linears = [
            (name, module)
            for name, module in quantizers.quantized_linears(self.model)
            if not isinstance(module, torch.nn.Embedding)
        ]
        if method == "max" or method not in (*_SMOOTHING, *_SEARCHING):
            return []
        if method in _OF_A_MIX:
            linears += [
                (name, one)
                for name, module in quantizers.fused_experts(self.model)
                for one in quantizers.projections_of_expert(module)
            ]
            if found := [name for name, module in linears if takes(module)]:
                return list(dict.fromkeys(found))
        ignored = [name for name, module in linears if not takes(module)]
        if ignored or not linears:
            got = f"{ignored[0]}, which ModelOpt would skip" if ignored else "no quantized layer"
            raise ModelOptExtError.at("--calibration-algorithm", method, needs, got)
        return [name for name, _ in linears]

    def _check(self, step: Mapping[str, Any], expected: Sequence[str]) -> None:
        """Raise ModelOptExtError unless every layer of the step shows its effect."""
        method = step["method"]
        modules = dict(self.model.named_modules())
        for name in expected:
            module = modules[name]
            if method in _SMOOTHING and not hasattr(module.input_quantizer, "_pre_quant_scale"):
                raise ModelOptExtError.at(name, method, "a smoothed layer", "one that ModelOpt skipped")
            if method == "svdquant" and not hasattr(module.weight_quantizer, "svdquant_lora_a"):
                raise ModelOptExtError.at(name, method, "a low-rank branch", "none: ModelOpt skipped it")
        if step["method"] in ("awq_lite", "awq_full") and all(
            bool((modules[name].input_quantizer._pre_quant_scale == 1).all()) for name in expected
        ):
            raise ModelOptExtError.at(self.where, method, "smoothing scales", "ones only: ModelOpt searched nothing")

    def _layer_by_layer(self, method: str) -> bool:
        """Return whether ModelOpt can run layer by layer, with all quantized layers in decoder layers."""
        from modelopt.torch.quantization.utils.layerwise_calib import LayerActivationCollector

        if self.processes.world > 1 or method in _WHOLE_MODEL:
            return False
        layers = LayerActivationCollector.get_decoder_layers(self.model)
        if layers is None or len(layers) == 0:
            return False
        inside = {id(module) for layer in layers for module in layer.modules()}
        on = (module for name, module in self.model.named_modules() if name.endswith("_quantizer"))
        return all(id(module) in inside for module in on if quantizers.is_on(module))

    def _run_step(self, step: Mapping[str, Any], layerwise: bool) -> None:
        mtq = import_modelopt()
        options = dict(step)
        if layerwise:
            layers: dict[str, Any] = {"enable": True, "calib_mutates_weights": step["method"] not in _AMAX_ONLY}
            layers[FROM_QUANTIZED] = False  # ModelOpt's default differs by algorithm
            if self.work is not None:
                layers["checkpoint_dir"] = str(self.work)
            options["layerwise"] = layers | step.get("layerwise", {})

        # No step needs the logits of all tokens, and for a small model they are a fifth of the work.
        kept = {"logits_to_keep": 1} if quantizers.can_skip_logits(self.model) else {}

        def forward(model: Any) -> None:
            assert self.data is not None, "a step that runs the model has data"
            batches = self.data.batches(self.processes.rank, self.processes.world)
            # Layer by layer, ModelOpt shows a progress bar of its own.
            shown = self.progress and not layerwise and self.processes.rank == 0
            for batch in tqdm(batches, desc="calibrating", unit="batch", dynamic_ncols=True, disable=not shown):
                model(batch.to(self.model.device), use_cache=False, **kept)

        try:
            quick = fast_products(self.model.device)
            with activations_checked(self.model, self.where), modelopt_messages(), torch.no_grad(), quick:
                mtq.calibrate(self.model, options, None if self.data is None else forward)
        except ModelOptExtError:
            raise
        except Exception as error:  # ModelOpt raises assertions and errors of every kind
            full = full_disk(self.work.parent, error) if self.work is not None else None
            raise full or ModelOptExtError.at(
                self.where, step["method"], "ModelOpt to calibrate with it", f"{type(error).__name__}: {error}"[:300]
            ) from error


@contextlib.contextmanager
def modelopt_messages() -> Iterator[None]:
    """Redirect ModelOpt's prints to standard error and drop its irrelevant warnings while the block runs."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", message="Distributed training is initialized but no parallel_state")
        warnings.filterwarnings(
            "ignore", message="torch.distributed is initialized. Please maintain the same parallelism"
        )
        warnings.filterwarnings("ignore", message="Received custom quantization formats")
        yield


def work_folder(output: Path, inputs: Mapping[str, Any]) -> Path:
    """Return the private folder for the progress of a run, beside its output; create it if missing.

    Args:
        output: the folder that the run writes.
        inputs: every input of the result; another value, by its ``repr``, gives another folder.

    Raises:
        ModelOptExtError: a folder of that name that others own or can write to.
    """
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()
    folder = output.parent / f"{_work_prefix(output)}{digest[:16]}"
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    status = folder.lstat()
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    if not private:
        raise ModelOptExtError.at(
            folder, "work folder", "a folder only its owner can read, owned by this user", "another"
        )
    return folder


@contextlib.contextmanager
def tidy(work: Path | None) -> Iterator[None]:
    """On an error in the block, print how to resume from the work folder, or remove it if it is empty."""
    try:
        yield
    except BaseException:
        if work is not None:
            if (done := resume_point(work)) > 0:
                tqdm.write(
                    f"{work} keeps {done} calibrated layers; the same command resumes from there", file=sys.stderr
                )
            elif not any(work.iterdir()):
                work.rmdir()
        raise


def remove_work(output: Path) -> None:
    """Remove the progress of every run for ``output``."""
    for folder in output.parent.glob(f"{_work_prefix(output)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _work_prefix(output: Path) -> str:
    return f".{output.name}.calibration-"


def resume_point(work: Path) -> int:
    """Return the number of decoder layers that ModelOpt will find done in a work folder.

    ModelOpt starts over if all are done. In that case the last one is removed, so that only that one is repeated.
    """
    manifest = work / "manifest.json"
    if not manifest.is_file():
        return 0
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        last, total = int(content["last_completed_layer"]), int(content["num_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # ModelOpt starts over too
    if last + 1 == total and total > 1:
        last = total - 2
        temporary = manifest.with_suffix(".tmp")
        temporary.write_text(json.dumps({**content, "last_completed_layer": last}), encoding="utf-8")
        temporary.replace(manifest)
    return last + 1 if last + 1 < total else 0
