"""Tensors of a checkpoint that belong to no part of the model that is served: blocks for multi-token prediction, and buffers.

A multi-token prediction (MTP, "next n") block drafts for speculative decoding. Checkpoints store it as further layers behind the
decoder's (DeepSeek, GLM: ``num_nextn_predict_layers`` of config.json) or beside it (``mtp.*``: Qwen, Nemotron). A server without
drafts has no such module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_modelopt_ext.checkpoint.quant_config import canonical_name

LAYER_COUNT = "num_hidden_layers"

MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
"""Fields of config.json that give the number of multi-token prediction layers a model was trained with."""

BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".position_ids")
"""Name endings of buffers of positions, which some exporters store and every engine recomputes."""

_MTP = "mtp"
_DECODER = "layers"


def layer_position(module: str) -> tuple[str, int] | None:
    """Return ``(canonical name of the list of layers, layer number)`` of a module; None for one outside any list of layers."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if not number else (canonical_name(".".join(parts[:number])), int(parts[number]))


@dataclass(frozen=True)
class ServedLayers:
    """The layers that a server without drafts has: those of the decoder, and not the multi-token prediction layers behind them.

    Attributes:
        count: decoder layers, numbered from 0; None where config.json does not state it.
        mtp: multi-token prediction layers, numbered from ``count``.
    """

    count: int | None
    mtp: int

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ServedLayers:
        """Read both counts from ``fields``, the language model's part of config.json."""
        count = fields.get(LAYER_COUNT)
        declared = [fields[name] for name in MTP_COUNTS if isinstance(fields.get(name), int)]
        return cls(count if isinstance(count, int) else None, max(declared, default=0))

    def leaves_out(self, tensor: str) -> bool:
        """Return whether ``tensor`` (or a module) is not served: a recomputed buffer, or part of multi-token prediction."""
        if tensor.endswith(BUFFERS):
            return True
        parts = canonical_name(tensor).split(".")
        if any(part == _MTP or part.startswith(f"{_MTP}_") for part in parts[:2]):
            return True
        place = layer_position(tensor)
        if place is None or self.count is None:
            return False
        path, number = place
        return path == _DECODER and self.count <= number < self.count + self.mtp
