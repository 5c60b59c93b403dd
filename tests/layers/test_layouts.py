"""Stored layers as SGLang's linear layers: one for several partitions, several for one, on one rank and on two."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.linear_method import ModelOptExtLinearMethod
from sglang_modelopt_ext.layers.linear import dense_weight
from sglang_modelopt_ext.schemes.base import LORA_A, LORA_B, LayerScheme
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from tests.layers.harness import parallel_rank

K = 256
HEADS, KV_HEADS, HEAD = 4, 2, 64
QKV = (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
GDN = (128, 128, 256, 256)

FORMATS = ("nvfp4_w4a8", "mxfp4", "int4_awq_w4a8", "fp8_per_channel", "int8_per_channel", "fp8_block")
"""Packed along K and along N, with scalars, scales of rows, and blocks over 128 rows."""

Stored = dict[str, torch.Tensor]


def scheme_of(name: str, rank: int = 0) -> LayerScheme:
    return LayerScheme("TEST", WEIGHT_FORMATS[name], None, smoothing=True, low_rank=rank)


def store(scheme: LayerScheme, rows: int, seed: int) -> Stored:
    """Return the stored tensors of a random layer."""
    generator = torch.Generator().manual_seed(seed)
    stored = scheme.weight.quantize(torch.randn(rows, K, generator=generator) * 0.05 * (1 + seed))
    stored["pre_quant_scale"] = torch.rand(K, generator=generator) + 0.5
    if scheme.low_rank:
        stored[LORA_A] = torch.randn(scheme.low_rank, K, generator=generator)
        stored[LORA_B] = torch.randn(rows, scheme.low_rank, generator=generator)
    return stored


def build(
    kind: Any,
    sizes: Any,
    scheme: LayerScheme,
    stored: Sequence[int],
    rank: int = 0,
    ranks: int = 1,
    name: str = "layer",
) -> LinearBase:
    """Return a layer of SGLang's on one rank, made of stored layers of ``stored`` rows."""
    linears = [QuantizedLinear(f"stored.{i}", scheme, rows, K, {}) for i, rows in enumerate(stored)]
    method = ModelOptExtLinearMethod(scheme, "folder", name, "exact", linears)
    config: Any = SimpleNamespace(get_quant_method=lambda layer, prefix: method)
    with parallel_rank(rank, ranks):
        layer: LinearBase = kind(*sizes, bias=False, quant_config=config, prefix="layer")
    return layer


def load(layer: LinearBase, tensors: Stored, shard_id: Any = None) -> None:
    """Load tensors as a model's class does; scalars have the shape that the strict reader gives them."""
    for name, tensor in tensors.items():
        parameter: Any = layer.get_parameter(name)
        loaded = tensor.reshape(1) if tensor.dim() == 0 else tensor
        parameter.weight_loader(parameter, loaded, *(() if shard_id is None else (shard_id,)))


def weight_of(layer: Any) -> torch.Tensor:
    """Return the dense weight of this rank."""
    method = layer.quant_method
    return torch.cat([dense_weight(method.scheme, shard) for shard in method._shards(layer)])


def rows_of(weight: torch.Tensor, sizes: Sequence[int], rank: int, ranks: int) -> torch.Tensor:
    """Return the rows of one rank: a slice of every partition."""
    return torch.cat([part.chunk(ranks)[rank] for part in weight.split(list(sizes))])


