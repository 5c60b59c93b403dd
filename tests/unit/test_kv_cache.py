"""The KV cache inside SGLang: declarations, rejected settings, and the scales of each rank."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.kv_scales import KVLayer, LayerRecipes
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv import hooks as kv_hooks
from sglang_modelopt_ext.integration.kv.layers import check_sinks, local_heads, rank_layers
from sglang_modelopt_ext.integration.kv.method import ModelOptExtKVMethod
from sglang_modelopt_ext.integration.kv.pool import ModelOptExtKVPool, number_layers
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES
from tests.support.kv_exports import PRESETS, kv_export
from tests.support.kv_trees import attention_model
from tests.support.models import TinyModel, model_dir


@pytest.mark.parametrize(
    ("total", "size", "heads", "expected"),
    [
        (8, 1, 8, [range(8)]),
        (8, 4, 2, [range(2), range(2, 4), range(4, 6), range(6, 8)]),
        (2, 2, 1, [range(1), range(1, 2)]),
        (2, 4, 1, [range(1), range(1), range(1, 2), range(1, 2)]),
        (1, 4, 1, [range(1)] * 4),
    ],
)
def test_heads_of_a_rank(total: int, size: int, heads: int, expected: list[range]) -> None:
    bias = torch.arange(total).float().unsqueeze(1).expand(total, 16)
    for rank, wanted in enumerate(expected):
        got = local_heads(bias, heads, rank, size, "layers.0.self_attn")
        assert got[:, 0].tolist() == list(wanted)


@pytest.mark.parametrize(("total", "size", "heads"), [(4, 1, 8), (8, 2, 2), (4, 8, 2), (3, 2, 1)])
def test_heads_that_are_not_the_models(total: int, size: int, heads: int) -> None:
    with pytest.raises(ModelOptExtError, match=r"layers.0.self_attn: k_bias, v_bias: expected biases of"):
        local_heads(torch.zeros(total, 16), heads, 0, size, "layers.0.self_attn")


def full_numbers(layers: int = 2, heads: int = 4) -> dict[int, KVLayer]:
    return {
        i: KVLayer(0.5 + i, 0.25 + i, torch.full((heads, 16), 1.0 + i), torch.full((heads, 16), -1.0 - i))
        for i in range(layers)
    }


def test_every_attention_layer_gets_its_numbers() -> None:
    found = rank_layers(attention_model(), full_numbers(), rank=1, size=2)
    assert {index: (layer.k_scale, layer.v_scale) for index, layer in found.items()} == {0: (0.5, 0.25), 1: (1.5, 1.25)}
    assert found[1].k_bias is not None
    assert found[1].k_bias.shape == (2, 16)


@pytest.mark.parametrize("backend", ["torch_native", "trtllm_mha", "flashinfer"])
def test_attention_sinks_are_for_kernels_that_add_them(backend: str) -> None:
    model = attention_model()
    check_sinks(model, (backend, backend))
    model.get_submodule("model.layers.1.self_attn").sinks = torch.nn.Parameter(torch.zeros(4))
    check_sinks(model, ("triton", "triton"))
    for backends in (("triton", backend), (backend, "triton")):
        with pytest.raises(
            ModelOptExtError, match=r"expected triton for .* with attention sinks, got .*1.self_attn.sinks"
        ):
            check_sinks(model, backends)


MIXES = {
    **{name: LayerRecipes(recipe) for name, recipe in KV_RECIPES.items()},
    "mixed": LayerRecipes(KV_RECIPES["nvfp4"], {1: KV_RECIPES["fp8"], 4: KV_RECIPES["fp8"]}),
}


def tensors_of(buffers: dict[str, Any]) -> list[torch.Tensor]:
    return [t for name in ("k_buffer", "v_buffer", "k_scale_buffer", "v_scale_buffer") for t in buffers[name] or []]


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("recipes", MIXES.values(), ids=MIXES)
def test_size_of_a_token(recipes: LayerRecipes, first: int) -> None:
    """The buffers of a stage are as large as the size that SGLang divides the memory by."""
    method = ModelOptExtKVMethod(recipes, first)
    buffers = method.create_buffers(size=10, head_num=3, head_dim=64, layer_num=3, device="cpu")
    held = sum(t.numel() * t.itemsize for t in tensors_of(buffers))
    assert held == 10 * method.compute_cell_size(3, 64, 3, kv_size=2)
    expected = [recipes.of(first + index).bytes_per_vector(64) for index in range(3)]
    assert held == 10 * 2 * 3 * sum(expected)


@pytest.mark.parametrize("recipes", MIXES.values(), ids=MIXES)
def test_slots_are_moved_in_buffers_that_hold_something(recipes: LayerRecipes) -> None:
    """SGLang's copy kernel gets an address and a row of bytes for each buffer: an empty one has neither.

    It moves as many bytes of every buffer's rows as the first one has.
    """
    pool = object.__new__(ModelOptExtKVPool)
    method = ModelOptExtKVMethod(recipes)
    for name, tensors in method.create_buffers(10, 3, 64, 2, "cpu").items():
        setattr(pool, name, tensors)
    moved = pool._slot_move_pointer_buffers()
    assert all(buffer.data_ptr() != 0 and buffer.is_contiguous() for buffer in moved)
    rows = [buffer[0].numel() * buffer.itemsize for buffer in moved]
    assert sum(rows) == method.compute_cell_size(3, 64, 2, kv_size=2)
    assert rows[0] == max(rows)


def test_layers_of_a_mix_keep_their_own_formats() -> None:
    """What is stored in one layer of a mixed cache is what a cache of that layer's recipe alone would store."""
    layer, size = KVLayer(0.01, 0.02), 6
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([5, 0, 3, 2])

    def read(recipes: LayerRecipes, number: int) -> list[torch.Tensor]:
        method = ModelOptExtKVMethod(recipes)
        method.layers = dict.fromkeys(range(2), layer)
        buffers = method.create_buffers(size, 3, 64, 2, "cpu")
        scales = None if buffers["k_scale_buffer"] is None else buffers["k_scale_buffer"][number]
        packed = method.pack(number, (buffers["k_buffer"][number], buffers["v_buffer"][number]), scales, 64)
        for side in packed:
            side.store(slots, x)
        return [side[slots] for side in packed]

    for number, name in ((0, "nvfp4"), (1, "fp8")):
        mixed, alone = read(MIXES["mixed"], number), read(MIXES[name], number)
        assert all(torch.equal(*pair) for pair in zip(mixed, alone, strict=True)), name
    assert not torch.equal(read(MIXES["mixed"], 0)[0], read(MIXES["mixed"], 1)[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fp8", [{1}, {0}, {0, 2}])
def test_a_mixed_pool_moves_whole_slots(fp8: set[int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own pool over buffers of two widths: what was written is read back where it was moved to, in every layer."""
    from sglang.kernels.ops.kvcache import cache_move

    monkeypatch.setattr(cache_move, "_is_cpu", device == "cpu")  # these tests import SGLang as on a CPU
    recipes = LayerRecipes(KV_RECIPES["nvfp4"], dict.fromkeys(fp8, KV_RECIPES["fp8"]))
    method = ModelOptExtKVMethod(recipes)
    method.layers = dict.fromkeys(range(3), KVLayer(0.01, 0.02))
    pool = ModelOptExtKVPool(
        size=512,
        page_size=1,
        dtype=torch.uint8,
        head_num=2,
        head_dim=128,
        layer_num=3,
        device=device,
        enable_memory_saver=False,
        start_layer=0,
        enable_alt_stream=False,
        enable_kv_cache_copy=device == "cuda",
        quant_method=method,
    )
    number_layers(pool)
    pool.use_native_move_kv_cache |= device == "cpu"  # the tiled copy is a kernel
    generator = torch.Generator().manual_seed(0)
    slots, targets = torch.arange(1, 201, device=device), torch.arange(201, 401, device=device).flip(0)
    sides = [side for layer in range(3) for side in (pool.get_key_buffer(layer), pool.get_value_buffer(layer))]
    for side in sides:
        side.store(slots, torch.randn(200, 2, 128, generator=generator).to(device))
    before = [side[slots] for side in sides]
    pool.move_kv_cache(targets, slots)
    assert all(torch.equal(old, side[targets]) for old, side in zip(before, sides, strict=True))


@pytest.mark.parametrize(("recipe", "size"), [("fp8", 256), ("fp8_affine", 256), ("nvfp4", 144), ("nvfp4_rotate", 144)])
def test_what_sglang_divides_the_memory_by(recipe: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a token at head_dim 128, from SGLang's own sizing with our hook: 2 and 3.56 times the tokens of bf16's 512."""
    import sglang.srt.model_executor.pool_configurator as pools
    import sglang.srt.runtime_context

    parallel = SimpleNamespace(attn_tp_size=2, attn_dcp_size=1)
    monkeypatch.setattr(sglang.srt.runtime_context, "get_parallel", lambda: parallel)
    model = SimpleNamespace(get_num_kv_heads=lambda tp, dcp: 8 // tp // dcp, head_dim=128)
    stage = SimpleNamespace(start_layer=0)
    layers = SimpleNamespace(kv_cache_dtype_str=f"modelopt_{recipe}", model_config=model, layer_info=stage)
    args = SimpleNamespace(model_path="no/such/model", revision=None)
    monkeypatch.setattr(sglang.srt.runtime_context, "get_server_args", lambda: args)
    plan = SimpleNamespace(recipes=LayerRecipes(KV_RECIPES[recipe]))
    monkeypatch.setattr(kv_hooks, "plan_for", lambda path, revision, flag: plan)
    stock = pools.DefaultPoolConfigurator._compute_cell_size
    assert kv_hooks._compute_cell_size(stock, None, layers, num_layers=3) == 3 * 4 * size


RESOLVE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
from sglang.srt.server_args import prepare_server_args
from sglang_modelopt_ext.errors import ModelOptExtError
found = []
for argv in json.loads(sys.argv[1]):
    try:
        args = prepare_server_args(argv)
        args.resolve_once()
        view = resolved_view(args)
        found.append([view.kv_cache_dtype, *attention_backends_of(view)])
    except ModelOptExtError as error:
        found.append(str(error))
print("FOUND", json.dumps(found))
"""


def resolve(*command_lines: list[str]) -> list[Any]:
    """Resolve command lines under this plugin: ``[kv_cache_dtype, prefill, decode backend]`` or the error."""
    env = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    import os

    result = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps([["--device", "cpu", *line] for line in command_lines])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **env},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, result.stderr[-3000:]
    found: list[Any] = json.loads(lines[0].removeprefix("FOUND "))
    return found


def test_what_is_settled_before_a_server_starts() -> None:
    plain = ["--model-path", str(model_dir(TinyModel()))]
    exports = {recipe: ["--model-path", str(kv_export(recipe))] for recipe in PRESETS}
    native = ["torch_native", "torch_native"]
    flag = "--kv-cache-dtype"
    cases: list[tuple[list[str], Any]] = [
        (exports["fp8"], ["modelopt_fp8", *native]),
        (exports["fp8_affine"], ["modelopt_fp8_affine", *native]),
        (exports["nvfp4"], ["modelopt_nvfp4", *native]),
        (exports["nvfp4_affine"], ["modelopt_nvfp4_affine", *native]),
        ([*exports["nvfp4_rotate"], flag, "modelopt_nvfp4_rotate"], ["modelopt_nvfp4_rotate", *native]),
        ([*plain, flag, "modelopt_nvfp4"], ["modelopt_nvfp4", *native]),
        ([*exports["nvfp4"], flag, "bf16"], ["bf16"]),
        (plain, ["auto"]),
        (
            [*exports["fp8_affine"], "--attention-backend", "flex_attention"],
            "expected torch_native or triton with --kv-cache",
        ),
        ([*plain, flag, "modelopt_nvfp4_affine"], "expected a recipe without biases"),
        ([*exports["nvfp4"], flag, "modelopt_fp8"], "expected auto, modelopt_nvfp4, modelopt_nvfp4_rotate or bf16"),
        ([*exports["nvfp4"], "--enable-hierarchical-cache"], "--enable-hierarchical-cache: expected it unset"),
        ([*exports["nvfp4"], "--disaggregation-mode", "prefill"], "--disaggregation-mode: expected it unset"),
    ]
    for (line, expected), found in zip(cases, resolve(*(line for line, _ in cases)), strict=True):
        if isinstance(expected, str):
            assert expected in found, line
        else:
            assert found[: len(expected)] == expected, line


@pytest.mark.parametrize(
    ("flag", "is_set", "reason"), kv_hooks.UNSUPPORTED, ids=[row[0] for row in kv_hooks.UNSUPPORTED]
)
def test_unsupported_arguments_exist_and_are_off_by_default(flag: str, is_set: Any, reason: str) -> None:
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path="nowhere")
    assert not is_set(args)
    assert hasattr(args, flag.removeprefix("--").replace("-", "_")), "no such flag"
    assert reason


@pytest.mark.parametrize("recipe", PRESETS)
def test_on_a_gpu(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain FP8 stays SGLang's; everything else is ours, read by Triton kernels."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))
    args = ServerArgs(model_path=str(kv_export(recipe)), device="cuda")
    kv_hooks.declare(args)
    view = resolving_view(args)
    if recipe == "fp8":
        assert (view.kv_cache_dtype, view.attention_backend) == ("auto", None)
    else:
        exported = {"nvfp4_rotate": "nvfp4"}.get(recipe, recipe)
        assert (view.kv_cache_dtype, view.attention_backend) == (f"modelopt_{exported}", "triton")


def test_sglangs_nvfp4_cache_is_its_own_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--kv-cache-dtype nvfp4`` stays as it is; SGLang says which GPUs it is for. On a CPU it is ours."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))
    for device, expected in (("cuda", "nvfp4"), ("cpu", "modelopt_nvfp4")):
        args = ServerArgs(model_path=str(kv_export("nvfp4")), device=device, kv_cache_dtype="nvfp4")
        kv_hooks.declare(args)
        assert resolving_view(args).kv_cache_dtype == expected


def test_our_name_of_sglangs_cache_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))
    args = ServerArgs(model_path=str(model_dir(TinyModel())), device="cuda", kv_cache_dtype="modelopt_fp8")
    kv_hooks.declare(args)
    assert resolving_view(args).kv_cache_dtype == "fp8_e4m3"


def test_on_other_accelerators_a_cache_of_ours_is_refused_and_any_other_is_sglangs() -> None:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    fields = {"model_path": str(kv_export("nvfp4")), "device": "xpu"}
    args = ServerArgs(**fields)
    kv_hooks.declare(args)
    assert (resolving_view(args).kv_cache_dtype, resolving_view(args).attention_backend) == ("auto", None)
    with pytest.raises(ModelOptExtError, match=r"--device: expected cuda \(NVIDIA\) or cpu with .*_nvfp4, got xpu"):
        kv_hooks.declare(ServerArgs(**fields, kv_cache_dtype="modelopt_nvfp4"))
