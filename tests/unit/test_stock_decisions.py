"""SGLang's decisions about checkpoints are the same with this plugin and without, unless only the plugin serves rightly.

Run over configuration pairs with the structure of published checkpoints, every ``--quantization`` flag of SGLang's own and three
GPUs, by SGLang's own functions of the version that is installed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.kv_cache import FLAG_PREFIX
from sglang_modelopt_ext.checkpoint.ownership import decide
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration import devices, processes
from sglang_modelopt_ext.schemes.table import FAMILIES
from sglang_modelopt_ext.schemes.versions import described_sglang
from tests.support import decisions
from tests.support.decisions import FLAGS, REJECTED, UNQUANTIZED, with_plugin, without_plugin
from tests.support.pairs import EDITED, EXPORTS, PUBLISHED, Pair

GPUS = tuple(map(Device.cuda, (80, 90, 100)))


HOPPER = Device.cuda(90)


@dataclass(frozen=True)
class Ours:
    """The reason why the plugin serves a checkpoint that SGLang, without it, serves or rejects.

    Attributes:
        why: part of the reason that is given.
        gpus: on which of them.
        alone: whether SGLang has no flag for the algorithm. Under other flags of its own it rejects the checkpoint too, or starts
            and takes the packed weights for plain ones.
    """

    why: str
    gpus: tuple[Device, ...] = GPUS
    alone: bool = False


NOT_SERVED = Ours(r"it does not serve .* as ModelOpt exports it", alone=True)
FP8_ON_AMPERE = Ours("it serves FP8 rightly from SM89 on", GPUS[:1])
EXCEPTIONS: dict[str, Ours] = {
    "llama_fp8_file_only": FP8_ON_AMPERE,
    "qwen3_fp8_without_quant_method": FP8_ON_AMPERE,
    "kv_in_config_only": FP8_ON_AMPERE,
    **{pair.name: NOT_SERVED for pair in EXPORTS if pair.name.startswith("only_")},
    "w4a8_in_both_files": NOT_SERVED,
    "awq_nvfp4": Ours("it serves NVFP4_AWQ rightly from SM100 on", GPUS[:2]),
    "nvfp4_in_groups_of_32": Ours("it serves NVFP4 in groups of 16, not 32"),
    "smoothed_fp8": Ours("it multiplies by pre_quant_scale for NVFP4_AWQ alone|it serves FP8 rightly from SM89 on"),
    "mix_of_shards_on_a_model_without_mapping": Ours(
        r"it does not find model\.layers\.0\.mlp\.gate_proj in a mix of Qwen2ForCausalLM"
    ),
    "mix_with_a_quantized_vocabulary": Ours(r"it takes the quantized model\.embed_tokens for unquantized"),
    "mix_with_a_weight_only_fp8_head": Ours("it rounds the input of lm_head, which stores no input_scale", GPUS[1:]),
    "quantized_embedding_not_listed": Ours(r"it takes the quantized model\.embed_tokens for unquantized"),
    "mix_of_fp8": Ours("it takes a mix without an NVFP4 layer for w4afp8", alone=True),
    "mix_with_fp8_experts": Ours("it serves FP8 experts from SM89 on", GPUS[:1]),
    "mix_inside_an_expert": Ours("it gives the experts of a layer one algorithm, these have several"),
    "an_unquantized_expert": Ours(r"it takes model\.layers\.0\.mlp\.experts\.1\.up_proj for quantized"),
    "mix_with_w4a8": Ours("it takes layers of W4A8_NVFP4_FP8 in a mix for unquantized ones"),
    "mix_with_modelopts_mxfp8": Ours("it drops the block scales of MXFP8 under ModelOpt's name for them"),
    "mixtral_experts_only": Ours("it fails on a Mixtral whose attention is not quantized"),
    "gpt_oss": Ours("it does not load the packed experts of GptOssForCausalLM|it serves FP8 rightly from SM89 on"),
    "kv_cache_only": Ours("it quantizes its KV cache only", alone=True),
    "kv_cache_only_in_both_files": Ours("it quantizes its KV cache only", alone=True),
}
"""Every checkpoint that does not end as it would without the plugin. Whoever adds one says what SGLang gets wrong."""

PAIRS = (*PUBLISHED, *EDITED, *EXPORTS)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Silence SGLang's warnings, thousands here, one for every configuration it reads; and leave no test's device to another."""
    logging.disable(logging.CRITICAL)
    monkeypatch.setattr(devices, "_settled", None)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_decisions(tmp_path: Path, pair: Pair, device: Device) -> None:
    folder = pair.write(tmp_path)
    exception = EXCEPTIONS.get(pair.name)
    if exception is not None and device not in exception.gpus:
        exception = None
    for flag in FLAGS:
        stock, ours = without_plugin(folder, flag, device), with_plugin(folder, flag, device)
        where = f"--quantization {flag}, {device.name}: {stock} without the plugin, {ours} with it"
        if flag is None and exception is not None:
            assert ours.method in FAMILIES, f"{where}: the exception is none any more"
        if ours == stock:
            continue
        assert exception is not None, where
        if ours.method == REJECTED:
            assert exception.alone, where
            assert "ModelOptExtError" in ours.detail, where
            continue
        assert ours.method in FAMILIES, where
        assert re.search(exception.why, decide(folder, flag, device).why), where


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_on_other_accelerators_everything_is_sglangs(tmp_path: Path, pair: Pair) -> None:
    folder, device = pair.write(tmp_path), Device.other("rocm")
    for flag in FLAGS:
        stock, ours = without_plugin(folder, flag, device), with_plugin(folder, flag, device)
        assert ours == stock, f"--quantization {flag}, {device.name}: {stock} without the plugin, {ours} with it"
    for flag in FAMILIES:
        ours = with_plugin(folder, flag, device)
        assert (ours.method, ours.detail) == (
            REJECTED,
            "ModelOptExtError: command line: --device: expected cuda (NVIDIA) or cpu with --quantization "
            f"{flag}, got {device.name}",
        )


