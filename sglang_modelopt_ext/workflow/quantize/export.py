"""The export of a checkpoint folder: written beside its place, read back strictly, and only then renamed.

At any end of a run ``output`` is a whole, valid checkpoint or unchanged.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from sglang_modelopt_ext import __version__
from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    KV_CACHE_LAYERS,
    KV_CACHE_RECIPE,
    OWN_KEY,
    QUANT_CONFIG_NAME,
    ROUNDS_ACTIVATIONS,
)
from sglang_modelopt_ext.checkpoint.reader import Checkpoint, bits_per_weight, check_all_values, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.disk import full_disk
from sglang_modelopt_ext.files.whole import check_space, make_readable, move_into_place, partial_folder
from sglang_modelopt_ext.workflow.common.progress import elapsed_progress, polled_progress
from sglang_modelopt_ext.workflow.quantize import quantizers
from sglang_modelopt_ext.workflow.quantize.folding import Folding
from sglang_modelopt_ext.workflow.quantize.markers import without_markers
from sglang_modelopt_ext.workflow.quantize.model_card import CARD_NAME, render_card
from sglang_modelopt_ext.workflow.quantize.packed_experts import blocks_along_k
from sglang_modelopt_ext.workflow.quantize.record import Origin, Record, layer_formats, package_versions, write_record

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
)


@dataclass(frozen=True)
class Exported:
    """A written checkpoint that passed the checks.

    Attributes:
        folder: its path.
        checkpoint: the result of the strict reader, read before the rename.
        record: the metadata recorded in it.
        size: bytes of its safetensors files.
    """

    folder: Path
    checkpoint: Checkpoint
    record: Record
    size: int


def check_output(model: Path, output: Path, overwrite: bool) -> None:
    """Raise for an output folder that must not be written. Call it before the work, too.

    Raises:
        ModelOptExtError: ``output`` exists and is not to be overwritten, holds other files than a checkpoint, or is the
            model's own folder or above it.
    """
    if output.resolve() == model.resolve() or output.resolve() in model.resolve().parents:
        raise ModelOptExtError.at(output, "output", "another folder than the model's", "that one")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise ModelOptExtError.at(output, "output", "a folder", "something else")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise ModelOptExtError.at(output, "output", "an empty folder, a new one or --overwrite", "a folder with files")
    # Never delete a folder that holds something else.
    if not (output / "config.json").is_file():
        raise ModelOptExtError.at(output, "output", "an old checkpoint to overwrite", "something else")


def export_checkpoint(
    model: Any,
    source: Path,
    output: Path,
    origin: Origin,
    *,
    overwrite: bool = False,
    quality: dict[str, float] | None = None,
    kv_layers: Mapping[int, str] | None = None,
    finish: Callable[[Path, Checkpoint, Record], Record] | None = None,
    progress: bool = True,
) -> Exported:
    """Export a model with ModelOpt's calibrated quantizers to ``output``.

    In order: space on disk, ModelOpt's export to a temporary folder beside ``output``, the record under ``OWN_KEY``, the
    tokenizer's files, the model card, the strict reader with every value and the plan of the KV cache, permissions, rename.

    Args:
        model: the model; ModelOpt replaces its weights with the stored ones.
        source: folder of the unquantized model, for its tokenizer.
        output: folder to make.
        origin: the metadata that the model itself does not have.
        overwrite: replace the checkpoint that is in ``output``.
        quality: measured figures for the record and the card.
        kv_layers: the recipes of layers whose KV cache has another one than the model's quantizers, by layer number.
        finish: called with the temporary folder, its checkpoint and its record; may add files, returns the new record.
        progress: show progress on standard error.

    Raises:
        ModelOptExtError: no space, a folder that is not empty, a model ModelOpt cannot export, or an invalid export.
    """
    check_output(source, output, overwrite)
    check_space(output, quantizers.expected_bytes(model))
    rounds = quantizers.rounds_activations(model)
    kv_recipe, kv_cache = quantizers.kv_cache(model)
    folding = Folding(model)
    with partial_folder(output) as scratch:
        try:
            _run_export(model, scratch, progress)
        except Exception as error:  # ModelOpt raises assertions and errors of every kind
            raise _failure(source, output, origin, error) from error
        folding.check(source)
        copy_tokenizer(source, scratch)
        with elapsed_progress("checking the export", progress):
            _take_off_markers(scratch)
            layers = {str(number): recipe for number, recipe in (kv_layers or {}).items()}
            _preliminary(scratch, {ROUNDS_ACTIVATIONS: rounds, KV_CACHE_RECIPE: kv_recipe, KV_CACHE_LAYERS: layers})
            checkpoint = read_checkpoint(scratch)
            record = Record(
                rounds_activations=rounds,
                kv_cache_recipe=kv_recipe,
                kv_cache_layers=layers,
                version=__version__,
                kv_cache=kv_cache,
                formats=layer_formats(checkpoint),
                bits_per_weight=bits_per_weight(checkpoint) if checkpoint.layers else None,
                versions=package_versions(),
                quality=quality or {},
                **{field: getattr(origin, field) for field in Origin.__struct_fields__},
            )
            if finish is not None:
                record = finish(scratch, checkpoint, record)
            write_record(scratch, record)
            size = sum(file.stat().st_size for file in scratch.glob("*.safetensors"))
            (scratch / CARD_NAME).write_text(render_card(output, record, size), encoding="utf-8")
            checkpoint = check_folder(scratch)
        _check_complete(output, model_has=kv_recipe, checkpoint=checkpoint)
        make_readable(scratch)
        move_into_place(scratch, output)
    return Exported(output, checkpoint, record, size)


def check_folder(folder: Path) -> Checkpoint:
    """Read a checkpoint like a server: every header, every scale, and the plan of the KV cache.

    Raises:
        ModelOptExtError: the checkpoint is invalid.
    """
    checkpoint = read_checkpoint(folder)
    check_all_values(checkpoint)
    plan = read_plan(folder, checkpoint.config, "auto")
    if plan is not None:
        _ = plan.layers
    return checkpoint


def _check_complete(output: Path, model_has: str | None, checkpoint: Checkpoint) -> None:
    """Raise for an export without quantized layers: the recipe's patterns match nothing in this model."""
    if not checkpoint.layers and model_has is None:
        raise ModelOptExtError.at(
            output, "export", "a quantized layer or KV cache", "none: the recipe matches no layer"
        )


