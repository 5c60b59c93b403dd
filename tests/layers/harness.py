"""SGLang's own linear layers, built and loaded in this process from a real export, without a server.

The layers, their weight loaders, the strict loader and the linear method are the served ones; only the model around them is
replaced by a namespace that holds a checkpoint's other tensors as plain parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from sglang.srt.layers import linear as sglang_linear
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from sglang_modelopt_ext.checkpoint.quant_config import canonical_name
from sglang_modelopt_ext.checkpoint.reader import FUSED_SHARDS, Checkpoint, check_scalar_values, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_tensors
from sglang_modelopt_ext.integration import loading
from sglang_modelopt_ext.integration.config import ModelOptExtConfig, register_methods
from sglang_modelopt_ext.integration.loading import StrictLoad, quantized_modules
from sglang_modelopt_ext.schemes.table import UMBRELLA

HEAD_SIZE = 64
_ROW_PARALLEL = ("o_proj", "down_proj")


class Namespace(torch.nn.Module):
    """Modules and parameters under the names a checkpoint gives them, with a loader like SGLang's models have."""

    def put(self, name: str, value: torch.nn.Module | torch.nn.Parameter) -> None:
        """Set ``value`` under a dotted name."""
        owner: torch.nn.Module = self
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(owner, part):
                setattr(owner, part, Namespace())
            owner = getattr(owner, part)
        setattr(owner, last, value)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load like ``LlamaForCausalLM.load_weights``: fused names first, unknown tensors are dropped."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            for fused, shards in FUSED_SHARDS.items():
                shard = next((s for s in shards if f".{s}." in name), None)
                target = name.replace(f".{shard}.", f".{fused}.") if shard else name
                if shard and target in parameters:
                    shard_id = shard[0] if fused == "qkv_proj" else shards.index(shard)
                    parameters[target].weight_loader(parameters[target], tensor, shard_id)
                    break
            else:
                if name in parameters:
                    loader = getattr(parameters[name], "weight_loader", _copy)
                    loader(parameters[name], tensor)


def _copy(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
    parameter.data.copy_(tensor)


@contextmanager
def parallel_rank(rank: int, size: int) -> Iterator[None]:
    """Build layers for that tensor-parallel rank while the block runs, without a distributed group."""
    group = sglang_linear._LogicalGroup(rank, size) if size > 1 else None
    with mock.patch.object(sglang_linear, "_resolve_linear_group", return_value=group):
        yield


def build(
    folder: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Namespace, Checkpoint]:
    """Return the quantized linear layers of a checkpoint on one tensor-parallel rank, loaded and prepared.

    The fused layers are found by their shards; every other tensor becomes a plain parameter.
    """
    register_methods()
    checkpoint = read_checkpoint(folder)
    check_scalar_values(checkpoint)
    config = ModelOptExtConfig(UMBRELLA, checkpoint.config, checkpoint)
    model = Namespace()
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with parallel_rank(rank, size):
            fill(model, config, checkpoint)
    finally:
        torch.set_default_dtype(previous)
    load(model, checkpoint)
    return model, checkpoint


def load(model: Namespace, checkpoint: Checkpoint, elsewhere: set[str] | None = None) -> set[str]:
    """Load ``checkpoint`` strictly, prepare the layers, and return the used tensors.

    ``elsewhere`` stands for the tensors that other ranks report as used.
    """
    weights = ((stored.name, tensor) for stored, tensor in read_tensors(list(checkpoint.tensors.values())))
    strict = StrictLoad(model, checkpoint)
    if elsewhere is not None:
        with mock.patch.object(loading, "used_and_fault", return_value=(elsewhere, None)):
            strict.run(model.load_weights, weights)
    else:
        strict.run(model.load_weights, weights)
    for module, method in quantized_modules(model):
        method.verified = True
        method.process_weights_after_loading(module)
    return strict.used


def fill(
    model: Namespace,
    config: ModelOptExtConfig,
    checkpoint: Checkpoint,
    skip: str | None = None,
    rename: tuple[str, str] = ("", ""),
) -> None:
    """Put the quantized linear layers, and a parameter for every tensor of other modules, into ``model``.

    Args:
        model: the namespace to fill.
        config: gives the layers their methods.
        checkpoint: the stored tensors.
        skip: modules with this in their names are skipped.
        rename: a part of names in the checkpoint, and its replacement in the model.
    """
    owned = set()
    for linear in checkpoint.linears.values():
        if skip is not None and skip in linear.name:
            continue
        if "embed" in linear.name or "lm_head" in linear.name:
            continue
        parent, _, name = linear.name.rpartition(".")
        fused = next((fused for fused, shards in FUSED_SHARDS.items() if name in shards), None)
        prefix = f"{parent}.{fused or name}"
        owned.update(f"{linear.name}.{spec}" for spec in linear.stored)
        owned.update(stored.name for stored in linear.stored.values())
        if not fused or name == FUSED_SHARDS[fused][0]:
            shards = [
                checkpoint.linears[canonical_name(f"{parent}.{s}")] for s in FUSED_SHARDS.get(fused or "", (name,))
            ]
            model.put(prefix, _layer(name, [s.n for s in shards], linear.k, "bias" in linear.stored, config, prefix))
    for tensor in checkpoint.tensors.values():
        if tensor.name not in owned and (skip is None or skip not in tensor.name):
            model.put(
                tensor.name.replace(f".{rename[0]}.", f".{rename[1]}."),
                torch.nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=False),
            )


def _layer(name: str, n: list[int], k: int, bias: bool, config: ModelOptExtConfig, prefix: str) -> LinearBase:
    if name == "q_proj":
        heads, kv_heads = n[0] // HEAD_SIZE, n[1] // HEAD_SIZE
        return QKVParallelLinear(k, HEAD_SIZE, heads, kv_heads, bias=bias, quant_config=config, prefix=prefix)
    if len(n) > 1:
        return MergedColumnParallelLinear(k, n, bias=bias, quant_config=config, prefix=prefix)
    kind = RowParallelLinear if name in _ROW_PARALLEL else ColumnParallelLinear
    return kind(k, n[0], bias=bias, quant_config=config, prefix=prefix)
