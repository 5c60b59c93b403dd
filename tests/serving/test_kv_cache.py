"""Real SGLang servers with quantized KV caches: the fast set, four starts, and every recipe on every family."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch

from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.workflow.verify.reference import ReferenceModel
from tests.serving.checks import (
    FP32_MEDIAN,
    PROMPT,
    SHORT_PROMPTS,
    check_batch_against_single,
    check_logprobs,
    check_prefill_against_decode,
    median_apart,
)
from tests.support import edits
from tests.support.hybrid_models import WINDOW, hybrid_export
from tests.support.kv_exports import CAST_PRESETS, PRESETS, cast_export, kv_export
from tests.support.models import FAMILIES, Family, TinyModel, model_dir, random_ids
from tests.support.reference import Reference, difference
from tests.support.server import Server, failing_start

pytestmark = pytest.mark.server

W4A8 = "W4A8_NVFP4_FP8_CFG"
PROMPTS = 8
CHUNK = 16
ROTATED = ("nvfp4_rotate",)


def flags(recipe: str) -> tuple[str, ...]:
    """Return the flags for an export of a recipe: none, except for the recipe that its export does not name."""
    return ("--kv-cache-dtype", f"modelopt_{recipe}") if recipe in ROTATED else ()


def check_against_unrounded(server: Server, folder: Path, **options: str) -> None:
    """Check that the test would notice a missing cache rounding."""
    served = torch.cat([server.full_logprobs(ids) for ids in SHORT_PROMPTS])
    plain = torch.cat([Reference(folder, **options).logprobs(ids) for ids in SHORT_PROMPTS])
    assert difference(served, plain).median > 10 * FP32_MEDIAN


@pytest.fixture(scope="module")
def folder() -> Path:
    """Return a checkpoint with NVFP4 keys and values with biases, under W4A8 layers."""
    return kv_export("nvfp4_affine", "mistral", W4A8)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Yield one float32 server for every test of the class below, prompts cut into small chunks."""
    args = ("--chunked-prefill-size", str(CHUNK), "--max-prefill-tokens", str(CHUNK), "--enable-metrics")
    with Server(folder, dtype="float32", args=args) as running:
        yield running


