"""SGLang's own attention for a cache of ours: chosen by name only, by SGLang's rules, with the plan's scales, or rejected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.kv_cache import KVCachePlan, read_plan
from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv import hooks as kv_hooks
from sglang_modelopt_ext.integration.kv import wrapped
from tests.support import edits
from tests.support.kv_exports import PRESETS, kv_export
from tests.support.models import TinyModel, model_dir

D = 64
TRT, FLASH = "trtllm_mha", "flashinfer"


@pytest.fixture(autouse=True)
def _blackwell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make SGLang and this package see a Blackwell GPU; there is none here."""
    from sglang.srt.runtime_context import override_platform

    monkeypatch.setattr(Device, "here", lambda: Device.cuda(100))
    with override_platform(is_sm100=True):
        yield


def arguments(recipe: str | None, **fields: Any) -> Any:
    from sglang.srt.server_args import ServerArgs

    folder = model_dir(TinyModel()) if recipe is None else kv_export(recipe)
    return ServerArgs(**{"model_path": str(folder), "device": "cuda", **fields})


def loaded(recipe: str) -> KVCachePlan | None:
    """Return the plan of an export, scales included."""
    folder = kv_export(recipe)
    return read_plan(folder, read_quant_config(folder), "auto")


def settled(args: Any) -> tuple[str, str | None, str | None]:
    """Return the declarations of our step: SGLang's flag, the attention backend, and the recipe around its cache."""
    from sglang.srt.arg_groups.overrides import resolving_view

    kv_hooks.declare(args)
    view, plan = resolving_view(args), kv_hooks.wrapped_plan(args)
    return view.kv_cache_dtype, view.attention_backend, None if plan is None else plan.recipe.name


@pytest.mark.parametrize("backend", [TRT, FLASH])
@pytest.mark.parametrize("recipe", [recipe for recipe in PRESETS if recipe != "fp8"])
def test_named_by_the_user(recipe: str, backend: str) -> None:
    """SGLang's flag for the number format, and so its checks, pool and kernels; the recipe is found again from both flags."""
    own = {"fp8": "fp8_e4m3", "nvfp4": "nvfp4"}[recipe.partition("_")[0]]
    flags = {"kv_cache_dtype": f"modelopt_{recipe}"} if recipe == "nvfp4_rotate" else {}
    assert settled(arguments(recipe, attention_backend=backend, **flags)) == (own, backend, recipe)
    for phase in ("prefill", "decode"):
        args = arguments(recipe, **{f"{phase}_attention_backend": backend}, **flags)
        assert settled(args) == (own, None, recipe)
        assert settled(args) == (own, None, recipe), "a second resolution"


def test_a_checkpoint_that_is_none_for_our_flag_any_more(tmp_path: Path) -> None:
    """A download after the flags were settled: SGLang's cache without the bias or rotation is another one."""
    folder = edits.copy_with(kv_export("nvfp4_rotate"), tmp_path / "model")
    args = arguments(None, model_path=str(folder), attention_backend=TRT, kv_cache_dtype="modelopt_nvfp4_rotate")
    assert settled(args)[2] == "nvfp4_rotate"
    edits.set_file_config({"kv_cache_quant_algo": "FP8"})(folder)
    edits.set_embedded_config({"kv_cache_scheme": "FP8", "kv_cache_quant_algo": "FP8"})(folder)
    with pytest.raises(ModelOptExtError, match="--kv-cache-dtype: expected auto, modelopt_fp8"):
        kv_hooks.wrapped_plan(args)


def test_never_by_itself() -> None:
    """Without a name, on a CPU, or with the name of ours: the kernels of this package."""
    assert settled(arguments("fp8_affine")) == ("modelopt_fp8_affine", "triton", None)
    assert settled(arguments("nvfp4_affine", attention_backend="triton")) == ("modelopt_nvfp4_affine", "triton", None)
    on_cpu = arguments("nvfp4_affine", device="cpu", attention_backend=FLASH)
    assert settled(on_cpu) == ("modelopt_nvfp4_affine", FLASH, None)
    with pytest.raises(ModelOptExtError, match="expected torch_native or triton with --kv-cache-dtype modelopt_nvfp4"):
        kv_hooks.check_backends(on_cpu)


