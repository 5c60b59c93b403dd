"""From a checkpoint to a tuning file to the dispatch: the loop on a CPU, with times that are given instead of measured."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_modelopt_ext.backends import select, self_test, timings
from sglang_modelopt_ext.backends.base import LinearRequest
from sglang_modelopt_ext.backends.linear.dense import Dense
from sglang_modelopt_ext.backends.timings import FORMAT, LayerKey, Result, TuningFile, key_of
from sglang_modelopt_ext.checkpoint.reader import Checkpoint, read_checkpoint
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import GEMM, TUNING
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.linear import LinearProduct
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_ext.tuning import __main__ as tune
from sglang_modelopt_ext.tuning import run as tuning
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from tests.layers.test_products import folder_of
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

TOKENS = (1, 40)


class Renamed(Dense):
    """The reference path under another name, which gives a choice on a CPU."""

    def __init__(self, name: str, factor: float = 1.0) -> None:
        super().__init__(torch.float32, ("cpu",))
        self.name, self.factor = name, factor

    def matmul(self, *arguments: object) -> torch.Tensor:  # type: ignore[override]
        return super().matmul(*arguments) * self.factor  # type: ignore[arg-type]


class WrongInItsSize(Renamed):
    """A backend that passes the self-test, whose layer is small, and errs on every wider one."""

    def matmul(self, *arguments: object) -> torch.Tensor:  # type: ignore[override]
        y = super().matmul(*arguments)
        return y if y.shape[1] == self_test.N else y * 1.1


FIRST, SECOND = Renamed("first"), Renamed("second")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(select, "BACKENDS", (FIRST, SECOND))
    timings._table.cache_clear()
    self_test._passed.clear()
    yield
    timings._table.cache_clear()
    self_test._passed.clear()


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return read_checkpoint(export(model_dir(TinyModel("llama")), "W4A8_NVFP4_FP8_CFG"))


def in_turn(*times: float) -> tuple[Callable[[Callable[[int], object]], float], list[float]]:
    """Return a timer that calls once and says the given times one after the other, and the times it has said."""
    said: list[float] = []

    def timer(call: Callable[[int], object]) -> float:
        assert isinstance(call(len(said)), torch.Tensor)
        said.append(times[len(said) % len(times)])
        return said[-1]

    return timer, said


def measured(checkpoint: Checkpoint, *times: float, backends: tuple[Dense, ...] = (FIRST, SECOND)) -> TuningFile:
    timer, _ = in_turn(*times)
    return tuning.tune(
        checkpoint.folder, tokens=TOKENS, device="cpu", timer=timer, backends=backends, report=lambda _: None
    )


def choice(checkpoint: Checkpoint, layer: tuning.Layer) -> str:
    """Return the backend of a layer, found like in a server."""
    product = LinearProduct(layer.scheme, checkpoint.folder, layer.name, dtype=tuning.model_dtype(checkpoint))
    stored = tuning.random_shard(layer.scheme, layer.n, layer.k, product.dtype, torch.device("cpu"))
    product.prepare(torch.nn.Module(), [stored], layer.n, layer.k)
    return product.backend.name


def test_the_loop(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint, measurement, file, choice."""
    kinds = tuning.layers_of(checkpoint)
    content = measured(checkpoint, 30.0, 30.0, 10.0, 20.0)  # first, then second, for every layer
    assert [(result.layer.n, result.layer.k) for result in content.results] == [(kind.n, kind.k) for kind in kinds]
    assert all(result.us == {"first": [30.0, 30.0], "second": [10.0, 20.0]} for result in content.results)
    assert content.gpu == "cpu"
    assert content.tokens == list(TOKENS)
    path = tmp_path / timings.file_name("cpu")
    timings.write(path, content)
    assert timings.read(path) == content
    assert [choice(checkpoint, kind) for kind in kinds] == ["first"] * len(kinds)
    monkeypatch.setenv(TUNING.variable, str(path))
    assert [choice(checkpoint, kind) for kind in kinds] == ["second"] * len(kinds)
    other = dataclasses.replace(kinds[0], n=2 * kinds[0].n)
    assert choice(checkpoint, other) == "first", "a layer the file does not know keeps the built-in order"
    monkeypatch.setenv(GEMM.variable, "first,second")
    assert choice(checkpoint, kinds[0]) == "first", "what the user names is not reordered"