class TestFromTheCheckpoint:
    """NVFP4 affine under W4A8 layers, found without a flag."""

    def test_logprobs(self, server: Server, folder: Path) -> None:
        check_logprobs(server, folder, "float32", kv_cache="nvfp4_affine")
        check_against_unrounded(server, folder, kv_cache="unquantized")
        assert "modelopt_ext: KV cache nvfp4_affine, hf_quant_config.json, scales read as amax / 448" in server.output()

    def test_the_server_says_what_serves_it(self, server: Server) -> None:
        state = server.server_info()["internal_states"][0]["modelopt_ext"]
        assert (state["weights"], state["quant_algo"]) == ("modelopt_ext", "W4A8_NVFP4_FP8")
        assert state["kv_cache"] == {"recipe": "nvfp4_affine", "pool": "modelopt_ext"}
        (layers,) = state["layers"]
        assert (layers["count"], layers["kind"], layers["kernel"]) == (8, "linear", "dense_float32")
        lines = requests.get(f"{server.url}/metrics", timeout=60).text.splitlines()
        (info,) = (line for line in lines if line.startswith("modelopt_ext:info{"))
        assert info.endswith("} 1.0")
        assert 'kv_recipe="nvfp4_affine"' in info
        (counted,) = (line for line in lines if line.startswith("modelopt_ext:layers{"))
        assert counted.endswith("} 8.0")
        assert 'kernel="dense_float32"' in counted

    def test_chunks_and_cache_hits_change_nothing(self, server: Server, folder: Path) -> None:
        """A prompt of several chunks, alone and after a cached prefix, is scored like the whole prompt.

        A key, a value or a block's scale within a rounding error of a boundary is rounded to one side by the server and to the
        other by the reference, by the order in which the CPU at hand adds. A prompt has some 10^5 of them, so that it happens
        to a few prompts; a chunk that is attended wrongly shows in all.
        """
        reference = Reference(folder, kv_cache="nvfp4_affine")
        apart = []
        for seed in range(PROMPTS):
            ids = random_ids(3 * CHUNK + 5, seed=60 + seed, vocab=511)
            server.flush_cache()
            first = server.full_logprobs(ids)
            longer = [*ids, *random_ids(7, seed=80 + seed, vocab=511)]
            server.generate_ids(ids, 1)  # leaves the prompt in the cache
            hit = server.request("/generate", {"input_ids": longer, "sampling_params": {"max_new_tokens": 1}})
            assert hit["meta_info"]["cached_tokens"] >= len(ids) - 1
            apart.append(difference(first, reference.logprobs(ids)).median)
            likeliest = server.top_logprobs(longer, 1)[-1]
            assert apart[-1] >= FP32_MEDIAN or likeliest.keys() == {int(reference.logprobs(longer)[-1].argmax())}
        assert sum(median < FP32_MEDIAN for median in apart) >= PROMPTS - 2, apart
        assert f"#new-token: {CHUNK}," in server.output(), "no prompt was cut"

    def test_decode(self, server: Server) -> None:
        check_prefill_against_decode(server)
        check_batch_against_single(server)

    def test_greedy_repeats_from_a_warm_cache(self, server: Server) -> None:
        assert len({tuple(server.generate_ids(PROMPT, 16)) for _ in range(3)}) == 1

    def test_other_scales_are_not_taken_by_an_update(self, server: Server) -> None:
        other = kv_export("nvfp4_affine", "mistral", W4A8, seed=5)
        answer = requests.post(
            f"{server.url}/update_weights_from_disk", json={"model_path": str(other)}, timeout=120
        ).json()
        assert not answer["success"]
        assert "k_bias: expected the values being served" in answer["message"]


@pytest.mark.full
def test_two_ranks_and_pages(tmp_path: Path) -> None:
    """An export that quantizes nothing but the cache, FP8 affine: biases split over two ranks, pages of 16 tokens."""
    folder = kv_export("fp8_affine", "qwen3")
    with Server(folder, dtype="float32", tp=2, args=("--page-size", "16")) as server:
        check_logprobs(server, folder, "float32", kv_cache="fp8_affine")
        check_prefill_against_decode(server)
        assert "modelopt_ext: KV cache fp8_affine" in server.output()


@pytest.mark.full
def test_a_precision_for_each_layer(tmp_path: Path) -> None:
    """One layer of three in FP8, the others in NVFP4; read as NVFP4 throughout, the answers would be others."""
    folder = edits.copy_with(
        kv_export("nvfp4", "llama", layers=3),
        tmp_path / "mixed",
        [edits.set_fields("hf_quant_config.json", {"sglang_modelopt_ext": {"kv_cache_layers": {"1": "fp8"}}})],
    )
    plan = read_plan(folder, read_quant_config(folder), "auto")
    assert plan is not None
    readings = {
        name: ReferenceModel(folder, kv_cache=found)
        for name, found in (("mixed", plan), ("uniform", dataclasses.replace(plan, other={})))
    }
    with Server(folder, dtype="float32") as server:
        served = torch.cat([server.full_logprobs(ids) for ids in SHORT_PROMPTS])
        apart = {
            name: difference(served, torch.cat([complete(reading, ids) for ids in SHORT_PROMPTS])).median
            for name, reading in readings.items()
        }
        assert apart["mixed"] < FP32_MEDIAN, apart
        assert apart["uniform"] > 10 * FP32_MEDIAN, apart
        check_prefill_against_decode(server)
        assert "modelopt_ext: KV cache nvfp4 and fp8 in 1 layer," in server.output()


