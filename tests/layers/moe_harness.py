"""SGLang's own layers of experts, built and loaded in this process from a real export, without a server.

SGLang's parallel sizes and ranks are published like in its processes, for one rank at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish, reset_context
from sglang.srt.server_args import ServerArgs

from sglang_modelopt_ext.checkpoint.reader import Checkpoint, check_scalar_values, read_checkpoint
from sglang_modelopt_ext.integration.config import ModelOptExtConfig, register_methods
from sglang_modelopt_ext.schemes.table import UMBRELLA
from tests.layers import harness
from tests.layers.harness import Namespace, load, parallel_rank

NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3")),
    "qwen3_moe": ("mlp", ("gate_proj", "down_proj", "up_proj")),
    "qwen2_moe": ("mlp", ("gate_proj", "down_proj", "up_proj")),
}
"""SGLang's block of experts and its loader's names of gate, down and up, by model type."""


@contextmanager
def published(rank: int = 0, tp: int = 1, ep: int = 1) -> Iterator[None]:
    """Build layers for that rank of that many while the block runs, with experts split over ``ep`` of them."""
    reset_context()
    publish(
        ServerArgs(model_path="dummy", device="cpu", tp_size=tp, ep_size=ep),
        role="test",
        ranks=SpawnRanks(world_rank=rank, dp_rank=None),
    )
    try:
        with get_parallel().override(tp_group=None), parallel_rank(rank, tp):
            yield
    finally:
        reset_context()


class MoeNamespace(Namespace):
    """A namespace that loads experts like SGLang's models."""

    def __init__(self, mapping: list[tuple[str, str, int, str]]) -> None:
        super().__init__()
        self.mapping = mapping
        self.used: set[str] = set()

    def load_weights(self, weights: Any) -> None:
        """Load experts by SGLang's own table of names, the rest like a dense model."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            for parameter, weight, expert, shard in self.mapping:
                if weight in name:
                    target = parameters[name.replace(weight, parameter)]
                    target.weight_loader(target, tensor, name, shard_id=shard, expert_id=expert)
                    break
            else:
                super().load_weights([(name, tensor)])


def build(
    folder: Path, rank: int = 0, tp: int = 1, ep: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[MoeNamespace, Checkpoint]:
    """Return the layers of a checkpoint as one rank has them, loaded and prepared."""
    register_methods()
    checkpoint = read_checkpoint(folder)
    check_scalar_values(checkpoint)
    config = ModelOptExtConfig(UMBRELLA, checkpoint.config, checkpoint)
    hf = json.loads((folder / "config.json").read_text())
    block, (gate, down, up) = NAMES[hf["model_type"]]
    count = hf.get("num_experts") or hf["num_local_experts"]
    intermediate = hf.get("moe_intermediate_size") or hf["intermediate_size"]
    model = MoeNamespace(FusedMoE.make_expert_params_mapping(gate, down, up, count))
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with published(rank, tp, ep):
            for layer in range(hf["num_hidden_layers"]):
                prefix = f"model.layers.{layer}.{block}.experts"
                model.put(
                    prefix,
                    FusedMoE(
                        num_experts=count,
                        hidden_size=hf["hidden_size"],
                        intermediate_size=intermediate,
                        layer_id=layer,
                        top_k=hf["num_experts_per_tok"],
                        quant_config=config,
                        prefix=prefix,
                    ),
                )
            harness.fill(model, config, checkpoint, skip=".experts.", rename=("mlp", block))
            # A rank ignores the other ranks' experts; a test checks that the ranks together read all.
            elsewhere = set(checkpoint.tensors) if ep > 1 else None
            model.used = load(model, checkpoint, elsewhere)
    finally:
        torch.set_default_dtype(previous)
    return model, checkpoint


def run(layer: FusedMoE, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Run the layer's own forward: dispatch, experts, sum."""
    routed = StandardTopKOutput(weights, chosen.to(torch.int32), torch.empty(0))
    return layer.dispatcher.combine(layer.run_moe_core(layer.dispatcher.dispatch(hidden_states=x, topk_output=routed)))
