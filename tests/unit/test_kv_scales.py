"""The scales of a KV cache, from a checkpoint's tensors to the attention layers that a model has."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.kv_cache import KVCachePlan, read_plan
from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv import hooks as kv_hooks
from sglang_modelopt_ext.integration.kv import scales as kv_scales
from sglang_modelopt_ext.integration.kv.layers import rank_layers, served_attention
from tests.support.kv_exports import kv_export
from tests.support.kv_runtime import Runtime, plain_names, weights
from tests.support.kv_trees import attention_model, attention_tree, kv_folder, layers, scales_of, stored_attention

UNSET = (-1.0, -1.0)


def plan_of(folder: Path, flag: str = "auto") -> KVCachePlan:
    found = read_plan(folder, read_quant_config(folder), flag)
    assert found is not None
    return found


def text_model(scales: bool = True) -> torch.nn.Module:
    return attention_model(scales=scales)


def with_tower() -> torch.nn.Module:
    places = [(f"language_model.model.layers.{i}.self_attn.attn", i) for i in range(2)]
    return attention_tree(places, scales=True, others=["vision_tower.encoder.layers.0.qkv"])


def hybrid() -> torch.nn.Module:
    """Return a Qwen3-Next: attention in every second layer, and no module is called ``self_attn``."""
    return attention_tree([(f"model.layers.{i}.attn", i) for i in (1, 3)], scales=True)


def mamba() -> torch.nn.Module:
    return attention_tree([(f"model.layers.{i}.mixer.attn", i) for i in (2, 5)], scales=True)


PLACES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, torch.Tensor]]] = {
    "usual": (text_model, layers("model.layers.{}.self_attn", (0, 1))),
    "a vision tower": (
        with_tower,
        layers("language_model.model.layers.{}.self_attn", (0, 1))
        | stored_attention("vision_tower.encoder.layers.0.self_attn", None, None),
    ),
    "a calibrated vision tower of more layers": (
        with_tower,
        layers("model.language_model.layers.{}.self_attn", (0, 1))
        | {
            name: tensor + 7
            for name, tensor in layers("model.vision_tower.encoder.layers.{}.self_attn", (0, 1, 2)).items()
        },
    ),
    "an MTP block with a number": (
        text_model,
        layers("model.layers.{}.self_attn", (0, 1)) | stored_attention("model.layers.2.self_attn", None, None),
    ),
    "an MTP block beside the model": (
        text_model,
        layers("model.layers.{}.self_attn", (0, 1)) | stored_attention("mtp.layers.0.self_attn", 9.0, 9.0),
    ),
    "linear attention between": (hybrid, layers("model.layers.{}.self_attn", (1, 3))),
    "another name of the decoder": (
        mamba,
        layers("backbone.layers.{}.mixer", (2, 5)) | stored_attention("mtp.layers.0.mixer", None, None),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_scales_find_their_layer_by_its_number(place: str, tmp_path: Path) -> None:
    make, tensors = PLACES[place]
    model, plan = make(), plan_of(kv_folder(tmp_path / "model", tensors))
    done = kv_scales.set_stock_scales(model, plan)
    expected = {name: (0.5 + number, 0.25 + number) for number, name in served_attention(model).layers.items()}
    assert scales_of(model) == expected
    # For a cache of ours: nothing that the model lacks is asked for.
    assert plan.resolve(served_attention(model)).layers.keys() == served_attention(model).layers.keys()
    assert len(done) == 2 * len(expected), "what the model is not to see any more"


def test_a_tower_alone_is_not_taken_for_the_decoder(tmp_path: Path) -> None:
    tower = layers("vision_tower.encoder.layers.{}.self_attn", (0, 1))
    model, plan = with_tower(), plan_of(kv_folder(tmp_path / "model", tower))
    assert kv_scales.set_stock_scales(model, plan) == frozenset()
    assert set(scales_of(model).values()) == {UNSET}
    with pytest.raises(ModelOptExtError, match=r"layers.0.self_attn: k_scale: expected one for every attention"):
        plan.resolve(served_attention(model))


def test_layers_that_share_a_cache(tmp_path: Path) -> None:
    """Gemma 3n and Gemma 4: the last layers read the keys and values of others, and may have unused projections."""
    places = [("model.layers.0.self_attn.attn", 0), ("model.layers.1.self_attn.attn", 0)]
    model = attention_tree(places, scales=True)
    tensors = stored_attention("model.layers.0.self_attn", 0.5, 0.25) | stored_attention(
        "model.layers.1.self_attn", None, None
    )
    plan = plan_of(kv_folder(tmp_path / "model", tensors, num_kv_shared_layers=1))
    kv_scales.set_stock_scales(model, plan)
    assert set(scales_of(model).values()) == {(0.5, 0.25)}
    assert rank_layers(model, plan.resolve(served_attention(model)).layers, 0, 1).keys() == {0}
    assert plan.layers.keys() == {0}, "and without a model"


def test_keys_that_are_the_values(tmp_path: Path) -> None:
    """Gemma 4 without ``v_proj``: one scale for both, like in SGLang; a lost ``v_scale`` beside a ``v_proj`` is an error."""
    for values, expected in ((False, (1.5, 1.5)), (True, UNSET)):
        tensors = layers("model.layers.{}.self_attn", (0,))
        tensors |= stored_attention("model.layers.1.self_attn", 1.5, None, values=values)
        model, plan = text_model(), plan_of(kv_folder(tmp_path / str(values), tensors))
        kv_scales.set_stock_scales(model, plan)
        assert scales_of(model)["model.layers.1.self_attn"] == expected
        if values:
            with pytest.raises(ModelOptExtError, match=r"layers.1.self_attn: v_scale: expected one for every"):
                plan.resolve(served_attention(model))
        else:
            assert plan.resolve(served_attention(model)).layers[1].v_scale == 1.5


def test_excluded_layers_do_not_count(tmp_path: Path) -> None:
    tensors = layers("model.layers.{}.self_attn", (0,)) | stored_attention("model.layers.1.self_attn", None, None)
    strict = plan_of(kv_folder(tmp_path / "all", tensors))
    with pytest.raises(ModelOptExtError, match="k_scale: expected one for every attention layer"):
        strict.resolve(served_attention(text_model()))
    plan = plan_of(kv_folder(tmp_path / "excluded", tensors, exclude=["model.layers.1*"]))
    found = plan.resolve(served_attention(text_model()))
    assert (found.layers[0].k_scale, found.layers[1].k_scale) == (0.5, 1.0)
    assert found.default == {1}


BROKEN = {
    "nan": {"model.layers.1.self_attn.k_proj.k_scale": torch.tensor(float("nan"))},
    "two values": {"model.layers.1.self_attn.k_proj.k_scale": torch.ones(2)},
    "integers": {"model.layers.1.self_attn.v_proj.v_scale": torch.ones(1, dtype=torch.int32)},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_nothing_is_fatal_for_a_cache_of_sglangs_own(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = layers("model.layers.{}.self_attn", (0, 1)) | BROKEN[fault]
    model, plan = text_model(), plan_of(kv_folder(tmp_path / "model", tensors))
    with caplog.at_level(logging.WARNING):
        done = kv_scales.set_stock_scales(model, plan)
    assert scales_of(model) == {
        "model.layers.0.self_attn": (0.5, 0.25),
        "model.layers.1.self_attn": UNSET,
    }
    assert not any("layers.1" in name for name in done), "SGLang's model gets those"
    assert "are left to SGLang" in caplog.text
    with pytest.raises(ModelOptExtError, match=r"layers.1.self_attn"):
        plan.resolve(served_attention(model))


# From the loader


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return Runtime(monkeypatch)


@pytest.mark.parametrize("fault", [*BROKEN, "missing"])
def test_under_weights_of_ours_every_layer_has_its_scales(fault: str, runtime: Runtime, tmp_path: Path) -> None:
    """SGLang's pool holds the cache, and a remaining scale would be read by no one else."""
    tensors = layers("model.layers.{}.self_attn", (0, 1)) | BROKEN.get(fault, {})
    if fault == "missing":
        del tensors["model.layers.1.self_attn.k_proj.k_scale"]
    folder = kv_folder(tmp_path / "model", tensors)
    runtime.start(folder)
    with pytest.raises(ModelOptExtError, match=r"layers.1.self_attn"):
        runtime.load(text_model(), folder, weights(folder), quantization="modelopt_ext")
    runtime.load(text_model(), folder, weights(folder), quantization="modelopt_fp8")


