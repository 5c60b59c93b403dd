"""``evaluate`` without servers: intervals, the plot, lm-eval's results, and errors before a server starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from sglang_modelopt_ext.cli.evaluate import EvaluateResult, Evaluation
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.evaluate.measure import mean_divergence, perplexity
from sglang_modelopt_ext.workflow.evaluate.plots import plot_intervals
from sglang_modelopt_ext.workflow.evaluate.score import (
    Interval,
    Scores,
    check_same_tokens,
    divergence_interval,
    perplexity_interval,
    ratio_interval,
    score,
)
from sglang_modelopt_ext.workflow.evaluate.tasks import task_scores
from sglang_modelopt_ext.workflow.server.client import ServerClient
from tests.support import edits
from tests.support.models import TinyModel, model_dir
from tests.unit.test_workflow_evaluate import VOCABULARY, FakeServer

WINDOWS = 24
LENGTHS = np.random.default_rng(3).integers(5, 40, WINDOWS)


def scores(seed: int, noise: float = 0.0) -> Scores:
    """Return scores of windows that differ much; ``noise`` is another model's distance from the first."""
    rng = np.random.default_rng(0)
    level = rng.normal(3.0, 0.7, WINDOWS)
    other = np.random.default_rng(seed).normal(0.0, noise, WINDOWS) if noise else 0.0
    return Scores((level + other) * LENGTHS, LENGTHS, [])


def test_the_value_is_the_perplexity_over_all_tokens() -> None:
    found = perplexity_interval(scores(1))
    losses = scores(1).losses
    tokens = [np.full(length, -loss / length) for loss, length in zip(losses, LENGTHS, strict=True)]
    assert found.value == pytest.approx(perplexity(tokens), rel=1e-6)
    assert found.low < found.value < found.high


def test_the_interval_covers_as_often_as_it_says() -> None:
    """1.96 standard errors of a mean of equal windows, to within a bootstrap's own scatter."""
    rng = np.random.default_rng(1)
    losses = rng.normal(2.0, 0.5, 200)
    found = perplexity_interval(Scores(losses * 10, np.full(200, 10), []))
    half = 1.96 * losses.std() / np.sqrt(200)
    assert np.log(found.high) - np.log(found.value) == pytest.approx(half, rel=0.1)
    assert np.log(found.value) - np.log(found.low) == pytest.approx(half, rel=0.1)


def test_paired_windows_tell_apart_what_separate_ones_do_not() -> None:
    first, second = scores(1), scores(2, noise=0.02)
    shifted = Scores(second.losses + 0.05 * LENGTHS, second.tokens, second.rows)
    ratio = ratio_interval(shifted, first)
    assert ratio.value == pytest.approx(perplexity_interval(shifted).value / perplexity_interval(first).value)
    assert ratio.low > 1, "a difference"
    alone = perplexity_interval(first)
    assert alone.low < perplexity_interval(shifted).value < alone.high, "hidden in the scatter of the windows"
    same = ratio_interval(first, first)
    assert (same.low, same.value, same.high) == (1, 1, 1)