def complete(reading: ReferenceModel, ids: list[int]) -> torch.Tensor:
    """Return the reading's log probabilities after every token of ``ids``, as a server returns them."""
    return torch.from_numpy(reading.logprobs([*ids, 0]))


@pytest.mark.full
def test_by_flag_on_any_model() -> None:
    """An unquantized model, with a rotated cache whose scales are those of an amax of 448."""
    folder = model_dir(TinyModel("llama"))
    with Server(folder, dtype="float32", args=("--kv-cache-dtype", "modelopt_nvfp4_rotate")) as server:
        check_logprobs(server, folder, "float32", kv_cache="nvfp4_rotate")
        check_against_unrounded(server, folder, kv_cache="none")
        check_prefill_against_decode(server)


def check_windows(recipe: str) -> None:
    """Check a model whose layers have a window in every other, which SGLang caches apart, with prompts longer than the window."""
    folder = hybrid_export("mellum", recipe)
    args = ("--chunked-prefill-size", str(CHUNK), "--max-prefill-tokens", str(CHUNK), *flags(recipe))
    reference = Reference(folder, kv_cache=recipe)
    apart, unrounded = [], Reference(folder, kv_cache="unquantized")
    with Server(folder, dtype="float32", args=args) as server:
        for seed in range(PROMPTS):
            ids = random_ids(3 * WINDOW + 5, seed=60 + seed, vocab=511)
            served = server.full_logprobs(ids)
            apart.append(difference(served, reference.logprobs(ids)).median)
            assert difference(served, unrounded.logprobs(ids)).median > 10 * FP32_MEDIAN
        check_prefill_against_decode(server)
        check_batch_against_single(server)
        assert "swa token usage" in server.output(), "SGLang has one pool for all layers"
    assert sum(median < FP32_MEDIAN for median in apart) >= PROMPTS - 2, apart


@pytest.mark.full
@pytest.mark.parametrize("recipe", PRESETS)
def test_layers_with_and_without_a_window(recipe: str) -> None:
    check_windows(recipe)


@pytest.mark.full
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
@pytest.mark.parametrize("recipe", PRESETS)
def test_every_recipe_on_every_family(recipe: str, family: Family) -> None:
    folder = kv_export(recipe, family)
    with Server(folder, dtype="float32", args=flags(recipe)) as server:
        check_logprobs(server, folder, "float32", kv_cache=recipe)
        check_prefill_against_decode(server)
        check_batch_against_single(server)


@pytest.mark.full
@pytest.mark.parametrize("recipe", PRESETS)
def test_at_the_bf16_noise_floor(recipe: str) -> None:
    folder = kv_export(recipe, "qwen3", W4A8)
    with Server(folder, dtype="bfloat16", args=flags(recipe)) as server:
        check_logprobs(server, folder, "bfloat16", kv_cache=recipe)


@pytest.mark.full
@pytest.mark.parametrize("recipe", CAST_PRESETS)
def test_presets_without_calibration(recipe: str) -> None:
    folder = cast_export(recipe, "llama", W4A8)
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32", kv_cache=recipe)
        check_prefill_against_decode(server)
        assert f"modelopt_ext: KV cache {recipe}, hf_quant_config.json, no scales stored, amax 448" in server.output()


@pytest.mark.full
@pytest.mark.parametrize("args", [(), ("--disable-overlap-schedule",)], ids=["overlap", "no overlap"])
def test_retracted_requests(args: tuple[str, ...]) -> None:
    """Requests whose cache is evicted and recomputed while they decode, with and without overlap scheduling."""
    folder = kv_export("nvfp4_affine", "qwen3")
    prompts, count = [random_ids(20 + 7 * i, seed=100 + i, vocab=511) for i in range(6)], 24
    reference = Reference(folder, kv_cache="nvfp4_affine")
    with Server(folder, dtype="float32", args=args, env={"SGLANG_TEST_RETRACT": "1"}) as server:
        served, expected = [], []
        for ids, answer in zip(prompts, server.batch(prompts, count), strict=True):
            info = answer["meta_info"]
            assert info["completion_tokens"] == count
            served += [entry[0] for entry in info["output_token_logprobs"]]
            expected += reference.input_logprobs([*ids, *answer["output_ids"]]).tolist()[-count:]
        assert re.search(r"#retracted_reqs: [1-9]", server.output()), "no request was retracted"
    assert median_apart(served, expected) < FP32_MEDIAN


