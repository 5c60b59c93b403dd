"""Measured times as the cost of a search: the products that are timed, the file of times, and choices within microseconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("modelopt")

from sglang_modelopt_ext.backends import timings
from sglang_modelopt_ext.backends.product import Product, Times
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.tuning import run as tuning
from sglang_modelopt_ext.tuning.experts import experts_of
from sglang_modelopt_ext.tuning.products import tune_products
from sglang_modelopt_ext.workflow.autoquant.formats import find_formats
from sglang_modelopt_ext.workflow.autoquant.latency import Table, products, timed
from sglang_modelopt_ext.workflow.autoquant.layers import plan_groups, read_linears
from sglang_modelopt_ext.workflow.autoquant.plots import TRADE_OFF, pareto
from sglang_modelopt_ext.workflow.autoquant.rules import Rules
from sglang_modelopt_ext.workflow.autoquant.state import Latency, Layer, State, Target, choose, read_report
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.unit.test_autoquant_run import arguments, failure
from tests.unit.test_autoquant_state import TWO

CPU = Device.cpu()


def with_times(state: State, *us: dict[str, float]) -> State:
    """Return the state with times by format for each group."""
    groups = []
    for group, own in zip(state.groups, us, strict=True):
        candidates = {name: msgspec.structs.replace(c, us=own.get(name)) for name, c in group.candidates.items()}
        groups.append(msgspec.structs.replace(group, candidates=candidates))
    return msgspec.structs.replace(state, groups=tuple(groups), latency=Latency(gpu="a", tokens=1, versions={}))


W4, W8, PLAIN = "W4A8_NVFP4_FP8_CFG", "FP8_DEFAULT_CFG", "none"
TIMED = with_times(TWO, {W4: 3.0, W8: 4.0, PLAIN: 8.0}, {W4: 5.0, W8: 4.0, PLAIN: 8.0})


@pytest.mark.parametrize("target", [7.0, 8.0, 11.9, 12.0, 15.9])
def test_the_best_choice_within_a_time(target: float) -> None:
    """Every choice, counted out."""
    best = math.inf
    for formats in itertools.product((W4, W8, PLAIN), repeat=2):
        each = [group.candidates[name] for group, name in zip(TIMED.groups, formats, strict=True)]
        if sum(c.us or 0.0 for c in each) <= target:
            best = min(best, sum(c.score or 0.0 for c in each))
    choice = choose(TIMED, Target(target, "us"))
    assert choice.score == pytest.approx(best)
    assert choice.us is not None
    assert choice.us <= target
    assert choice.asked.name == f"{target:g}-us"


def test_both_units_of_a_choice() -> None:
    """In the second group FP8 is faster than W4A8 and stores more: the two budgets choose otherwise."""
    fast, small = choose(TIMED, Target(7.0, "us")), choose(TIMED, Target(4.3))
    assert list(fast.formats.values()) == [W4, W8]
    assert (fast.us, fast.bits) == (7.0, pytest.approx((4.25 + 8) / 2))
    assert list(small.formats.values()) == [W4, W4]
    assert (small.us, small.bits) == (8.0, pytest.approx(4.25))


@pytest.mark.parametrize(
    ("state", "target", "match"),
    [
        (TWO, 7.0, "--target-latency: 7: expected a search with --latency-table"),
        (TIMED, 6.9, "--target-latency: 6.9: expected at least 7, the least the formats reach"),
        (TIMED, 16.0, "less than 16, the time of all unquantized"),
    ],
)
def test_a_time_out_of_reach(state: State, target: float, match: str) -> None:
    with pytest.raises(ModelOptExtError, match=match):
        choose(state, Target(target, "us"))


def test_a_candidate_without_a_time_is_no_candidate_of_a_time() -> None:
    state = with_times(TWO, {W8: 4.0}, {W4: 5.0, W8: 4.0, PLAIN: 8.0})
    assert choose(state, Target(100.0, "us")).formats == dict(
        zip((group.name for group in state.groups), (W8, PLAIN), strict=True)
    )
    assert choose(state, Target(4.3)).us is None, "its time is not known, and is not called one"


def test_layers_that_a_server_fuses_are_one_product() -> None:
    attention = [Layer(name=f"a.{leaf}_proj", n=n, k=64) for leaf, n in (("q", 64), ("k", 32), ("v", 32))]
    assert products(attention, None, 0) == [Product("a.qkv_proj", None, 128, 64, shards=3)]
    apart = [Layer(name="a.o_proj", n=64, k=64), Layer(name="a.down_proj", n=64, k=128)]
    assert [(one.name, one.n, one.k, one.shards) for one in products(apart, None, 0)] == [
        ("a.o_proj", 64, 64, 1),
        ("a.down_proj", 64, 128, 1),
    ]


def test_experts_are_two_products() -> None:
    """Gate and up of all experts together, and down: as the tuning of a checkpoint has them."""
    layers = [
        Layer(name="mlp.experts", n=96, k=64, count=16, experts=True),
        Layer(name="mlp.experts", n=64, k=96, count=8, experts=True),
    ]
    first, down = products(layers, None, 2)
    assert (first.n, first.k, first.shards, first.experts, first.top_k) == (192, 64, 2, 8, 2)
    assert (down.n, down.k, down.shards, down.experts, down.top_k) == (64, 96, 1, 8, 2)


def test_experts_of_one_size_are_two_products_too() -> None:
    layers = [Layer(name="mlp.experts", n=64, k=64, count=8, experts=True)] * 2
    assert len(products(layers, None, 2)) == 2


def test_a_mixture_has_times_but_of_unquantized_experts(tmp_path: Path) -> None:
    """Measured like the experts of a checkpoint, and found again under a server's keys."""
    mixture = model_dir(TinyModel("qwen3_moe"))
    formats = find_formats(["W4A8_NVFP4_FP8"], "cpu")
    linears = read_linears(mixture)
    _, groups, schemes = plan_groups(linears, formats, CPU, Rules(), [W4])
    file = tmp_path / "times.json"
    found, _ = timed(mixture, groups, schemes, CPU, linears.dtype, Table(file=file, tokens=4, measure=measure))
    experts = [group for group in found if group.layers[0].experts]
    assert experts
    for group in experts:
        assert group.candidates[PLAIN].us is None
        assert (group.candidates[W4].us or 0) > 0
    assert all(group.candidates[PLAIN].us for group in found if not group.layers[0].experts)
    checkpoint = read_checkpoint(export(mixture, W4))
    content = timings.read(file)
    for kind in experts_of(checkpoint):
        key = timings.key_of(kind.request(torch.device("cpu"), linears.dtype))
        assert Times(content, 4).of(key) is not None, kind.name


