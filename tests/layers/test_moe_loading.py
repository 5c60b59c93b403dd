"""Loading a mixture of experts: strictly, with dummy weights, and not at all where a layer asks for what is not computed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.config import ModelOptExtConfig
from sglang_modelopt_ext.integration.loading import StrictLoad
from sglang_modelopt_ext.integration.moe_method import ExtFusedMoEMethod
from sglang_modelopt_ext.schemes.table import UMBRELLA
from tests.layers.moe_harness import build, published, run
from tests.layers.test_moe import W4A8, routing
from tests.support import edits
from tests.support.exports import Variant, export
from tests.support.models import MOE_FAMILIES, Family, model_dir
from tests.support.moe import EXPERTS, TOP_K, tiny


@pytest.fixture(autouse=True)
def mxfp4_rounds_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")


@pytest.mark.parametrize("theirs", [None, "file: norm: expected a tensor, got none"])
def test_ranks_exchange_what_they_used_and_their_faults(theirs: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose own part is in order ends with the fault of another, and counts what others used."""
    from sglang.srt.distributed import parallel_state

    folder = export(model_dir(tiny("qwen3_moe")), W4A8)
    checkpoint = read_checkpoint(folder)

    def gather(found: list[tuple[set[str], str | None]], mine: tuple[set[str], str | None], group: object) -> None:
        del group
        found[:] = [mine, ({"model.norm.weight"}, theirs)]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(parallel_state, "get_world_group", lambda: SimpleNamespace(cpu_group=None))
    strict = StrictLoad(torch.nn.Module(), checkpoint)
    strict.used = checkpoint.tensors.keys() - {"model.norm.weight"}
    if theirs is None:
        strict.run(lambda weights: None, ())
        return
    with pytest.raises(ModelOptExtError, match=f"^{theirs}$"):
        strict.run(lambda weights: None, ())


class TestStrictLoading:
    """Errors that only loading reveals."""

    def check(self, tmp_path: Path, change: edits.Edit, message: str, recipe: str = W4A8) -> None:
        folder = edits.copy_with(export(model_dir(tiny("qwen3_moe")), recipe), tmp_path / "checkpoint", [change])
        with pytest.raises(ModelOptExtError, match=message):
            build(folder)

    def test_block_scale(self, tmp_path: Path) -> None:
        def spoil(scale: torch.Tensor) -> torch.Tensor:
            raw = scale.view(torch.uint8).clone()
            raw[1, 1] = 0x7F
            return raw.view(scale.dtype)

        change = edits.map_tensors("*1.mlp.experts.2.up_proj.weight_scale", spoil)
        self.check(tmp_path, change, r"experts\.2\.up_proj\.weight_scale: .*NaN")

    def test_zero_block(self, tmp_path: Path) -> None:
        change = edits.map_tensors("*1.mlp.experts.2.down_proj.weight_scale", lambda t: torch.zeros_like(t))
        self.check(tmp_path, change, r"experts\.w2\.weight_scale: expected a zero block scale only over all-zero codes")

    def test_weights_beyond_float32(self, tmp_path: Path) -> None:
        change = edits.map_tensors("*0.mlp.experts.1.down_proj.weight_scale", lambda t: torch.full_like(t, 254))
        self.check(tmp_path, change, r"experts\.w2\.weight: .*beyond float32", "W4A8_MXFP4_FP8_CFG")

    def test_more_experts_than_the_model_has(self, tmp_path: Path) -> None:
        change = edits.set_fields(edits.CONFIG, {"num_experts": 3})
        self.check(tmp_path, change, r"mlp\.experts: expected 3 experts, as the model has it, got 4")

    def test_fewer_experts_than_the_model_has(self, tmp_path: Path) -> None:
        self.check(tmp_path, edits.drop_tensors("*.experts.3.*"), r"expected 4 experts, as the model has it, got 3")

    def test_experts_of_another_size(self, tmp_path: Path) -> None:
        change = edits.set_fields(edits.CONFIG, {"moe_intermediate_size": 512})
        self.check(tmp_path, change, r"mlp\.experts: expected 512 intermediate size, as the model has it, got 256")

    @pytest.mark.parametrize("short", [True, False])
    def test_unquantized_experts(self, tmp_path: Path, short: bool) -> None:
        """On a CPU SGLang would fill up a short expert with zeros, and not miss one that is not there."""
        pattern = "*1.mlp.experts.2.up_proj.weight"
        change = edits.map_tensors(pattern, lambda t: t[:-2]) if short else edits.drop_tensors(pattern)
        source = export(model_dir(tiny("qwen3_moe")), "FP8_DEFAULT_CFG", Variant(exclude=("*mlp*",)))
        message = (
            r"shape \[256, 256\] expected, \[254, 256\]" if short else r"w13_weight: expected a tensor for every shard"
        )
        with pytest.raises(ModelOptExtError, match=message):
            build(edits.copy_with(source, tmp_path / "checkpoint", [change]))

    def test_ranks_that_cut_through_blocks(self) -> None:
        """256 features over 16 ranks leave 16 to a rank, half a block of the down projection."""
        with pytest.raises(ModelOptExtError, match=r"experts\.w2_weight_scale: expected sizes per rank"):
            build(export(model_dir(tiny("qwen3_moe")), W4A8), rank=0, tp=16)