@pytest.mark.parametrize("budget", [1 << 20, 2 * VOCABULARY * 3])
def test_scores_of_a_server_and_of_another_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Distributions of the first are kept, as many as the budget allows; those of the other are compared and dropped."""
    monkeypatch.setattr("sglang_modelopt_ext.workflow.evaluate.score.BUDGET", budget)
    (tmp_path / "config.json").write_text(f'{{"vocab_size": {VOCABULARY}}}')
    windows = [[0, 5, 6, 7, 1], [0, 8, 9]]
    servers = [FakeServer(tmp_path, seed) for seed in (0, 1)]
    first = score(cast(ServerClient, servers[0]), windows, progress=False)
    other = score(cast(ServerClient, servers[1]), windows, first, progress=False)
    lengths = [min(3, len(window) - 1) if budget < 1 << 20 else len(window) - 1 for window in windows]
    assert [len(rows) for rows in first.rows] == lengths
    assert (other.rows, other.tokens.tolist()) == ([], [4, 2])
    direct = [servers[1].input_logprobs(window) for window in windows]
    assert perplexity_interval(other).value == pytest.approx(perplexity(direct), rel=1e-6)
    rows = [servers[1].full_vocab_logprobs(window, last) for window, last in zip(windows, lengths, strict=True)]
    found = divergence_interval(other)
    assert found.value == pytest.approx(mean_divergence(first.rows, rows), rel=1e-6)
    assert found.low <= found.value <= found.high
    with pytest.raises(ValueError, match="compared with a reference"):
        divergence_interval(first)


def evaluation(name: str, value: float) -> Evaluation:
    interval = Interval(value=value, low=value - 1, high=value + 1)
    return Evaluation(
        checkpoint=name,
        algo="FP8",
        bits_per_weight=8.0,
        bytes=1_000_000,
        perplexity=interval,
        ratio=None,
        divergence=interval,
        tasks=task_scores({"words": {"alias": "words", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,strict": 0.25}}),
    )


def test_text() -> None:
    result = EvaluateResult(
        tokens=7,
        windows=2,
        compared=5,
        checkpoints=[evaluation("a", 2.0), evaluation("b", 3.0)],
        plot=None,
        notes=["assumed"],
    )
    lines = result.text().splitlines()
    numbers = "2.000 [1.000, 3.000] - 2.00000 [1.00000, 3.00000]"
    assert " ".join(lines[2].split()) == f"a FP8 8.00 1.00 MB {numbers}"
    assert [line.split() for line in lines if "acc" in line] == [[name, "words", "acc", "0.5000", "-"] for name in "ab"]
    assert "f1 (strict)" in result.text()
    assert "over 7 tokens in 2 windows, KL over the whole vocabulary at 5 of them" in result.text()
    assert lines[-1] == "note: assumed"


def test_plot(tmp_path: Path) -> None:
    interval = Interval(value=2.0, low=1.0, high=4.0)
    file = tmp_path / "new" / "plot.png"
    plot_intervals([("perplexity", ["a", "b"], [interval] * 2), ("KL", ["b"], [interval])], "title", file)
    assert file.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(ModelOptExtError, match="expected a file that can be written"):
        plot_intervals([("perplexity", ["a"], [interval])], "title", tmp_path / "file" / "plot.png")


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    check_same_tokens([[1, 2], [3]], [(1, 2), (3,)], tmp_path)
    with pytest.raises(ModelOptExtError, match="tokenizer: expected the tokens of the first checkpoint"):
        check_same_tokens([[1, 2], [4]], [[1, 2], [3]], tmp_path)


@pytest.mark.parametrize("package", ["lm_eval", "matplotlib"])
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    option = ["--tasks", "hellaswag"] if package == "lm_eval" else ["--plot", "plot.png"]
    assert main(["evaluate", str(model_dir(TinyModel("llama"))), *option]) == 2
    name = package.replace("_", "-")
    assert f"the package {name} (pip install 'sglang-modelopt-ext[evaluate]')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--samples", "0"), "--samples: expected 1 or more, got 0"),
        (("--sequence-length", "2048"), "--sequence-length: expected less than the 2048 positions"),
        (("--dtype", "int8"), "--dtype: expected auto or one of bfloat16"),
        (("--data", "/no/such.txt"), "/no/such.txt: expected a .txt, .jsonl, .parquet file"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_bad_input(capsys: pytest.CaptureFixture[str], command: str, args: tuple[str, ...], message: str) -> None:
    assert main([command, str(model_dir(TinyModel("llama"))), *args]) == 2
    assert message in capsys.readouterr().err


def test_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert main(["verify", str(model_dir(TinyModel("llama"))), "--data", str(tmp_path / "empty.txt")]) == 2
    assert "--data: expected text of two tokens or more, got none" in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(model_dir(TinyModel("llama"))), "--url", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9: server: expected an answer, got" in capsys.readouterr().err


def test_a_quantized_base_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Before a server is started."""
    base = edits.copy_with(model_dir(TinyModel("llama")), tmp_path / "base")
    (base / edits.QUANT_CONFIG).write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert main(["verify", str(model_dir(TinyModel("llama"))), "--base", str(base)]) == 2
    assert "--base: expected the unquantized model, got a quantized one" in capsys.readouterr().err