def check_interpreted(folder: Path, recipe: str, narrow_decode: bool = False) -> None:
    """Check the server on SGLang's Triton backend with our kernels, interpreted: a prompt in chunks, then decoding.

    Attention within a chunk is unrounded, to earlier tokens rounded; a decoded token reads everything rounded, itself too.
    """
    prompts, count = [random_ids(2 * CHUNK + 7, seed=90 + i, vocab=511) for i in range(3)], 5
    args = ("--attention-backend", "triton", "--chunked-prefill-size", str(CHUNK), "--max-prefill-tokens", str(CHUNK))
    reference = Reference(folder, kv_cache=recipe)
    reference.model.config.kv_rounding["narrow_decode"] = narrow_decode
    with Server(folder, dtype="float32", args=(*args, *flags(recipe)), env={"TRITON_INTERPRET": "1"}) as server:
        served, expected, rounded = [], [], []
        for ids in prompts:
            sampling = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True}
            payload = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
            server.flush_cache()
            info = server.request("/generate", payload)["meta_info"]
            decoded = [entry[1] for entry in info["output_token_logprobs"]]
            served += [entry[0] for entry in (*info["input_token_logprobs"][1:], *info["output_token_logprobs"])]
            sequence = [*ids, *decoded]
            chunks = [t // CHUNK * CHUNK if t < len(ids) else t + 1 for t in range(len(sequence))]
            for raw_from, scores in ((chunks, expected), (None, rounded)):
                reference.model.config.kv_rounding["raw_from"] = raw_from
                scores += reference.input_logprobs(sequence).tolist()
        assert f"#new-token: {CHUNK}," in server.output(), "no prompt was cut"
    assert median_apart(served, expected) < FP32_MEDIAN
    assert median_apart(served, rounded) > FP32_MEDIAN, "the chunks were read back rounded"
    each = len(served) // len(prompts)
    decoded_at = [place for place in range(len(served)) if place % each > each - count]
    assert median_apart([served[i] for i in decoded_at], [expected[i] for i in decoded_at]) < FP32_MEDIAN


@pytest.mark.full
@pytest.mark.parametrize("recipe", PRESETS)
def test_the_gpus_backend_in_the_interpreter(recipe: str) -> None:
    check_interpreted(kv_export(recipe, "qwen2"), recipe)


@pytest.mark.full
@pytest.mark.parametrize("recipe", PRESETS)
def test_the_gpus_backend_with_windows_and_sinks(recipe: str) -> None:
    """A Granite with attention sinks in every layer and a window in every other, which SGLang caches apart."""
    check_interpreted(hybrid_export("granite_swa", recipe), recipe)


@pytest.mark.full
def test_the_gpus_backend_with_a_window_that_is_narrower_while_decoding() -> None:
    check_interpreted(hybrid_export("mellum", "nvfp4_affine"), "nvfp4_affine", narrow_decode=True)


@pytest.mark.full
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--kv-cache-dtype", "modelopt_nvfp4"),
            "expected auto, modelopt_fp8_affine or bf16 for a KV cache calibrated",
        ),
        (("--attention-backend", "flex_attention"), "--attention-backend: expected torch_native or triton"),
        (("--enable-hierarchical-cache",), "--enable-hierarchical-cache: expected it unset"),
    ],
)
def test_refused_at_the_command_line(args: tuple[str, ...], message: str) -> None:
    refusal = failing_start(kv_export("fp8_affine"), args=args)
    assert message in refusal.output
    assert "Traceback" not in refusal.output
    assert not refusal.left_behind
