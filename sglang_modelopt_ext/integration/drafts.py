"""Drafts of speculative decoding beside a target that this package serves: an unquantized draft is left to SGLang.

SGLang gives a draft the target's ``--quantization``, and builds blocks for multi-token prediction (MTP) from the target's own
checkpoint, under other names than the checkpoint's or under those of the target's layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.leftovers import ServedLayers
from sglang_modelopt_ext.checkpoint.quant_config import text_config
from sglang_modelopt_ext.checkpoint.tensors import read_headers
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.linear_method import quantized_vocabularies
from sglang_modelopt_ext.schemes.table import FAMILIES

WHOLE_MODEL = "STANDALONE"
"""The ``--speculative-algorithm`` whose draft is a model of its own: it is served like a target."""

KEEP_TO_THEMSELVES = (None, "NGRAM", WHOLE_MODEL)
"""The values of ``--speculative-algorithm`` without a draft that takes the target's embedding or head."""


def inherits_flag(model_config: Any) -> bool:
    """Return whether a model has a ``--quantization`` of this package's because it is the draft of a target that has it."""
    flag = (model_config.quantization or "").lower()
    return flag in FAMILIES and model_config.is_draft_model and not model_config.is_draft_quantization_explicit


def is_part_of_a_model(model_config: Any) -> bool:
    """Return whether a model is a draft that is no model of its own, such as EAGLE's or an MTP block."""
    from sglang.srt.runtime_context import get_spec

    return bool(model_config.is_draft_model) and get_spec().speculative_algorithm != WHOLE_MODEL


def check_unquantized(model_config: Any, folder: Path) -> None:
    """Raise ModelOptExtError where a draft has quantized tensors, whose names in SGLang's classes are not those that are stored.

    Args:
        model_config: SGLang's configuration of the draft.
        folder: the target's checkpoint, which has the draft's layers too, or one of the draft alone.
    """
    from sglang.srt.runtime_context import get_model

    served = ServedLayers.of(text_config(folder))
    of_target = Path(model_config.model_path) == Path(get_model().model_path)
    for name, stored in sorted(read_headers(folder).items()):
        is_quantized = stored.dtype.itemsize == 1 and stored.dtype != torch.bool  # EAGLE3 has a map of tokens
        if is_quantized and (served.leaves_out(name) or not of_target):
            dtype = str(stored.dtype).removeprefix("torch.")
            raise ModelOptExtError.at(stored.file, name, "an unquantized tensor of a speculative draft", dtype)


def check_vocabularies(model: torch.nn.Module) -> None:
    """Raise ModelOptExtError where a draft would multiply by the prepared codes of a target's quantized embedding or head."""
    from sglang.srt.runtime_context import get_spec

    algorithm = get_spec().speculative_algorithm
    if algorithm in KEEP_TO_THEMSELVES:
        return
    for name, _ in quantized_vocabularies(model):
        expected = f"none, NGRAM or {WHOLE_MODEL} with a quantized {name}: a draft takes its weight"
        raise ModelOptExtError.at("command line", "--speculative-algorithm", expected, algorithm)