RANKS = [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
@pytest.mark.parametrize("name", FORMATS)
def test_one_stored_layer_for_q_k_and_v(name: str, rank: int, ranks: int) -> None:
    """Every rank holds its heads of q, of k and of v."""
    scheme = scheme_of(name, rank=4)
    stored = store(scheme, sum(QKV), seed=1)
    layer = build(QKVParallelLinear, (K, HEAD, HEADS, KV_HEADS), scheme, [sum(QKV)], rank, ranks)
    if name == "fp8_block" and ranks > 1:
        with pytest.raises(ValueError, match="N = 192 cuts through blocks of 128"):
            load(layer, stored)
        return
    load(layer, stored)
    assert torch.equal(weight_of(layer), rows_of(dense_weight(scheme, stored), QKV, rank, ranks))


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
@pytest.mark.parametrize("name", ["nvfp4_w4a8", "int4_awq_w4a8"])
def test_a_class_that_splits_q_k_and_v_itself(name: str, rank: int, ranks: int) -> None:
    """Pieces of one stored layer end where the whole of it would."""
    scheme = scheme_of(name)
    stored = store(scheme, sum(QKV), seed=2)
    layer = build(QKVParallelLinear, (K, HEAD, HEADS, KV_HEADS), scheme, [sum(QKV)], rank, ranks)
    for shard_id, start, rows in (("q", 0, 256), ("k", 256, 128), ("v", 384, 128)):
        entries = {spec.name: spec.dims[0].per for spec in scheme.tensors if spec.dims and spec.dims[0].axis == "N"}
        piece = {
            tensor: value.narrow(0, start // entries[tensor], rows // entries[tensor]) if tensor in entries else value
            for tensor, value in stored.items()
        }
        load(layer, piece, shard_id)
    assert torch.equal(weight_of(layer), rows_of(dense_weight(scheme, stored), QKV, rank, ranks))


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
@pytest.mark.parametrize("name", FORMATS)
def test_uneven_layers_under_several_ids(name: str, rank: int, ranks: int) -> None:
    """Qwen3.5's ``in_proj_qkvz`` is stored as one layer for three partitions, and one for the fourth, each with its scales."""
    scheme = scheme_of(name)
    first, second = store(scheme, sum(GDN[:3]), seed=3), store(scheme, GDN[3], seed=4)
    layer = build(MergedColumnParallelLinear, (K, list(GDN)), scheme, [sum(GDN[:3]), GDN[3]], rank, ranks)
    if name == "fp8_block" and ranks > 1:
        with pytest.raises(ValueError, match="N = 64 cuts through blocks of 128"):
            load(layer, first, (0, 1, 2))
        return
    load(layer, first, (0, 1, 2))
    load(layer, second, 3)
    whole = torch.cat([dense_weight(scheme, first), dense_weight(scheme, second)])
    assert torch.equal(weight_of(layer), rows_of(whole, GDN, rank, ranks))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", [ReplicatedLinear, ColumnParallelLinear])
def test_several_stored_layers_for_one_partition(kind: Any, name: str) -> None:
    """DeepSeek's class concatenates two stored layers; each keeps its scales and its smoothing."""
    scheme = scheme_of(name)
    parts = [store(scheme, rows, seed=5 + rows) for rows in (128, 96)]
    layer = build(kind, (K, 224), scheme, [128, 96])
    fused = {
        tensor: torch.cat([part[tensor].reshape(1) if part[tensor].dim() == 0 else part[tensor] for part in parts])
        for tensor in parts[0]
    }
    load(layer, fused)
    assert torch.equal(weight_of(layer), torch.cat([dense_weight(scheme, part) for part in parts]))


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
@pytest.mark.parametrize("name", FORMATS)
def test_input_features_of_a_rank(name: str, rank: int, ranks: int) -> None:
    scheme = scheme_of(name, rank=4)
    stored = store(scheme, 128, seed=6)
    layer = build(RowParallelLinear, (K, 128), scheme, [128], rank, ranks)
    load(layer, stored)
    assert torch.equal(weight_of(layer), dense_weight(scheme, stored).chunk(ranks, dim=1)[rank])


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_an_absorbed_layer_is_dense_and_can_be_loaded_again(rank: int, ranks: int) -> None:
    """``kv_b_proj`` is the weight that its tensors stand for, in the model's type, before and after an update from disk."""
    scheme = scheme_of("nvfp4_w4a8", rank=4)
    layer = build(ColumnParallelLinear, (K, 256), scheme, [256], rank, ranks, name="attention.kv_b_proj")
    method: Any = layer.quant_method
    assert method.is_absorbed
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(8))
    for seed in (1, 2):
        method.restore_weights_before_loading(layer)
        stored = store(scheme, 256, seed)
        load(layer, stored)
        method.decode(layer)
        method.verified = True
        method.process_weights_after_loading(layer)
        expected = dense_weight(scheme, stored).chunk(ranks)[rank]
        assert [name for name, _ in layer.named_parameters()] == ["weight"]
        assert torch.equal(layer.get_parameter("weight"), expected)
        assert torch.equal(method.apply(layer, x), x @ expected.T)
    method.restore_weights_before_loading(layer)
    method.fill_dummy(layer)
    assert bool(torch.isfinite(layer.get_parameter("weight")).all())


class TestErrors:
    """What does not fit is an error where it is known first."""

    scheme = scheme_of("nvfp4_w4a8")

    @pytest.mark.parametrize("rows", [(512, 64), (64, 448), (200, 312)])
    def test_rows_of_no_partition(self, rows: tuple[int, int]) -> None:
        with pytest.raises(ModelOptExtError, match=r"layer.weight: expected N = \[256, 128, 128\]"):
            build(QKVParallelLinear, (K, HEAD, HEADS, KV_HEADS), self.scheme, rows)

    def test_parts_of_a_partition_that_ranks_split(self) -> None:
        with pytest.raises(ModelOptExtError, match=r"layer.weight: expected N = \[224\]"):
            build(ColumnParallelLinear, (K, 224), self.scheme, [128, 96], 0, 2)

    def test_one_scale_for_two_stored_layers(self) -> None:
        layer = build(ReplicatedLinear, (K, 224), self.scheme, [128, 96])
        with pytest.raises(ValueError, match="one value for each of 2 stored layers expected, 1 stored"):
            load(layer, {"weight_scale_2": torch.ones(())})

    def test_another_shape(self) -> None:
        layer = build(QKVParallelLinear, (K, HEAD, HEADS, KV_HEADS), self.scheme, [512])
        with pytest.raises(ValueError, match=r"shape \[512, 128\] expected, \[256, 128\] stored"):
            load(layer, {"weight": torch.zeros(256, 128, dtype=torch.uint8)})
        with pytest.raises(ValueError, match=r"adjacent shards of 3 expected, \(0, 2\) given"):
            load(layer, {"weight": torch.zeros(384, 128, dtype=torch.uint8)}, (0, 2))

    def test_a_class_that_slices_by_itself(self) -> None:
        class Own(ColumnParallelLinear):
            def weight_loader(self, *args: Any) -> None:
                raise NotImplementedError

        with pytest.raises(ModelOptExtError, match="got Own, which slices by itself"):
            build(Own, (K, 128), self.scheme, [128])