def test_the_points_that_nothing_beats() -> None:
    assert pareto([(5, 2.0), (4, 3.0), (6, 2.5), (8, 1.0), (4, 3.5)]) == [(4, 3.0), (5, 2.0), (8, 1.0)]


@pytest.fixture(scope="module")
def model() -> Path:
    return model_dir(TinyModel(layers=2))


def by_weight(call: Callable[[int], object]) -> float:
    """Return a time by the size of the product's output, whatever the machine does."""
    y = call(0)
    assert isinstance(y, torch.Tensor)
    return float(y.numel())


def measure(wanted: Any, dtype: torch.dtype, tokens: Any) -> timings.TuningFile:
    return tune_products(wanted, dtype, tokens, device="cpu", timer=by_weight, report=lambda _: None)


@pytest.fixture(scope="module")
def table(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of times for the model's layers in W4A8_NVFP4_FP8 and FP8, on a CPU."""
    file = tmp_path_factory.mktemp("times") / "times.json"
    formats = find_formats(["W4A8_NVFP4_FP8", "FP8"], "cpu")
    linears = read_linears(model)
    names = [candidate.name for candidate in formats]
    _, groups, schemes = plan_groups(linears, formats, CPU, Rules(), names)
    found, latency = timed(model, groups, schemes, CPU, linears.dtype, Table(file=file, tokens=4, measure=measure))
    assert latency.tokens == 4
    for group in found:
        outputs = sum(layer.n for layer in group.layers)
        assert {candidate.us for candidate in group.candidates.values()} == {4.0 * outputs}
    # A second call reads the file and measures nothing.
    again, _ = timed(model, groups, schemes, CPU, linears.dtype, Table(file=file, tokens=4))
    assert again == found
    return file


def test_the_keys_are_those_of_a_served_layer(model: Path, table: Path) -> None:
    """The time of a layer is found under the key by which a server orders its kernels: the file serves both."""
    content = timings.read(table)
    assert content.device == "cpu"
    checkpoint = read_checkpoint(export(model, "W4A8_NVFP4_FP8_CFG"))
    dtype = tuning.model_dtype(checkpoint)
    for layer in tuning.layers_of(checkpoint):
        request = tuning.LinearProduct(layer.scheme, "x", layer.name, dtype=dtype).request(
            torch.device("cpu"), layer.n, layer.k
        )
        assert Times(content, 4).of(timings.key_of(request)) == 4.0 * layer.n


def test_a_search_within_a_time(model: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file's times, edited so that FP8 is the fastest of all: a tight time chooses it, tight bits choose W4A8."""
    content = timings.read(table)
    weights = {"nvfp4_32": 2.0, "fp8": 1.0, timings.UNQUANTIZED: 4.0}
    results = []
    for result in content.results:
        factor = next((f for name, f in weights.items() if result.layer.weight.startswith(name)), 2.0)
        results.append(msgspec.structs.replace(result, us={k: [factor * t for t in v] for k, v in result.us.items()}))
    file = tmp_path / "edited.json"
    timings.write(file, msgspec.structs.replace(content, results=results))
    fp8 = sum(4.0 * r.layer.n for r in results if r.layer.weight.startswith("fp8")) * 2  # two layers of each kind
    options = ["--latency-table", str(file), "--latency-tokens", "4", "--target-latency", f"{fp8:g}"]
    argv = arguments(model, tmp_path / "out", *options, "--no-export", "--gpu", "cpu", bits="4.3")
    capsys.readouterr()
    assert main(argv) == 0
    assert f"target {fp8:g} us" in capsys.readouterr().out
    report = read_report(tmp_path / "out/autoquant.json")
    assert (tmp_path / "out" / TRADE_OFF).is_file()
    small, fast = report.results
    assert set(small.choice.formats.values()) == {W4}
    assert small.choice.us == pytest.approx(2 * fp8)
    assert set(fast.choice.formats.values()) == {W8}
    assert fast.choice.us == pytest.approx(fp8)
    again = ["auto-quantize", "--from-state", str(tmp_path / "out/autoquant.json"), "--target-latency"]
    assert main([*again, f"{1.5 * fp8:g}"]) == 0
    assert "the least the formats reach" in failure(capsys, [*again, f"{0.5 * fp8:g}"])


def test_without_a_gpu_the_times_come_from_elsewhere(
    model: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine measures")
    argv = arguments(model, tmp_path / "out", "--target-latency", "10")
    assert "--latency-table: expected a file of times, made on the GPU" in failure(capsys, argv)
    argv += ["--latency-table", str(tmp_path / "none.json")]
    line = failure(capsys, argv)
    assert "measured on a GPU: run the command with --measure-only on a machine with sm90" in line
    assert line.endswith(f"no such file, and {Device.here().name} at hand")
    assert "expected times of sm90, as --gpu says, got cpu" in failure(capsys, [*argv[:-1], str(table)])
    here = [*argv[:-1], str(table), "--gpu", "cpu"]
    assert "--latency-tokens: 3: expected one of 1, 2, 4, 8" in failure(capsys, [*here, "--latency-tokens", "3"])
    assert "--target-latency: 10: expected at least" in failure(capsys, here)
    lacking = timings.read(table)
    file = tmp_path / "lacking.json"
    timings.write(file, msgspec.structs.replace(lacking, results=lacking.results[1:]))
    line = failure(capsys, [*argv[:-1], str(file), "--gpu", "cpu", "--latency-tokens", "4"])
    assert "and 0 more: expected their times" in line
    assert "a file without them" in line
    assert not (tmp_path / "out").exists()


def test_a_layer_without_a_right_kernel(model: Path, table: Path, tmp_path: Path) -> None:
    """Every backend was rejected for every candidate of a group: there is no choice within any time."""
    content = timings.read(table)
    (n, k) = max((result.layer.n, result.layer.k) for result in content.results)
    results = [
        msgspec.structs.replace(result, us={}) if (result.layer.n, result.layer.k) == (n, k) else result
        for result in content.results
    ]
    file = tmp_path / "rejected.json"
    timings.write(file, msgspec.structs.replace(content, results=results))
    formats = find_formats(["W4A8_NVFP4_FP8", "FP8"], "cpu")
    linears = read_linears(model)
    _, groups, schemes = plan_groups(linears, formats, CPU, Rules(), [candidate.name for candidate in formats])
    with pytest.raises(ModelOptExtError, match="expected a time of some candidate, got no kernel that is right"):
        timed(model, groups, schemes, CPU, linears.dtype, Table(file=file, tokens=4))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--latency-tokens", "4"], "--latency-table: expected a file, beside --latency-tokens"),
        (["--measure-only"], "--bits: expected no such option beside --measure-only"),
        (["--latency-table", "no/such/folder/t.json"], "folder: expected one that exists"),
        (["--target-latency", "-1"], "--target-latency: -1: expected a positive number"),
    ],
)
def test_options_that_do_not_go_together(
    more: list[str], match: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert match in failure(capsys, arguments(model, tmp_path / "out", *more))


def test_times_alone_need_a_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["auto-quantize", str(model), "--formats", "FP8", "--measure-only"]
    assert "--latency-table: expected a file, beside --measure-only" in failure(capsys, argv)
    with_file = [*argv, "--latency-table", "times.json", "--gpu", "sm90"]
    if not torch.cuda.is_available():
        assert "measured on a GPU: run the command with --measure-only on a machine with sm90" in failure(
            capsys, with_file
        )


@pytest.mark.gpu
def test_on_a_gpu(model: Path, tmp_path: Path) -> None:
    """Times of the GPU at hand: measured once, read again, and a search within the time halfway to the unquantized model's."""
    table, gpu = tmp_path / "times.json", Device.here().flag
    common = ["--gpu", gpu, "--latency-table", str(table), "--latency-tokens", "16"]
    formats = ["--formats", "W4A8_MXFP4_FP8,FP8"]
    assert main(["auto-quantize", str(model), *formats, *common, "--measure-only"]) == 0
    content = timings.read(table)
    assert content.device == gpu
    written = table.stat().st_mtime_ns
    argv = arguments(model, tmp_path / "bits", *common, "--no-export", formats="W4A8_MXFP4_FP8,FP8", bits="6")
    assert main(argv) == 0
    assert table.stat().st_mtime_ns == written, "nothing was missing"
    state = read_report(tmp_path / "bits/autoquant.json").state
    least, most = state.least("us"), state.unquantized("us")
    assert least > 0
    if least < most:  # layers this small need not be faster in eight bits
        choice = choose(state, Target((least + most) / 2, "us"))
        assert choice.us is not None
        assert choice.us <= (least + most) / 2