@pytest.mark.parametrize("device", [Device.other("rocm"), Device.other("xpu")], ids=lambda device: device.name)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_on_other_accelerators_nothing_is_declared_and_one_line_is_said(
    tmp_path: Path, pair: Pair, device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import ServerArgs

    logging.disable(logging.NOTSET)
    monkeypatch.setattr(Device, "here", lambda: device)
    folder = pair.write(tmp_path)
    # PyTorch calls AMD's GPUs cuda.
    args = ServerArgs(model_path=str(folder), device="cuda" if device.name == "rocm" else device.name)
    with caplog.at_level(logging.INFO, "sglang_modelopt_ext"):
        processes.preflight(args)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sglang_modelopt_ext")]
    found = decide(folder, None, device)
    assert len(said) == (1 if found.config is not None or found.in_doubt else 0)
    assert all(line.startswith("modelopt_ext: left to SGLang") for line in said)
    settled = resolved_view(args)
    assert (settled.kv_cache_dtype, settled.attention_backend, settled.quantization) == ("auto", None, None)
    flag = f"{FLAG_PREFIX}nvfp4"
    args = ServerArgs(model_path=str(folder), device=args.device, kv_cache_dtype=flag)
    with pytest.raises(ModelOptExtError, match=rf"--device: expected cuda \(NVIDIA\) or cpu with .*{flag}, got"):
        processes.preflight(args)


def test_exceptions_are_of_pairs_that_exist() -> None:
    assert EXCEPTIONS.keys() <= {pair.name for pair in PAIRS}
    assert len({pair.name for pair in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize("pair", [*PUBLISHED, *EDITED], ids=lambda pair: pair.name)
def test_nothing_published_is_an_error_of_ours(tmp_path: Path, pair: Pair) -> None:
    """On a GPU and on a CPU, whatever the flag of SGLang's."""
    folder = pair.write(tmp_path)
    for flag in FLAGS:
        for device in (Device.cpu(), *GPUS):
            decide(folder, flag, device)


@pytest.mark.parametrize("pair", [*PUBLISHED, *EDITED], ids=lambda pair: pair.name)
def test_nothing_published_is_stopped_before_it_starts(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The checks before any process starts, the KV cache's included, and what they say: one line at most."""
    from sglang.srt.server_args import ServerArgs

    logging.disable(logging.NOTSET)
    monkeypatch.setattr(Device, "here", lambda: HOPPER)
    folder = pair.write(tmp_path)
    with caplog.at_level(logging.INFO, processes.__name__):
        processes.preflight(ServerArgs(model_path=str(folder), device="cuda"))
    said = [record.getMessage() for record in caplog.records if record.name == processes.__name__]
    assert len(said) <= 1
    assert all(line.startswith("modelopt_ext: left to SGLang") for line in said)
    assert bool(said) == bool(decide(folder, None, HOPPER).why)


@pytest.mark.parametrize("pair", [*PUBLISHED, *EDITED], ids=lambda pair: pair.name)
def test_kv_cache_flags_of_sglangs_stop_nothing_of_sglangs(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.server_args import ServerArgs

    monkeypatch.setattr(Device, "here", lambda: HOPPER)
    folder = pair.write(tmp_path)
    for flag in ("bf16", "fp8_e5m2", "fp8_e4m3", "nvfp4"):
        processes.preflight(ServerArgs(model_path=str(folder), device="cuda", kv_cache_dtype=flag))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "deepseek_hybrid_fp8_nvfp4",
            r"quantization_config\.quant_method: expected modelopt.*'fp8'|got .*activation_scheme",
        ),
        ("compressed_tensors_beside_a_left_over_file", r"quantization_config\.quant_method: expected modelopt"),
        ("w4afp8_bare_mix", r"quantized_layers: expected the algorithm of every layer of the mix, got none"),
        ("files_that_disagree", r"quant_algo: expected NVFP4, as in hf_quant_config\.json, got FP8"),
        ("malformed_group_size", r"group_size: expected a positive integer, got '16'"),
        ("unknown_algorithm", r"quant_algo: expected one of FP8, .*, got W2A2"),
        ("unknown_algorithm_in_a_mix", r"quantized_layers\.mtp\.a: quant_algo: expected one of .*, got W2A2"),
    ],
)
def test_doubt_has_a_reason_and_is_an_error_under_a_flag_of_ours(tmp_path: Path, name: str, reason: str) -> None:
    (pair,) = (pair for pair in PAIRS if pair.name == name)
    folder = pair.write(tmp_path)
    found = decide(folder, None, HOPPER)
    assert found.family is None
    assert found.in_doubt
    assert re.search(reason, found.why), found.why
    for flag in FAMILIES:
        with pytest.raises(ModelOptExtError, match=reason):
            decide(folder, flag, HOPPER)


def test_what_is_left_without_doubt_has_a_reason_too(tmp_path: Path) -> None:
    by_name = {pair.name: pair.write(tmp_path / pair.name) for pair in PAIRS}
    for name, why in (
        ("qwen36_mix_with_its_kv_cache_in_one_file", f"SGLang {described_sglang()} serves MIXED_PRECISION there"),
        ("mix_with_block_fp8", "FP8_BLOCK_SCALES in a mix is SGLang's own"),
        ("mix_with_mxfp8", f"SGLang {described_sglang()} serves MIXED_PRECISION there"),
        ("not_quantized", ""),
        ("awq", ""),
    ):
        found = decide(by_name[name], None, HOPPER)
        assert (found.family, found.in_doubt, found.why) == (None, False, why), name


def test_the_suite_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that took over what SGLang serves, or stopped it, would be seen."""
    (pair,) = (pair for pair in PAIRS if pair.name == "llama_fp8_file_only")
    folder = pair.write(tmp_path)
    stock = without_plugin(folder, None, HOPPER)
    assert stock == with_plugin(folder, None, HOPPER)
    assert stock.method not in (REJECTED, UNQUANTIZED)

    def refuse(*args: object) -> None:
        raise ModelOptExtError.at("a", "b", "c", "d")

    monkeypatch.setattr(decisions.config, "owned_family", refuse)
    assert stock != with_plugin(folder, None, HOPPER)
    monkeypatch.setattr(decisions.config, "owned_family", lambda folder, flag, device: decide_ours(folder))
    assert stock != with_plugin(folder, None, HOPPER)


def decide_ours(folder: Path) -> object:
    found = decide(folder, "modelopt_ext", HOPPER)
    return found.family, found.config