def _run_export(model: Any, scratch: Path, progress: bool) -> None:
    from modelopt.torch.export import export_hf_checkpoint
    from transformers.utils import logging as transformers_logging

    messages: Any = transformers_logging
    messages.disable_progress_bar()
    total = sum(1 for _ in quantizers.quantized_linears(model))
    packing = polled_progress("exporting", total, lambda: quantizers.count_packed(model), "layer", progress)
    with warnings.catch_warnings(), torch.no_grad(), packing:
        # The error that follows this warning has its content.
        warnings.filterwarnings("ignore", message="Cannot export model to the model_config")
        with contextlib.redirect_stdout(None), blocks_along_k():
            export_hf_checkpoint(model, export_dir=scratch)


def _failure(source: Path, output: Path, origin: Origin, error: Exception) -> Exception:
    return full_disk(output.parent, error) or ModelOptExtError.at(
        source, origin.recipe, "a recipe ModelOpt can export", f"{type(error).__name__}: {error}"
    )


def _take_off_markers(scratch: Path) -> None:
    """Rewrite the configuration where ModelOpt left markers behind the names of modules."""
    file = scratch / QUANT_CONFIG_NAME
    content = read_json_object(file)
    section, names = without_markers(content["quantization"], file)
    if not names:
        return
    file.write_bytes(msgspec.json.encode(content | {"quantization": section}))
    file = scratch / CONFIG_NAME
    content = read_json_object(file)
    section, _ = without_markers(content["quantization_config"], file)
    file.write_text(json.dumps(content | {"quantization_config": section}, indent=2) + "\n", encoding="utf-8")


def _preliminary(scratch: Path, facts: dict[str, Any]) -> None:
    """Write the record that the reader needs, before the whole record is built from the reader's result."""
    file = scratch / QUANT_CONFIG_NAME
    file.write_bytes(msgspec.json.encode(read_json_object(file) | {OWN_KEY: facts}))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files unchanged; loading and saving could change them."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, target / file.name)