def test_plain_caches_have_nothing_around_them() -> None:
    assert settled(arguments("fp8", attention_backend=TRT)) == ("auto", TRT, None)
    assert settled(arguments("nvfp4", attention_backend=TRT, kv_cache_dtype="nvfp4")) == ("nvfp4", TRT, None)
    assert settled(arguments(None, attention_backend=TRT)) == ("auto", TRT, None)
    assert settled(arguments(None, attention_backend=TRT, kv_cache_dtype="modelopt_fp8")) == ("fp8_e4m3", TRT, None)


def test_a_mixture_of_ours_and_sglangs_is_refused() -> None:
    args = arguments("fp8_affine", prefill_attention_backend="triton", decode_attention_backend=TRT)
    assert settled(args) == ("fp8_e4m3", None, "fp8_affine")
    with pytest.raises(
        ModelOptExtError,
        match="expected flashinfer or trtllm_mha with --kv-cache-dtype modelopt_fp8_affine, got triton",
    ):
        kv_hooks.check_backends(args)


def test_what_was_not_worked_out_is_refused() -> None:
    args = arguments("fp8_affine", attention_backend=TRT, enable_hierarchical_cache=True)
    with pytest.raises(
        ModelOptExtError, match=r"--enable-hierarchical-cache: expected it unset .* it has not been tested with a bias"
    ):
        kv_hooks.declare(args)


def test_nvfp4_before_blackwell_is_refused() -> None:
    from sglang.srt.runtime_context import override_platform

    with override_platform(is_sm100=False, is_sm120=False):
        assert settled(arguments("fp8_affine", attention_backend=FLASH))[0] == "fp8_e4m3"
        with pytest.raises(ModelOptExtError, match="triton for a KV cache of nvfp4_affine on a GPU other than SM100"):
            kv_hooks.declare(arguments("nvfp4_affine", attention_backend=FLASH))


@pytest.mark.parametrize(
    ("asked", "sm100", "expected"),
    [(TRT, True, (TRT, TRT)), (FLASH, True, (FLASH, TRT)), (FLASH, False, (FLASH, TRT)), (TRT, False, None)],
)
def test_sglang_goes_on_with_its_own_rules(asked: str, sm100: bool, expected: tuple[str, str] | None) -> None:
    """NVFP4: decode is TensorRT-LLM's, prefill what was asked for, and native prefill is for SM100 alone."""
    from sglang.srt.arg_groups.kv_cache_hook import handle_nvfp4_prefill_kv_dequant_dtype
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
    from sglang.srt.runtime_context import override_platform

    args = arguments("nvfp4_affine", attention_backend=asked)
    with override_platform(is_sm100=sm100, is_sm120=not sm100):
        kv_hooks.declare(args)
        if expected is None:
            with pytest.raises(ValueError, match="requires SM100"):
                handle_nvfp4_prefill_kv_dequant_dtype(args)
            return
        handle_nvfp4_prefill_kv_dequant_dtype(args)
    assert attention_backends_of(resolved_view(args)) == expected


def tree(logit_cap: float = 0.0) -> torch.nn.Module:
    """Return the attention layers of a model where SGLang has them, those of the tiny exports."""
    from sglang.srt.layers.radix_attention import RadixAttention

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.anchor = torch.nn.Parameter(torch.zeros(1))
    model.model.layers = torch.nn.ModuleList()
    for index in range(2):
        layer = torch.nn.Module()
        layer.self_attn = torch.nn.Module()
        layer.self_attn.attn = RadixAttention(4, D, 1.0, 2, index, logit_cap=logit_cap)
        model.model.layers.append(layer)
    return model


def configured(
    monkeypatch: pytest.MonkeyPatch, args: Any, model: torch.nn.Module, sm100: bool = True, is_draft: bool = False
) -> Any:
    """Return SGLang's NVFP4 method, or None for FP8, after our step between the model and the pool."""
    import sglang.srt.runtime_context as context
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import NVFP4KVCacheMethod

    with context.override_platform(is_sm100=sm100, is_sm120=not sm100):
        kv_hooks.declare(args)
    flag = resolved_view(args).kv_cache_dtype
    method = NVFP4KVCacheMethod(num_layers=2, device="cpu", native_scale_layout=False) if flag == "nvfp4" else None
    monkeypatch.setattr(context, "get_parallel", lambda: SimpleNamespace(attn_tp_rank=0, attn_tp_size=1))
    monkeypatch.setattr(context, "get_server_args", lambda: args)
    config = SimpleNamespace(dtype=torch.bfloat16, head_dim=D, model_path="test", is_draft_model=is_draft)
    itself = SimpleNamespace(kv_cache_dtype_str=flag, model=model, model_config=config, device="cuda")
    with context.override_platform(is_sm100=sm100, is_sm120=not sm100):
        return kv_hooks._build_mha_quant_method(lambda self, num_layers: method, itself, num_layers=2)