def config_of(folder: Path, with_checkpoint: bool = True) -> ModelOptExtConfig:
    config = read_quant_config(folder)
    assert config is not None
    return ModelOptExtConfig(UMBRELLA, config, read_checkpoint(folder) if with_checkpoint else None)


def fused_layer(config: ModelOptExtConfig, block: str = "mlp", **options: object) -> FusedMoE:
    arguments = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": 256, "intermediate_size": 256, "layer_id": 0}
    return FusedMoE(**(arguments | options), quant_config=config, prefix=f"model.layers.0.{block}.experts")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "situ"}, "activation: expected one of silu, gelu, gelu_tanh, relu2, got situ"),
        (
            {"activation": "gelu", "swiglu_limit": 7.0},
            "swiglu_limit: expected none for an activation other than a gated silu",
        ),
        (
            {"activation": "relu2", "is_gated": False},
            "experts: expected experts without a gate, as the model has them, got with one",
        ),
        ({"with_bias": True}, "experts: expected experts with a bias, as the model has them, got without one"),
        ({"no_combine": True, "inplace": False}, "no_combine: expected the sum"),
        (
            {"num_fused_shared_experts": 1, "num_experts": EXPERTS + 1},
            "mlp.shared_experts: expected W4A8_NVFP4_FP8 projections, .* or --disable-shared-experts-fusion, got unquantized ones",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(options: dict[str, object], message: str) -> None:
    config = config_of(export(model_dir(tiny("qwen3_moe")), W4A8))
    with published(), pytest.raises(ModelOptExtError, match=message):
        fused_layer(config, **options)


@pytest.mark.parametrize("recipe", [W4A8, "FP8_DEFAULT_CFG", "MXFP4_DEFAULT_CFG"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_dummy_weights(family: Family, recipe: str) -> None:
    """Without a checkpoint the configuration decides, under either name of the block."""
    folder = export(model_dir(tiny(family)), recipe)
    with published():
        experts = fused_layer(
            config_of(folder, with_checkpoint=False), {"mixtral": "block_sparse_moe"}.get(family, "mlp")
        )
        method = experts.quant_method
        assert isinstance(method, ExtFusedMoEMethod)
        method.fill_dummy(experts)
        method.process_weights_after_loading(experts)
        y = run(experts, torch.randn(5, 256), *routing(5))
    assert bool(torch.isfinite(y).all())


def test_sglang_reads_the_name_of_the_method() -> None:
    """With "ModelOpt" in it, block scales of FP4 weights would be loaded as scales of whole tensors."""
    assert "ModelOpt" not in ExtFusedMoEMethod.__name__
    assert "compressed" not in ExtFusedMoEMethod.__name__.lower()


def test_a_loader_that_bypasses_the_strict_reader_is_refused() -> None:
    config = config_of(export(model_dir(tiny("qwen3_moe")), W4A8))
    with published():
        experts = fused_layer(config)
    with pytest.raises(ModelOptExtError, match="a load through the strict reader"):
        experts.quant_method.process_weights_after_loading(experts)
