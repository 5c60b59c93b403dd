"""The calibration and held-out text of a search, and measurements of its choices."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from tqdm import tqdm

from sglang_modelopt_ext.checkpoint.quant_config import canonical_name
from sglang_modelopt_ext.checkpoint.reader import Checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.state import State
from sglang_modelopt_ext.workflow.common.text import spread
from sglang_modelopt_ext.workflow.quantize.calibration import SAMPLES, CalibrationData, load_calibration, tokens_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORE_SAMPLES, HELD_OUT_SAMPLES = 32, 32
"""Default numbers of windows that are scored, and that perplexity is measured on."""

_LAYER = re.compile(r"\blayers\.\d+(?=\.|$)")
_EVERY = 5  # without --held-out, every fifth window is held out


def load_texts(
    data: Sequence[str],
    held_out: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    sequence_length: int,
    seed: int,
    progress: bool = True,
) -> tuple[CalibrationData, CalibrationData]:
    """Return the windows to calibrate on and the held-out windows, which share none.

    Args:
        data: files or data sets for calibration.
        held_out: files or data sets to measure on; empty: every fifth window of ``data``.
        tokenizer: the model's.
        samples: number of windows to calibrate on; None: as many as there are, up to the default of ``quantize``.
        sequence_length: text tokens per window.
        seed: selects windows from longer data.
        progress: show progress on standard error.

    Raises:
        ModelOptExtError: text that cannot be read or is too short.
    """
    common: dict[str, Any] = {"sequence_length": sequence_length, "seed": seed, "progress": progress}
    if held_out:
        measured = load_calibration(held_out, tokenizer, **common)
        windows = spread(measured.windows, HELD_OUT_SAMPLES)
        return load_calibration(data, tokenizer, samples=samples, **common), part(measured, windows)
    wanted = SAMPLES if samples is None else samples
    both = load_calibration(data, tokenizer, samples=_with_held_out(samples), **common)
    both = part(both, spread(both.windows, _with_held_out(wanted) or wanted))
    kept = [window for index, window in enumerate(both.windows) if index % _EVERY == _EVERY - 1]
    rest = [window for index, window in enumerate(both.windows) if index % _EVERY != _EVERY - 1]
    if not kept:
        raise ModelOptExtError.at(
            "--data",
            ", ".join(data),
            f"{_EVERY} windows of {sequence_length} tokens, to hold one out (or --held-out, or a shorter --sequence-length)",
            len(both.windows),
        )
    return part(both, rest), part(both, spread(kept, HELD_OUT_SAMPLES))


def _with_held_out(samples: int | None) -> int | None:
    return None if samples is None else samples + -(-samples // (_EVERY - 1))


def part(data: CalibrationData, windows: Sequence[Sequence[int]]) -> CalibrationData:
    """Return some of the windows as calibration data."""
    record = msgspec.structs.replace(
        data.record, samples=len(windows), tokens=sum(map(len, windows)), sha256=tokens_digest(windows)
    )
    return CalibrationData(tuple(tuple(window) for window in windows), record)


@torch.inference_mode()
def perplexity(model: Any, batches: Sequence[torch.Tensor], device: str, *, label: str, progress: bool = True) -> float:
    """Return ``exp`` of the mean negative log probability of all tokens but each window's first; sums are float64."""
    total, count = 0.0, 0
    for batch in tqdm(batches, desc=label, unit="window", dynamic_ncols=True, disable=not progress):
        ids = batch.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        total += float(losses.double().sum())
        count += losses.numel()
    value = math.exp(total / count) if total / count < 700 else math.inf
    if not math.isfinite(value):
        raise ModelOptExtError.at("held-out text", label, "a finite perplexity", value)
    return value


def stored_bits(checkpoint: Checkpoint, state: State) -> float:
    """Return stored bits per counted weight, scales included, measured from the checkpoint's tensors."""
    stored = 0.0
    experts = _stored_experts(checkpoint)
    for group in state.groups:
        for module in group.modules:
            layers = [layer for layer in group.layers if layer.name == module]
            plain = sum(layer.weights for layer in layers) * state.unquantized_bits
            if layers[0].experts:
                stored += group.weight * experts.get(_position(module), plain)
            else:
                stored += group.weight * _stored_layer(checkpoint, module, plain)
    return stored / state.weights


def _stored_layer(checkpoint: Checkpoint, name: str, unquantized: int) -> int:
    linear = checkpoint.linears.get(canonical_name(name))
    plain = checkpoint.tensors.get(f"{name}.weight")
    if linear is not None:
        return 8 * sum(tensor.num_bytes for part, tensor in linear.stored.items() if part != "bias")
    # A tied lm_head is stored as the embedding.
    return 8 * plain.num_bytes if plain is not None else unquantized


def _stored_experts(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the stored bits of the quantized experts of each layer, by the layer's position in the model."""
    found: dict[str, int] = {}
    for linear in checkpoint.layers:
        if ".experts." in linear.name:
            bits = 8 * sum(tensor.num_bytes for part, tensor in linear.stored.items() if part != "bias")
            found[_position(linear.name)] = found.get(_position(linear.name), 0) + bits
    return found


def _position(name: str) -> str:
    """Return ``layers.N`` of a module's name: what comes behind it may have another name in the checkpoint (Mixtral)."""
    found = _LAYER.search(name)
    return found.group() if found else name


def check_choice(checkpoint: Checkpoint, state: State, formats: dict[str, str]) -> None:
    """Raise ModelOptExtError unless every layer of the checkpoint has the algorithm that was chosen for it."""
    algos = {row.name: row.algo for row in state.formats}
    experts = {_position(layer.name): layer for layer in checkpoint.experts.values()}
    for group in state.groups:
        expected = algos.get(formats[group.name], "no quantization")
        for layer in group.layers:
            if layer.experts:
                own = experts.get(_position(layer.name))
                schemes = [] if own is None else list(own.schemes)
            else:
                linear = checkpoint.linears.get(canonical_name(layer.name))
                schemes = [] if linear is None else [linear.scheme]
            got = " and ".join(dict.fromkeys(scheme.algo for scheme in schemes)) or "no quantization"
            if got != expected:
                raise ModelOptExtError.at(checkpoint.folder, layer.name, f"{expected}, as chosen", got)
