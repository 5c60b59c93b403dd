"""Checkpoints whose storage is not supported: experts packed under names that ModelOpt does not export.

Each kind has an error of its own. Without it a server would stop at a consequence, such as a shard that was never stored, sizes
that do not match or an unused tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sglang_modelopt_ext.checkpoint.quant_config import QuantConfig
from sglang_modelopt_ext.checkpoint.reader import Checkpoint, survey_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.errors import ModelOptExtError

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
    for tensor in checkpoint.tensors.values():
        match = _PACKED_EXPERTS.fullmatch(tensor.name)
        if match and _is_quantized(tensor, checkpoint.tensors):
            got = f"all experts of {match['experts']} packed in one"
            expected = "a quantized tensor for each expert"
            yield "experts", ModelOptExtError.at(tensor.file, tensor.name, expected, got)


def _is_quantized(tensor: StoredTensor, tensors: Mapping[str, StoredTensor]) -> bool:
    return tensor.dtype.itemsize == 1 or f"{tensor.name}_weight_scale" in tensors
