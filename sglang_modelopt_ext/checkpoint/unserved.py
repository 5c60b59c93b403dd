"""Checkpoints whose storage is not supported: fused shards, latent or linear attention, a quantized tied head.

Each kind has an error of its own. Without it a server would stop at a consequence, such as a shard that was never stored, sizes
that do not match or an unused tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.checkpoint.leftovers import ServedLayers
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QuantConfig, text_config
from sglang_modelopt_ext.checkpoint.reader import FUSED_SHARDS, Checkpoint, survey_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor, read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError

_LATENT = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"})
"""Projections of latent attention (MLA): SGLang fuses the first two under its own name and reads the third's weight itself."""

_LINEAR_ATTENTION = frozenset({"in_proj_qkvz", "in_proj_qkv", "in_proj_z", "in_proj_ba", "in_proj_b", "in_proj_a"})
"""Input projections of gated delta nets, which SGLang splits or fuses by head."""

_PACKED_EXPERTS = re.compile(r"(?P<experts>.+\.experts)\.(?P<projection>gate_proj|up_proj|w13|w2)(_\w+)?")
"""The pattern of one tensor with all experts of a layer, under names that ModelOpt does not export."""


def read_for_serving(
    folder: Path, config: QuantConfig | None = None, *, rounds_fp4: bool = True
) -> tuple[Checkpoint, list[ModelOptExtError]]:
    """Return the checkpoint and its errors: first those of unsupported storage, then the reader's, which may follow from them.

    Args:
        folder: the checkpoint.
        config: its declared quantization, read from ``folder`` when None.
        rounds_fp4: whether FP4 activations are rounded here; where not, their scales are not needed.

    Raises:
        ModelOptExtError: the files or the configuration cannot be read.
    """
    checkpoint, problems = survey_checkpoint(folder, config, rounds_fp4=rounds_fp4)
    return checkpoint, [*unserved(checkpoint), *problems]


def unserved(checkpoint: Checkpoint) -> list[ModelOptExtError]:
    """Return one error for each unsupported kind of storage, naming the first layer of the kind."""
    found: dict[str, ModelOptExtError] = {}
    for kind, error in _faults(checkpoint):
        found.setdefault(kind, error)
    return list(found.values())


def _faults(checkpoint: Checkpoint) -> Iterator[tuple[str, ModelOptExtError]]:
    served = ServedLayers.of(text_config(checkpoint.folder))
    for linear in checkpoint.linears.values():
        if served.leaves_out(linear.name):
            continue
        leaf = linear.name.rpartition(".")[2]
        stored = linear.stored.get("weight") or next(iter(linear.stored.values()))
        what: tuple[str, str] | None = None
        if leaf in FUSED_SHARDS:
            shards = ", ".join(FUSED_SHARDS[leaf])
            what = f"{shards} stored apart", f"them fused in one {linear.scheme.algo} tensor"
        elif leaf in _LATENT:
            what = "the projections of latent attention (MLA) unquantized", linear.scheme.algo
        elif leaf in _LINEAR_ATTENTION:
            what = "the input projections of linear attention (GDN) unquantized", linear.scheme.algo
        if what is not None:
            yield leaf, ModelOptExtError.at(stored.file, f"{linear.name}.weight", *what)
    for tensor in checkpoint.tensors.values():
        match = _PACKED_EXPERTS.fullmatch(tensor.name)
        if match and _is_quantized(tensor, checkpoint.tensors):
            got = f"all experts of {match['experts']} packed in one"
            expected = "a quantized tensor for each expert"
            yield "experts", ModelOptExtError.at(tensor.file, tensor.name, expected, got)
    yield from _heads(checkpoint)


def _is_quantized(tensor: StoredTensor, tensors: Mapping[str, StoredTensor]) -> bool:
    return tensor.dtype.itemsize == 1 or f"{tensor.name}_weight_scale" in tensors


def _heads(checkpoint: Checkpoint) -> Iterator[tuple[str, ModelOptExtError]]:
    """Yield an error for a quantized ``lm_head`` of tied embeddings: SGLang multiplies by the embedding and loads no head."""
    linear = checkpoint.linears.get("lm_head")
    if linear is not None and _is_tied(checkpoint.folder):
        file = next(iter(linear.stored.values())).file
        expected = f"an unquantized head, as tie_word_embeddings of {CONFIG_NAME} makes it the embedding"
        yield "lm_head", ModelOptExtError.at(file, "lm_head.weight", expected, linear.scheme.algo)


def _is_tied(folder: Path) -> bool:
    file = folder / CONFIG_NAME
    content: Mapping[str, Any] = read_json_object(file) if file.exists() else {}
    return bool(content.get("tie_word_embeddings", text_config(folder).get("tie_word_embeddings", False)))