@pytest.mark.parametrize("given", ["auto", "nvfp4", "modelopt_nvfp4_rotate"])
def test_the_plans_scales_reach_sglangs_nvfp4_cache(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """Under SGLang's own flag as well, and not on the layers."""
    model = tree()
    method = configured(monkeypatch, arguments("nvfp4", attention_backend=TRT, kv_cache_dtype=given), model)
    plan = loaded("nvfp4")
    assert plan is not None
    for index in range(2):
        layer = plan.layer(index)
        assert method.get_bmm_scales(index) == pytest.approx((layer.k_scale * 6, layer.v_scale * 6), rel=1e-12)
        assert model.model.layers[index].self_attn.attn.k_scale_float == 1.0


def test_the_targets_scales_do_not_reach_a_drafts_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft's layers have the numbers of target layers."""
    method = configured(monkeypatch, arguments("nvfp4", kv_cache_dtype="nvfp4"), tree(), is_draft=True)
    assert method.k_scales_float == type(method)(2, "cpu", native_scale_layout=False).k_scales_float


def test_by_flag_on_a_model_that_nobody_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(None, attention_backend=FLASH, kv_cache_dtype="modelopt_nvfp4_rotate")
    method = configured(monkeypatch, args, tree(), sm100=False)
    assert method.get_bmm_scales(1) == (448 / 2688, 448 / 2688)


def test_the_plans_scales_reach_sglangs_fp8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.utils

    model, lines = tree(), []
    monkeypatch.setattr(sglang.srt.utils, "log_info_on_rank0", lambda logger, line: lines.append(line))
    assert configured(monkeypatch, arguments("fp8_affine", attention_backend=TRT), model) is None
    plan = loaded("fp8_affine")
    assert plan is not None
    attention = model.model.layers[1].self_attn.attn
    assert attention.k_scale_float == plan.layer(1).k_scale
    assert float(attention.v_scale) == pytest.approx(plan.layer(1).v_scale, rel=1e-7)
    assert lines == [
        "modelopt_ext: KV cache fp8_affine, hf_quant_config.json, scales read as amax / 448; "
        "prefill by trtllm_mha of SGLang, queries rounded to E4M3 without a scale; "
        "decode by trtllm_mha of SGLang, queries rounded to E4M3 without a scale; not run on hardware yet"
    ]


def test_models_that_cannot_be_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("fp8_affine", attention_backend=TRT)
    with pytest.raises(ModelOptExtError, match=r"a logit cap, got model.layers.0.self_attn"):
        configured(monkeypatch, args, tree(logit_cap=30.0))
    sinks = tree()
    sinks.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ModelOptExtError, match="expected triton for a quantized KV cache with attention sinks"):
        configured(monkeypatch, args, sinks)


def test_the_backend_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.runtime_context

    class Stock:
        def forward_decode(self) -> None: ...
        def forward_extend(self) -> None: ...

    monkeypatch.setattr(
        sglang.srt.runtime_context, "get_parallel", lambda: SimpleNamespace(attn_tp_rank=0, attn_tp_size=1)
    )
    model = tree()
    for recipe, wraps in (("fp8", False), ("fp8_affine", True)):
        args = arguments(recipe, attention_backend=TRT)
        kv_hooks.declare(args)
        runner = SimpleNamespace(server_args=args, model=model, device="cpu")
        made = kv_hooks._wrapped_backend(lambda runner: Stock(), runner)
        assert type(made) is Stock
        assert isinstance(made.forward_decode, wrapped.WrappedForward) == wraps
        assert isinstance(made.forward_extend, wrapped.WrappedForward) == wraps
        if wraps:
            assert made.forward_decode.layers.keys() == {0, 1}
