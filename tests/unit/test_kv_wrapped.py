"""Bias and rotation around SGLang's own attention: the algebra against float64, and the rejected settings.

There is no Blackwell GPU here. SGLang's backends and pools are the real ones; PyTorch replaces the kernels they call
(``tests/support/sglang_attention.py``), so the tests cover the kernels' inputs and the use of their outputs.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.kv_scales import KVLayer
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv import wrapped
from sglang_modelopt_ext.integration.kv.layers import attention_layers, rank_layers
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES
from tests.support.kv import hadamard
from tests.support.recipes import round_nvfp4, to_e4m3
from tests.support.sglang_attention import (
    PAGE,
    Batch,
    Kernels,
    causal,
    decode_kv,
    flashinfer_backend,
    forward,
    make_pool,
    replace_kernels,
    softmax_product,
    trtllm_backend,
)

D, HEADS, QUERIES = 64, 2, 6
RANGE = {"fp8": 448.0, "nvfp4": 2688.0}
TRT, FLASH = "trtllm_mha", "flashinfer"
SERVED = [
    ("fp8_affine", TRT, TRT, True),
    ("nvfp4_affine", TRT, TRT, True),
    ("nvfp4_rotate", TRT, TRT, True),
    ("fp8_affine", FLASH, FLASH, False),
    ("fp8_affine", FLASH, TRT, False),
    ("nvfp4_affine", FLASH, TRT, False),
    ("nvfp4_rotate", FLASH, TRT, False),
    ("nvfp4_affine", FLASH, TRT, True),
    ("nvfp4_rotate", FLASH, TRT, True),
]
"""Recipe, prefill and decode backend, and whether the GPU is SM100 (SM103 counts as one) or SM120."""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return replace_kernels(monkeypatch)


class Scene:
    """One attention layer with its cache on SGLang's backends, and the same in float64 from unrounded keys and values."""

    def __init__(
        self,
        kernels: Kernels,
        recipe: str,
        backends: tuple[str, str],
        sm100: bool,
        ragged: bool = True,
        seed: int = 0,
        window: int = -1,
    ) -> None:
        self.recipe, self.backends, self.sm100, self.ragged, self.window = recipe, backends, sm100, ragged, window
        self.kernels = kernels
        self.number = recipe.partition("_")[0]
        self.random = torch.Generator().manual_seed(seed)
        bias = [3.0 * self.noise(HEADS, D) if "affine" in recipe else torch.zeros(HEADS, D) for _ in range(2)]
        self.bias = bias
        self.turn = hadamard(D) if "rotate" in recipe else torch.eye(D)
        self.raw = torch.zeros(2, 20 * PAGE, HEADS, D)
        amax = 5.0 if "affine" in recipe else 8.0
        self.scales = [amax / RANGE[self.number], 1.25 * amax / RANGE[self.number]]
        self.layer, self.plan_layers = self.make_layer()
        pool = make_pool(self.number == "nvfp4", backends, sm100, HEADS, D, pages=19)
        recipe_row = KV_RECIPES[recipe]
        if self.number == "nvfp4":
            wrapped.set_nvfp4_scales(pool.quant_method, self.model, self.plan_layers, sm100)
        else:
            wrapped.set_layer_scales(self.model, self.plan_layers)
        around = wrapped.around_layers(recipe_row, self.plan_layers, self.model, "cpu")
        kernels.native = self.number == "nvfp4" and sm100
        self.served = []
        for name in backends:
            flash = name == FLASH
            made = (
                flashinfer_backend(pool, kernels)
                if flash
                else trtllm_backend(pool, backends, sm100, QUERIES, torch.float32)
            )
            wrapped.wrap(made, around)
            self.served.append(made)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def make_layer(self) -> tuple[Any, dict[int, KVLayer]]:
        from sglang.srt.layers.radix_attention import RadixAttention

        self.model = torch.nn.Module()
        self.model.anchor = torch.nn.Parameter(torch.zeros(1))
        self.model.attn = RadixAttention(QUERIES, D, D**-0.5, HEADS, 0, sliding_window_size=self.window)
        affine = "affine" in self.recipe
        return self.model.attn, {0: KVLayer(*self.scales, *(self.bias if affine else (None, None)))}

    def run(self, slots: list[torch.Tensor], new: list[int], decode: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a pass with new queries, keys and values, and return the served and the float64 result, ``[T, Hq, D]``."""
        batch = Batch(slots, new)
        keys, values = (self.noise(sum(new), HEADS, D) + bias for bias in self.bias)
        queries = self.noise(sum(new), QUERIES, D)
        self.raw[0, batch.write], self.raw[1, batch.write] = keys, values
        backend = self.served[1 if decode else 0]
        given = queries.clone(), keys.clone(), values.clone()
        out = forward(backend, self.kernels, batch, self.layer, *given, decode, self.ragged)
        assert all(torch.equal(a, b) for a, b in zip(given, (queries, keys, values), strict=True)), (
            "the model's tensors"
        )
        parts = zip(slots, new, batch.parts(queries), strict=True)
        return out.view(-1, QUERIES, D), torch.cat([self.reference(q, at, count, decode) for at, count, q in parts])

    def cached(self, x: torch.Tensor, side: int) -> torch.Tensor:
        """Return ``x`` ``[N, H, D]`` read back from the pool, including its scale."""
        turned = x @ self.turn if side == 0 else x
        wide, scale = turned - self.bias[side], torch.tensor(self.scales[side])
        if self.number == "fp8":
            return to_e4m3(wide / scale) * scale
        values, step = round_nvfp4(wide, {"input_scale": scale * (6.0 if self.sm100 else 1.0)})
        return values * step

    def reference(self, q: torch.Tensor, slots: torch.Tensor, new: int, decode: bool) -> torch.Tensor:
        flash = self.backends[decode] == FLASH
        workspace = flash and not decode and self.number == "nvfp4"
        seen = []
        for side in range(2):
            x = self.raw[side, slots]
            stored = self.cached(x, side)
            turned = x @ self.turn if side == 0 else x
            if workspace:
                stored = to_e4m3(stored.bfloat16().float())
            if flash and not decode and (self.ragged or workspace):
                chunk = (turned - self.bias[side])[len(x) - new :]
                stored[len(x) - new :] = chunk if self.ragged else to_e4m3(chunk)
            back = stored.double() + self.bias[side].double()
            seen.append(back @ self.turn.double() if side == 0 else back)
        if not flash and self.sm100:
            q = to_e4m3(q @ self.turn) @ self.turn
        return softmax_product(q, *seen, D**-0.5, causal(new, len(slots), self.window))[0]

    def error(self, served: torch.Tensor, expected: torch.Tensor, decode: bool) -> float:
        """Return the worst error over its bound: float32 roundings, or those of an E4M3 output without its bias."""
        apart = (served.double() - expected).abs()
        fp8_output = self.number == "nvfp4" and self.sm100 and self.backends[decode] == TRT
        if not fp8_output:
            return float(apart.max() / (2e-6 * expected.abs().max()))
        own = (expected - self.bias[1].repeat_interleave(QUERIES // HEADS, 0).double()).abs()
        return float((apart / (2**-4 * own + 2**-10 + 1e-6 * expected.abs())).max())


def pages(*order: int) -> torch.Tensor:
    return (torch.tensor(order)[:, None] * PAGE + torch.arange(PAGE)).flatten()


def whole_story(scene: Scene) -> dict[str, float]:
    """Run two prompts, the rest of the first beside a prompt that hits its first page, then three decoded tokens each."""
    first, second, third = pages(7, 2, 11), pages(4, 9), pages(7, 5, 1)
    errors = {}
    errors["prefill"] = scene.error(*scene.run([first[:20], second[:22]], [20, 22]), decode=False)
    errors["chunk and cache hit"] = scene.error(*scene.run([first[:37], third[:25]], [17, 9]), decode=False)
    for step in range(3):
        at = [first[: 38 + step], second[: 23 + step], third[: 26 + step]]
        errors[f"decode {step}"] = scene.error(*scene.run(at, [1, 1, 1], decode=True), decode=True)
    return errors


@pytest.mark.parametrize(("recipe", "prefill", "decode", "sm100"), SERVED)
def test_against_float64(kernels: Kernels, recipe: str, prefill: str, decode: str, sm100: bool) -> None:
    errors = whole_story(Scene(kernels, recipe, (prefill, decode), sm100))
    assert max(errors.values()) < 1.0, errors
    assert {name for name, _ in kernels.calls} >= {"ragged", "paged"} if prefill == FLASH else True


@pytest.mark.parametrize("recipe", ["fp8_affine", "nvfp4_affine", "nvfp4_rotate"])
def test_flashinfers_paged_prefill(kernels: Kernels, recipe: str) -> None:
    """The new tokens in the cache (FP8), or beside the cached prefix in its E4M3 copy (NVFP4)."""
    errors = whole_story(Scene(kernels, recipe, (FLASH, TRT), False, ragged=False))
    assert max(errors.values()) < 1.0, errors
    assert "ragged" not in {name for name, _ in kernels.calls}


@pytest.mark.parametrize("recipe", ["fp8_affine", "nvfp4_rotate"])
def test_sliding_windows(kernels: Kernels, recipe: str) -> None:
    errors = whole_story(Scene(kernels, recipe, (TRT, TRT), True, window=11))
    assert max(errors.values()) < 1.0, errors


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        ("fp8_affine", {"out_bias": None}),
        ("fp8_affine", {"k_bias": None}),
        ("nvfp4_affine", {"out_bias": None}),
        ("nvfp4_rotate", {"rotate": False}),
    ],
)
def test_a_fault_shows(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, recipe: str, fault: dict[str, Any]) -> None:
    stock = wrapped.around_layers
    monkeypatch.setattr(
        wrapped,
        "around_layers",
        lambda *args: {index: dataclasses.replace(layer, **fault) for index, layer in stock(*args).items()},
    )
    assert max(whole_story(Scene(kernels, recipe, (TRT, TRT), True)).values()) > 3.0


def test_the_heads_of_every_rank(kernels: Kernels) -> None:
    """Two KV heads over four ranks, each on two: a rank's output is its part of the whole model's."""
    from sglang.srt.layers.radix_attention import RadixAttention

    bias = [torch.randn(2, D, generator=torch.Generator().manual_seed(side)) for side in (1, 2)]
    numbers = {0: KVLayer(1.0, 1.0, *bias)}
    for rank in range(4):
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList([torch.nn.Module()])
        model.layers[0].self_attn = torch.nn.Module()
        model.layers[0].self_attn.attn = RadixAttention(2, D, 1.0, 1, 0)
        layers = rank_layers(model, numbers, rank, 4)
        around = wrapped.around_layers(KV_RECIPES["fp8_affine"], layers, model, "cpu")[0]
        assert around.k_bias is not None
        assert torch.equal(around.k_bias, bias[0][rank // 2 : rank // 2 + 1])
        expected = bias[1].repeat_interleave(4, 0)[2 * rank : 2 * rank + 2].flatten()
        assert torch.equal(around.output(torch.zeros(3, 2 * D)), expected.expand(3, -1))


@pytest.mark.parametrize(("recipe", "sm100"), [("fp8_affine", True), ("nvfp4_affine", False), ("nvfp4_affine", True)])
def test_beyond_the_calibrated_range(kernels: Kernels, recipe: str, sm100: bool) -> None:
    """Values beyond amax are clipped, even where SGLang's scale for SM100 allows six times that."""
    scene = Scene(kernels, recipe, (TRT if sm100 else FLASH, TRT), sm100)
    stock = scene.noise
    scene.noise = lambda *shape: 3.0 * stock(*shape)  # type: ignore[method-assign]
    layer = scene.plan_layers[0]
    slots, new = pages(3)[:4], [4]
    scene.run([slots], new)
    scene.kernels.calls.clear()
    scene.run([torch.cat([slots, pages(3)[4:5]])], [1], decode=True)
    (_, given) = scene.kernels.calls[-1]
    for side, values in enumerate(decode_kv(given["kv_cache"], given["kv_cache_sf"], scene.kernels.native)):
        scale = scene.scales[side] * (6.0 if sm100 and scene.number == "nvfp4" else 1.0)
        amax = (layer.k_scale, layer.v_scale)[side] * RANGE[scene.number]
        assert float((scene.raw[side, slots] - scene.bias[side]).abs().max()) > 1.2 * amax
        assert 0.9 * amax < float(values[slots].abs().max()) * scale <= amax * (1 + 1e-6)


def test_the_output_is_a_buffer_of_sglangs(kernels: Kernels) -> None:
    """The bias is added where SGLang asked for the output, not in a copy it does not look at."""
    out = torch.zeros(2, QUERIES * D)
    scene = Scene(kernels, "fp8_affine", (TRT, TRT), True)
    around = wrapped.around_layers(KV_RECIPES["fp8_affine"], scene.plan_layers, scene.model, "cpu")[0]
    assert around.output(out) is out
    assert out.abs().sum() > 0


@pytest.mark.parametrize("recipe", ["fp8_affine", "nvfp4_rotate"])
@pytest.mark.parametrize("dtype", wrapped.DTYPES)
def test_types_of_a_model_are_kept(kernels: Kernels, recipe: str, dtype: torch.dtype) -> None:
    """Computed in float32, rounded once to the model's type."""
    scene = Scene(kernels, recipe, (TRT, TRT), True)
    around = wrapped.around_layers(KV_RECIPES[recipe], scene.plan_layers, scene.model, "cpu")[0]
    around = dataclasses.replace(around, k_limit=100.0, v_limit=100.0)
    k, q, out = (scene.noise(5, heads, D).to(dtype) for heads in (HEADS, QUERIES, QUERIES))
    turn = scene.turn.double()
    for found, expected in (
        (around.keys(k), k.double() @ turn - scene.bias[0]),
        (around.values(k), k.double() - scene.bias[1]),
        (around.queries(q.flatten(1), D).view(q.shape), q.double() @ turn),
        (
            around.output(out.clone().flatten(1)).view(out.shape),
            out.double() + scene.bias[1].repeat_interleave(QUERIES // HEADS, 0),
        ),
    ):
        assert found.dtype == dtype
        step = torch.finfo(dtype).eps
        assert ((found.double() - expected).abs() <= step / 2 * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("name", ["forward_decode", "forward_extend"])
def test_sglangs_signatures(name: str) -> None:
    """Every class that may call or be called: ours goes between two of SGLang's own."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMHAAttnBackend

    wanted = ["q", "k", "v", "layer", "forward_batch", "save_kv_cache"]
    for backend in (AttentionBackend, FlashInferAttnBackend, HybridAttnBackend, TRTLLMHAAttnBackend):
        assert list(inspect.signature(getattr(backend, name)).parameters)[1:7] == wanted, backend
    assert list(inspect.signature(wrapped.WrappedForward.__call__).parameters)[1:7] == wanted


def test_extras_are_refused() -> None:
    layer = SimpleNamespace(layer_id=0, head_dim=D)
    call = wrapped.WrappedForward(lambda *args, **kwargs: torch.zeros(1), {})
    with pytest.raises(ModelOptExtError, match="expected a call without extras under a bias or a rotation, got sinks"):
        call(torch.zeros(1, D), None, None, layer, None, sinks=torch.zeros(2), k_rope=None)


def one_layer(**fields: Any) -> torch.nn.Module:
    from sglang.srt.layers.radix_attention import RadixAttention

    model = torch.nn.Module()
    model.attn = RadixAttention(4, D, 1.0, 2, 0, **fields)
    return model


def test_attention_that_is_refused() -> None:
    from sglang.srt.layers.radix_attention import AttentionType

    wrapped.check_attention(one_layer(sliding_window_size=8), torch.bfloat16)
    for fields, message in (
        ({"logit_cap": 30.0}, "a logit cap"),
        ({"is_cross_attention": True}, "attention that is no decoder's"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention that is no decoder's"),
    ):
        with pytest.raises(ModelOptExtError, match=message):
            wrapped.check_attention(one_layer(**fields), torch.bfloat16)
    with pytest.raises(ModelOptExtError, match=r"triton for a model of torch.float32"):
        wrapped.check_attention(one_layer(), torch.float32)


def test_a_range_that_flashinfers_prefill_has_not() -> None:
    recipe = KV_RECIPES["nvfp4_affine"]
    layers = {3: KVLayer(500 / 2688, 1 / 2688)}
    wrapped.check_range(recipe, layers, TRT)
    wrapped.check_range(recipe, {3: KVLayer(448 / 2688, 1.0 / 2688)}, FLASH)
    wrapped.check_range(KV_RECIPES["fp8_affine"], {3: KVLayer(500 / 448, 1.0)}, FLASH)
    with pytest.raises(ModelOptExtError, match="layer 3: k_scale, v_scale: expected an amax up to 448"):
        wrapped.check_range(recipe, layers, FLASH)


def test_scales_of_sglangs_nvfp4_cache() -> None:
    """In its method, where its kernels read them; a layer's own become 1, or FlashInfer's prefill would take them twice."""
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import NVFP4KVCacheMethod

    method = NVFP4KVCacheMethod(num_layers=2, device="cpu", native_scale_layout=False)
    layers, model = {0: KVLayer(0.5, 1.0), 1: KVLayer(0.25, 2.0)}, torch.nn.Module()
    model.first, model.second = one_layer().attn, one_layer().attn
    model.second.layer_id = 1
    model.anchor = torch.nn.Parameter(torch.zeros(1))
    for sm100, factor in ((False, 1.0), (True, 6.0)):
        wrapped.set_nvfp4_scales(method, model, layers, sm100)
        for _, module in attention_layers(model):
            assert (module.k_scale_float, module.v_scale_float, float(module.k_scale)) == (1.0, 1.0, 1.0)
        assert [method.get_bmm_scales(index) for index in range(2)] == [
            (0.5 * factor, factor),
            (0.25 * factor, 2 * factor),
        ]
        assert method.k_scales_gpu.tolist() == [0.5 * factor, 0.25 * factor]
        assert method.v_scales_gpu.tolist() == [factor, 2.0 * factor]


def test_scales_of_sglangs_fp8_cache() -> None:
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod

    for quantized in (False, True):
        model = one_layer()
        model.anchor = torch.nn.Parameter(torch.zeros(1))
        if quantized:
            BaseKVCacheMethod(SimpleNamespace()).create_weights(model.attn)
        wrapped.set_layer_scales(model, {0: KVLayer(0.5, 0.25)})
        assert (float(model.attn.k_scale), float(model.attn.v_scale)) == (0.5, 0.25)
        assert (model.attn.k_scale_float, model.attn.v_scale_float) == (0.5, 0.25)
        if quantized:  # as after an update of the weights
            BaseKVCacheMethod(SimpleNamespace()).process_weights_after_loading(model.attn)
            assert (model.attn.k_scale_float, model.attn.v_scale_float) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("recipe", "backends", "sm100", "expected"),
    [
        (
            "fp8_affine",
            (TRT, TRT),
            True,
            "prefill by trtllm_mha of SGLang, queries rounded to E4M3 without a scale; "
            "decode by trtllm_mha of SGLang, queries rounded to E4M3 without a scale",
        ),
        (
            "nvfp4_rotate",
            (FLASH, TRT),
            True,
            "prefill by flashinfer of SGLang, cached prefix read as E4M3 without a scale (up to 448); "
            "decode by trtllm_mha of SGLang, queries and outputs rounded to E4M3 without a scale",
        ),
        (
            "nvfp4_affine",
            (FLASH, TRT),
            False,
            "prefill by flashinfer of SGLang, cached prefix read as E4M3 without a scale (up to 448); "
            "decode by trtllm_mha of SGLang, queries unrounded",
        ),
        (
            "fp8_affine",
            (FLASH, FLASH),
            True,
            "prefill by flashinfer of SGLang, queries unrounded; decode by flashinfer of SGLang, queries unrounded",
        ),
    ],
)
def test_what_the_log_says(recipe: str, backends: tuple[str, str], sm100: bool, expected: str) -> None:
    assert wrapped.attention_note(KV_RECIPES[recipe], backends, sm100) == expected