def test_every_layer_of_a_model(checkpoint: Checkpoint) -> None:
    """Fused as SGLang fuses them, alike ones once."""
    config = json.loads((checkpoint.folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    count = config["num_hidden_layers"]
    found = {kind.name.rpartition(".")[2]: (kind.n, kind.k, kind.count) for kind in tuning.layers_of(checkpoint)}
    wanted = {
        "qkv_proj": (q + 2 * kv, hidden, count),
        "o_proj": (hidden, q, count),
        "gate_up_proj": (2 * inner, hidden, count),
        "down_proj": (hidden, inner, count),
    }
    shapes = {(n, k) for n, k, _ in wanted.values()}
    assert {(n, k) for n, k, _ in found.values()} == shapes
    assert sum(count for *_, count in found.values()) == sum(count for *_, count in wanted.values())
    ranks = {(kind.n, kind.k) for kind in tuning.layers_of(checkpoint, 2)}
    assert ranks == {((q + 2 * kv) // 2, hidden), (hidden, q // 2), (inner, hidden), (hidden, inner // 2)}
    shared = 2 * config["num_key_value_heads"]
    if q % shared == inner % shared == 0:  # every two ranks share a KV head
        assert (q // shared + 2 * head, hidden) in {(kind.n, kind.k) for kind in tuning.layers_of(checkpoint, shared)}
    for tp_size in (0, 7):
        with pytest.raises(ModelOptExtError, match="--tp-size"):
            tuning.layers_of(checkpoint, tp_size)


def test_a_wrong_backend_is_not_timed(checkpoint: Checkpoint) -> None:
    wrong, late = Renamed("wrong", 1.1), WrongInItsSize("late")
    timer, said = in_turn(5.0)
    content = tuning.tune(
        checkpoint.folder,
        tokens=TOKENS,
        device="cpu",
        timer=timer,
        backends=(wrong, late, SECOND),
        report=lambda _: None,
    )
    for result in content.results:
        assert result.us == {"second": [5.0, 5.0]}
        assert "wrong: is wrong on cpu" in result.refused["wrong"]
        assert "is wrong: relative error" in result.refused["late"]
    assert len(said) == len(TOKENS) * len(content.results)


def asked(**fields: object) -> LinearRequest:
    scheme = SCHEMES["FP8"]
    layer = LayerScheme("FP8", WEIGHT_FORMATS["fp8"], scheme.activation_format())
    return LinearRequest(layer, Device.cpu(), **({"n": 64, "k": 256, "gpu": "cpu"} | fields))  # type: ignore[arg-type]


def a_file(us: dict[str, list[float]], **fields: object) -> TuningFile:
    content = TuningFile(FORMAT, "cpu", timings.versions(), list(TOKENS), [Result(key_of(asked()), us)])
    return msgspec.structs.replace(content, **fields)


@given(
    times=st.dictionaries(
        st.sampled_from(["first", "second", "gone", "third"]),
        st.lists(st.floats(0.1, 1e6), min_size=2, max_size=2),
        max_size=4,
    ),
    order=st.randoms(use_true_random=False),
)
def test_the_same_file_gives_the_same_order(
    tmp_path_factory: pytest.TempPathFactory, times: dict[str, list[float]], order: object
) -> None:
    """The order of a file's entries does not matter, and every backend of the built-in order is in it once."""
    names = list(times)
    order.shuffle(names)  # type: ignore[attr-defined]
    choices = []
    for us in (times, {name: times[name] for name in names}):
        path = tmp_path_factory.mktemp("tuning") / "file.json"
        timings.write(path, a_file(us))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(TUNING.variable, str(path))
            choices.append([backend.name for backend in select.candidates(asked(), "layer")])
    assert choices[0] == choices[1]
    assert sorted(choices[0]) == ["first", "second"]
    if times.keys() >= {"first", "second"} and times["second"] < times["first"]:
        products = {name: times[name][0] * times[name][1] for name in ("first", "second")}
        assert (choices[0][0] == "second") == (products["second"] < products["first"]) or abs(
            products["second"] / products["first"] - 1
        ) < 1e-12


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gpu": "NVIDIA H100 80GB HBM3"}, "was measured on NVIDIA H100 80GB HBM3, this is cpu"),
        ({"versions": {}}, "was measured with sglang-modelopt-ext none, here is"),
        ({"versions": timings.versions() | {"torch": "1.0"}}, "was measured with torch 1.0, here is"),
        (
            {"versions": timings.versions() | {"quack-kernels": "0.6.5"}},
            "was measured with quack-kernels 0.6.5, here is none",
        ),
    ],
)
def test_another_gpu_is_ignored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, object],
    reason: str,
) -> None:
    path = tmp_path / "file.json"
    timings.write(path, a_file({"second": [1.0, 1.0]}, **fields))
    monkeypatch.setenv(TUNING.variable, str(path))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert select.candidates(asked(), "layer")[0] is FIRST
    assert [message for message in caplog.messages if reason in message and str(path) in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own files are read without being named, and the user's comes before them."""
    monkeypatch.setattr(timings, "SHIPPED", tmp_path)
    timings.write(tmp_path / "other.json", a_file({"second": [1.0, 1.0]}, gpu="another"))
    assert select.candidates(asked(), "layer")[0] is FIRST
    timings._table.cache_clear()
    timings.write(tmp_path / "this.json", a_file({"second": [1.0, 1.0]}))
    assert select.candidates(asked(), "layer")[0] is SECOND
    own = tmp_path / "own" / "file.json"
    own.parent.mkdir()
    timings.write(own, a_file({"first": [1.0, 1.0]}))
    monkeypatch.setenv(TUNING.variable, str(own))
    assert select.candidates(asked(), "layer")[0] is FIRST


def test_what_is_shipped_is_readable() -> None:
    paths = list(timings.SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        assert timings.read(path).results


GOOD = json.loads(msgspec.json.encode(a_file({"first": [1.0, 2.0]})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "content: expected what `python -m sglang_modelopt_ext.tuning` writes"),
        ("[]", "content: expected"),
        (json.dumps(GOOD | {"extra": 1}), "unknown field `extra`"),
        (json.dumps({name: value for name, value in GOOD.items() if name != "gpu"}), "missing required field `gpu`"),
        (json.dumps(GOOD | {"tokens": ["1"]}), r"Expected `int`, got `str`"),
        (json.dumps(GOOD | {"format": 2}), "format: expected 1, got 2"),
        (json.dumps(GOOD | {"tokens": [1]}), r"results.us.first: expected 1 times above zero, got \[1.0, 2.0\]"),
        (json.dumps(GOOD | {"results": GOOD["results"] * 2}), "results: expected every layer once"),
        (json.dumps(GOOD).replace("[1.0, 2.0]", "[0.0, 2.0]"), "expected 2 times above zero"),
        (json.dumps(GOOD).replace("[1.0, 2.0]", "[1.0, null]"), "Expected `float`, got `null`"),
        (None, "file: expected a tuning file, got No such file"),
    ],
)
def test_a_file_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(TUNING.variable, str(path))
    with pytest.raises(ModelOptExtError, match=message) as caught:
        select.candidates(asked(), "layer")
    assert str(caught.value).startswith(f"{path}: ")


def test_adding_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    content = a_file({"first": [1.0, 2.0]})
    assert tuning.merge(path, content) == content
    timings.write(path, content)
    other = Result(key_of(asked(n=128)), {"second": [3.0, 4.0]})
    both = tuning.merge(path, msgspec.structs.replace(content, results=[other]))
    assert both.results == [*content.results, other]
    again = Result(key_of(asked()), {"first": [9.0, 9.0]})
    assert tuning.merge(path, msgspec.structs.replace(content, results=[again])).results == [again]
    for fields, reason in (({"gpu": "another"}, "measured on cpu"), ({"tokens": [1, 2]}, r"measured for \[1, 40\]")):
        with pytest.raises(ModelOptExtError, match=reason):
            tuning.merge(path, msgspec.structs.replace(content, **fields))  # type: ignore[arg-type]


def test_keys_tell_layers_apart() -> None:
    """Every field of a request that changes what is computed is in the key."""
    plain = key_of(asked())
    assert plain == LayerKey("fp8", "fp8_static", False, 0, "exact", "bfloat16", 64, 256)
    for fields in ({"n": 65}, {"k": 257}, {"dtype": torch.float16}, {"math": "fp8"}):
        assert key_of(asked(**fields)) != plain


def test_the_command(capsys: pytest.CaptureFixture[str], checkpoint: Checkpoint) -> None:
    if not torch.cuda.is_available():
        assert tune.main(["--model", str(checkpoint.folder)]) == 1
        expected = "ModelOptExtError: command line: device: expected an NVIDIA GPU to measure on, got CPU\n"
        assert capsys.readouterr().err == expected
    for tokens in ("0", "1,1", "x"):
        with pytest.raises(SystemExit):
            tune.main(["--model", "x", "--tokens", tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["W4A8_NVFP4_FP8_CFG", "NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT4_AWQ_CFG"])
def test_on_a_gpu(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    folder = folder_of(recipe, "llama")
    path = tmp_path / "file.json"
    assert tune.main(["--model", str(folder), "--tokens", "1,64", "--output", str(path)]) == 0
    content = timings.read(path)
    assert all(result.us for result in content.results)
    monkeypatch.setenv(TUNING.variable, str(path))
    kind = tuning.layers_of(read_checkpoint(folder))[0]
    product = LinearProduct(kind.scheme, folder, kind.name)
    request = product.request(torch.device("cuda"), kind.n, kind.k)
    assert next(backend.name for backend in select.candidates(request, "layer")) == timings.ranking(request)[0]