@pytest.mark.parametrize("flag", ["auto", "fp8_e4m3"])
def test_a_loaded_fp8_cache(flag: str, runtime: Runtime, tmp_path: Path) -> None:
    folder = kv_folder(tmp_path / "model", layers("model.layers.{}.self_attn", (0, 1)))
    runtime.start(folder, flag)
    model = text_model()
    assert runtime.load(model, folder, weights(folder)) == plain_names(folder)
    assert scales_of(model)["model.layers.1.self_attn"] == (1.5, 1.25)
    # An update of the weights: the layers are set up, and the cache keeps what it has.
    attention = model.get_submodule("model.layers.1.self_attn.attn")
    attention.k_scale_float = 1.0
    attention.k_scale.data.fill_(1.0)
    assert runtime.load(model, folder, weights(folder)) == plain_names(folder)
    assert float(attention.k_scale) == 1.0


def test_a_loaded_nvfp4_cache_of_sglangs(runtime: Runtime, tmp_path: Path) -> None:
    folder = kv_folder(tmp_path / "model", layers("model.layers.{}.self_attn", (0, 1)), algo="NVFP4")
    runtime.start(folder, "nvfp4")
    model = text_model()
    assert runtime.load(model, folder, weights(folder)) == plain_names(folder)
    found = scales_of(model)["model.layers.1.self_attn"]
    assert found == pytest.approx((1.5 / 6, 1.25 / 6), rel=1e-7), "amax / 2688 of the stored amax / 448"


