"""The command ``quantize``: from an unquantized model to a checked checkpoint, with NVIDIA ModelOpt."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.digest import folder_digest
from sglang_modelopt_ext.files.whole import check_space
from sglang_modelopt_ext.workflow.common.base_model import device_for, find_model, import_modelopt, load_model
from sglang_modelopt_ext.workflow.common.processes import joined
from sglang_modelopt_ext.workflow.common.progress import elapsed_progress
from sglang_modelopt_ext.workflow.common.text import load_tokenizer
from sglang_modelopt_ext.workflow.quantize import calibration, checks, quantizers
from sglang_modelopt_ext.workflow.quantize.calibrate import (
    Calibrator,
    Outcome,
    remove_work,
    tidy,
    work_folder,
)
from sglang_modelopt_ext.workflow.quantize.calibration import CalibrationData, load_calibration
from sglang_modelopt_ext.workflow.quantize.export import Exported, check_output, export_checkpoint
from sglang_modelopt_ext.workflow.quantize.recipes import NONE, Changes, build, find_recipe
from sglang_modelopt_ext.workflow.quantize.record import Origin, Selection, package_versions


@dataclass(frozen=True)
class Options:
    """The inputs that decide the result of :func:`quantize`.

    Attributes:
        recipe: see :mod:`~sglang_modelopt_ext.workflow.quantize.recipes`; ``none`` quantizes the KV cache only.
        changes: changes to the recipe.
        selection: the layers to leave out. Its overrides are those of ``changes``.
        data: calibration files and data sets.
        samples: number of windows; None for the default, or fewer where there are fewer.
        sequence_length, seed: see :func:`~sglang_modelopt_ext.workflow.quantize.calibration.load_calibration`.
        batch_size: the most windows in one forward pass; None for
            :func:`~sglang_modelopt_ext.workflow.quantize.calibration.batch_size_for` the device.
        device: ``cpu``, ``cuda``, or ``auto`` for accelerate's choice over all GPUs; None for CUDA where there is one.
        trust_remote_code: run the model's own code.
        layerwise: calibrate layer by layer where possible, and keep the progress; None for :func:`goes_layerwise`.
    """

    recipe: str
    changes: Changes = field(default_factory=Changes)
    selection: Selection = field(default_factory=Selection)
    data: tuple[str, ...] = ()
    samples: int | None = None
    sequence_length: int = calibration.SEQUENCE_LENGTH
    batch_size: int | None = None
    seed: int = calibration.SEED
    device: str | None = None
    trust_remote_code: bool = False
    layerwise: bool | None = None


@dataclass(frozen=True)
class Quantized:
    """The result of :func:`quantize`.

    Attributes:
        exported: the checkpoint.
        outcome: the result of the calibration.
    """

    exported: Exported
    outcome: Outcome


def quantize(
    model: str,
    output: Path,
    options: Options,
    *,
    overwrite: bool = False,
    quality: dict[str, float] | None = None,
    progress: bool = True,
) -> Quantized | None:
    """Calibrate, quantize and export a model to ``output``, which becomes a whole valid checkpoint or stays unchanged.

    Under ``torchrun`` the processes share the data, and the first one exports.

    Args:
        model: folder or Hugging Face name of the unquantized model.
        output: folder to make.
        options: the recipe and its data.
        overwrite: replace the checkpoint in ``output``.
        quality: measured figures for the record and the model card.
        progress: show progress on standard error.

    Returns:
        The result; None in every process but the first.

    Raises:
        ModelOptExtError: bad input of any kind; ``output`` is then unchanged.
    """
    source = find_model(model, options.trust_remote_code)
    check_output(source, output, overwrite)
    with elapsed_progress("importing ModelOpt", progress):
        recipe, config = find_recipe(options.recipe)
        config = build(config, options.changes)
        check_config(recipe, config)
    with joined(options.device) as (processes, device):
        data = _load_data(source, options, device, progress and processes.is_first)
        if data is not None:
            data.check_shares(processes.world)
        loaded, simulation = load_model(
            source, device, trust_remote_code=options.trust_remote_code, progress=progress and processes.is_first
        )
        torch.manual_seed(options.seed)
        steps = prepare(loaded, recipe, config, options.selection)
        check_space(output, quantizers.expected_bytes(loaded))
        needed = bool(steps) and needs_data(loaded, steps)
        if needed and data is None:
            raise ModelOptExtError.at("command line", "--data", f"calibration data for {recipe}", "none")
        outcome = Outcome()
        if steps:
            work = None
            layerwise = goes_layerwise(steps, loaded.device.type) if options.layerwise is None else options.layerwise
            if layerwise and needed and processes.world == 1:
                work = work_folder(output, _inputs(source, config, options, data))
            calibrator = Calibrator(loaded, data if needed else None, source, work, processes, layerwise, progress)
            with tidy(work):
                outcome = calibrator.run(steps)
        if processes.rank:
            return None
        origin = Origin(
            recipe=recipe,
            base_model=model,
            algorithm=tuple(steps),
            calibration=data.record if data is not None and needed else None,
            simulation=simulation,
            selection=_selection(options),
            smoothed=outcome.smoothed,
            searched=outcome.searched,
        )
        exported = export_checkpoint(
            loaded, source, output, origin, overwrite=overwrite, quality=quality, progress=progress
        )
    remove_work(output)
    return Quantized(exported, outcome)


def goes_layerwise(steps: list[dict[str, Any]], device: str) -> bool:
    """Return whether a calibration goes layer by layer unless it is told otherwise: where an interruption would cost much.

    Plain ``max`` on a GPU is a few forward passes, which take less time than the digests and files that keep the progress.
    """
    quick = all(step["method"] == "max" and "layerwise" not in step for step in steps)
    return not (quick and device != "cpu")


def _selection(options: Options) -> Selection:
    chosen = options.selection
    return Selection(mlp_only=chosen.mlp_only, exclude=chosen.exclude, overrides=options.changes.overrides)


def _load_data(source: Path, options: Options, device: str, progress: bool) -> CalibrationData | None:
    if not options.data:
        return None
    batch_size = options.batch_size
    if batch_size is None:
        batch_size = calibration.batch_size_for(device, options.sequence_length)
    return load_calibration(
        options.data,
        load_tokenizer(source, options.trust_remote_code),
        samples=options.samples,
        sequence_length=options.sequence_length,
        batch_size=batch_size,
        seed=options.seed,
        progress=progress,
    )


def prepare(model: Any, recipe: str, config: dict[str, Any], selection: Selection) -> list[dict[str, Any]]:
    """Insert a recipe's quantizers into a model, check them, and return the calibration steps for it.

    Raises:
        ModelOptExtError: nothing to quantize, or a layer that cannot be exported or served.
    """
    entries = [*config["quant_cfg"], *checks.selection_entries(model, selection)]
    insert_quantizers(model, recipe, entries)
    checks.check_model(model, recipe, [step["method"] for step in config["algorithm"]])
    return checks.resolve_steps(model, config["algorithm"])


def insert_quantizers(model: Any, recipe: str, entries: list[dict[str, Any]]) -> None:
    """Insert uncalibrated quantizers into a model. Raises ModelOptExtError where the entries quantize nothing."""
    mtq = import_modelopt()
    from sglang_modelopt_ext.workflow.quantize.calibrate import modelopt_messages

    try:
        with modelopt_messages():
            mtq.quantize(model, {"quant_cfg": entries, "algorithm": None})
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelOptExtError.at(
            "--recipe",
            recipe,
            "layers or a KV cache in this model to quantize",
            f"{type(error).__name__}: {error}"[:300],
        ) from error


def check_config(recipe: str, config: dict[str, Any]) -> dict[str, str]:
    """Check a recipe before a model is loaded, by applying it to a stand-in of one layer.

    Returns:
        The algorithm of each layer of the stand-in; empty where the recipe is for other architectures.

    Raises:
        ModelOptExtError: a format that cannot be exported or served.
    """
    model = stand_in()
    try:
        insert_quantizers(model, recipe, copy.deepcopy(config["quant_cfg"]))
    except ModelOptExtError:
        return {}  # the patterns may match layers that only other architectures have
    return checks.check_model(model, recipe, [step["method"] for step in config["algorithm"]])


def stand_in() -> Any:
    """Return a Llama of one layer, small enough to quantize in a moment, large enough for blocks of 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=128,
            architectures=["LlamaForCausalLM"],
        )
    ).eval()


def needs_data(model: Any, steps: list[dict[str, Any]]) -> bool:
    """Return whether calibration must run the model: for static activation scales, or for a search over outputs."""
    if any(step["method"] not in ("max", "mse") for step in steps):
        return True
    from modelopt.torch.quantization.model_calib import _needs_activation_forward_for_max_calib

    return bool(_needs_activation_forward_for_max_calib(model))


def _inputs(source: Path, config: dict[str, Any], options: Options, data: CalibrationData | None) -> dict[str, Any]:
    """Return the inputs that decide the result of a calibration."""
    return {
        "model": folder_digest(source, ("*.safetensors", CONFIG_NAME)),
        "config": config,
        "mlp_only": options.selection.mlp_only,
        "exclude": options.selection.exclude,
        "data": None if data is None else data.record.sha256,
        "batch_size": None if data is None else data.record.batch_size,
        "device": device_for(options.device),
        "seed": options.seed,
        "versions": package_versions(),
    }


__all__ = ["NONE", "Options", "Quantized", "quantize"]