@pytest.mark.parametrize("flag", ["bf16", "fp8_e5m2", "mxfp8"])
def test_sglangs_own_flags_are_its_affair(flag: str, runtime: Runtime, tmp_path: Path) -> None:
    """No flag of SGLang's is an error on a GPU. Without quantization no scale reaches a layer: attention would multiply by it."""
    folder = kv_folder(tmp_path / "model", layers("model.layers.{}.self_attn", (0, 1)))
    runtime.start(folder, flag)
    assert runtime.model.kv_cache_dtype == flag
    model = text_model()
    handed = runtime.load(model, folder, weights(folder))
    assert handed == (plain_names(folder) if flag == "bf16" else [name for name, _ in weights(folder)])
    assert set(scales_of(model).values()) == {UNSET}


@pytest.mark.parametrize("flag", ["fp8_e4m3", "nvfp4", "fp8_e5m2"])
def test_scales_that_belong_to_a_bias_are_not_used_without_it(flag: str, runtime: Runtime) -> None:
    folder = kv_export("fp8_affine")
    runtime.start(folder, flag)
    assert runtime.model.kv_cache_dtype == flag
    model = text_model()
    assert runtime.load(model, folder, weights(folder)) == plain_names(folder)
    assert set(scales_of(model).values()) == {UNSET}


def test_a_drafts_layers_are_not_the_models(runtime: Runtime, tmp_path: Path) -> None:
    folder = kv_folder(tmp_path / "model", layers("model.layers.{}.self_attn", (0, 1)))
    runtime.start(folder)
    model = text_model()
    assert runtime.load(model, folder, weights(folder), is_draft_model=True) == [name for name, _ in weights(folder)]
    assert set(scales_of(model).values()) == {UNSET}


def test_a_cache_of_ours_is_checked_before_the_weights_are_read(runtime: Runtime, tmp_path: Path) -> None:
    tensors = layers("model.layers.{}.self_attn", (0,)) | stored_attention("model.layers.1.self_attn", None, None)
    folder = kv_folder(tmp_path / "model", tensors, algo="NVFP4")
    runtime.start(folder)
    assert runtime.model.kv_cache_dtype == "modelopt_nvfp4"
    with pytest.raises(ModelOptExtError, match=r"layers.1.self_attn: k_scale: expected one for every attention layer"):
        runtime.load(text_model(), folder, weights(folder))


def test_files_that_are_not_read_here(runtime: Runtime, tmp_path: Path) -> None:
    """Such as every tensor twice, in two formats: SGLang picks one, and its model loads the scales as it does alone."""
    folder = kv_folder(tmp_path / "model", layers("model.layers.{}.self_attn", (0, 1)))
    runtime.start(folder)
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    stored = weights(folder)
    assert runtime.load(text_model(), folder, stored) == [name for name, _ in stored]


def test_an_algorithm_nobody_knows(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang handles it in its own checkpoints; in one of ours it is rejected."""
    folder = kv_folder(tmp_path / "model", layers("model.layers.{}.self_attn", (0, 1)), algo="INT8")
    monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))
    runtime.start(folder)
    assert runtime.model.kv_cache_dtype == "auto"
    monkeypatch.setattr(Device, "here", lambda: Device.cpu())
    with pytest.raises(ModelOptExtError, match="kv_cache_quant_algo: expected null or one of FP8"):
        runtime.start(folder)


def test_an_obstacle_to_a_cache_of_ours_leaves_sglangs_checkpoints_to_it(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang serves NVFP4 caches unrounded under ``auto``, with features that a cache of ours does not support."""
    folder = kv_folder(tmp_path / "model", layers("model.layers.{}.self_attn", (0, 1)), algo="NVFP4")
    monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))
    runtime.start(folder, enable_hierarchical_cache=True)
    assert runtime.model.kv_cache_dtype == "auto"
    assert runtime.load(text_model(), folder, weights(folder)) == plain_names(folder)
    with pytest.raises(ModelOptExtError, match="--enable-hierarchical-cache: expected it unset"):
        runtime.start(folder, "modelopt_nvfp4", enable_hierarchical_cache=True)
    with pytest.raises(ModelOptExtError, match="--enable-hierarchical-cache: expected it unset"):
        runtime.start(kv_export("nvfp4_affine", "llama", "FP8_DEFAULT_CFG"), enable_hierarchical_cache=True)


HYBRID = {
    "windows": {"architectures": ["MellumForCausalLM"], "model_type": "mellum"},
    "linear attention": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M*",
        "layers_block_type": ["mamba", "attention"],
    },
}


@pytest.mark.parametrize("kind", HYBRID)
def test_a_model_that_has_no_pool_of_ours_is_left_to_sglang(
    kind: str, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ``auto``, where SGLang serves the weights: hybrid models under its attention, wrapped, and any that is unserved."""
    tensors = layers("model.layers.{}.self_attn", (0, 1))
    folder = kv_folder(tmp_path / "model", tensors, algo="NVFP4", **HYBRID[kind])
    monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))
    for attention, expected in ((None, "modelopt_nvfp4"), ("trtllm_mha", "auto")):
        runtime.start(folder, attention_backend=attention)
        assert runtime.model.kv_cache_dtype == expected
    monkeypatch.setattr(kv_hooks, "unserved_pool", lambda config, wrapped, several: "any kind")
    runtime.start(folder)
    assert runtime.model.kv_cache_dtype == "auto"


@pytest.mark.parametrize("kind", HYBRID)
def test_a_hybrid_cache_by_name(kind: str, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = layers("model.layers.{}.self_attn", (0, 1))
    folder = kv_folder(tmp_path / "model", tensors, algo="NVFP4", **HYBRID[kind])
    monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))
    runtime.start(folder, flag="modelopt_nvfp4")
    assert runtime.model.kv_cache_dtype == "modelopt_nvfp4"


@pytest.mark.parametrize("name", kv_hooks.NOT_BY_TRITON)
def test_a_model_that_sglang_rejects_with_triton(
    name: str, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to SGLang where it serves the weights, and an error where a cache of ours is asked for."""
    tensors = layers("model.layers.{}.self_attn", (0, 1))
    folder = kv_folder(tmp_path / "model", tensors, algo="NVFP4", architectures=[name], model_type="lfm2")
    monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))
    runtime.start(folder)
    assert runtime.model.kv_cache_dtype == "auto"
    with pytest.raises(ModelOptExtError, match=f"expected bf16 for {name}, .* triton attention, got modelopt_nvfp4"):
        runtime.start(folder, flag="modelopt_nvfp4")
