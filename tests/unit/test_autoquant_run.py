"""``sglang-modelopt auto-quantize`` on a tiny model: real searches by ModelOpt, real exports, interruptions and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("modelopt")

from sglang_modelopt_ext.checkpoint.reader import bits_per_weight, check_all_values, read_checkpoint
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.workflow.autoquant import layers, search
from sglang_modelopt_ext.workflow.autoquant.formats import find_formats, try_format
from sglang_modelopt_ext.workflow.autoquant.measure import load_texts, part, perplexity
from sglang_modelopt_ext.workflow.autoquant.state import Layer, Report, read_report
from sglang_modelopt_ext.workflow.autoquant.work_folder import SCORES
from sglang_modelopt_ext.workflow.common.base_model import load_model
from sglang_modelopt_ext.workflow.common.products import FastProducts
from sglang_modelopt_ext.workflow.common.text import load_tokenizer, spread
from sglang_modelopt_ext.workflow.quantize.calibration import CalibrationData
from sglang_modelopt_ext.workflow.quantize.record import read_record
from tests.support.models import TinyModel, model_dir
from tests.support.reference import Reference, difference

TEXT = Path(__file__).resolve().parents[2] / "examples/stdlib_lm/heldout.txt"
FORMATS = "W4A8_NVFP4_FP8,FP8"
SAMPLES, SCORED = 12, 8


@pytest.fixture(scope="module")
def model() -> Path:
    return model_dir(TinyModel(layers=2))


def arguments(model: Path, output: Path, *more: str, formats: str = FORMATS, bits: str = "6.5") -> list[str]:
    """Return a command line on a few short windows."""
    fixed = {"--formats": formats, "--data": str(TEXT), "--gpu": "sm90", "--device": "cpu", "--output": str(output)}
    sizes = {"--samples": str(SAMPLES), "--score-samples": str(SCORED), "--sequence-length": "48"}
    options = [word for pair in (fixed | sizes).items() for word in pair]
    return ["auto-quantize", str(model), "--bits", *bits.split(), *options, *more]


@dataclass(frozen=True)
class Done:
    """A finished search and its output."""

    output: Path
    report: Report
    printed: dict[str, Any]


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Return one search that nothing disturbs."""
    output = tmp_path_factory.mktemp("search") / "out"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr(
            "builtins.print", lambda *words, **options: printed.append(str(words[0])) if not options else None
        )
        assert main([*arguments(model, output), "--json"]) == 0
    return Done(output, read_report(output / "autoquant.json"), json.loads(printed[-1]))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def failure(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Return the one line that a rejected command ends with."""
    capsys.readouterr()
    assert main(argv) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_export_is_what_was_chosen(done: Done) -> None:
    """The strict reader's own view of the folder, the bits measured from its bytes, and its record."""
    assert names(done.output.parent) == {"out"}
    assert {"autoquant.json", "autoquant.png", "README.md", "hf_quant_config.json"} <= names(done.output)
    checkpoint = read_checkpoint(done.output)
    check_all_values(checkpoint)
    (result,) = done.report.results
    algos = {"W4A8_NVFP4_FP8_CFG": "W4A8_NVFP4_FP8", "FP8_DEFAULT_CFG": "FP8"}
    chosen = {
        layer.name.removeprefix("model."): algos[result.choice.formats[group.name]]
        for group in done.report.state.groups
        for layer in group.layers
    }
    assert chosen == {name: linear.scheme.algo for name, linear in checkpoint.linears.items()}
    assert set(chosen.values()) == set(algos.values()), "a mix"
    assert result.choice.bits <= 6.5
    # No layer is left unquantized and nothing is folded: cost, bytes and the reader's own measure agree to the bit.
    assert result.measured.stored_bits == result.choice.bits == pytest.approx(bits_per_weight(checkpoint), abs=1e-12)
    record = read_record(done.output)
    assert record is not None
    assert record.search is not None
    assert record.search["target_bits"] == 6.5
    assert record.search["stored_bits"] == result.measured.stored_bits
    assert record.search["method"] == "gradient"
    assert record.search["groups"]["model.layers.0.self_attn"]["scores"].keys() == algos.keys()
    assert record.simulation == ("cuda" if torch.cuda.is_available() else "cpu")
    assert done.printed["report"] == json.loads((done.output / "autoquant.json").read_bytes())


def texts(model: Path) -> tuple[CalibrationData, CalibrationData, CalibrationData]:
    """Return the windows of the search: to calibrate on, to score, and held out."""
    calibration, held_out = load_texts(
        [str(TEXT)], [], load_tokenizer(model), samples=SAMPLES, sequence_length=48, seed=0, progress=False
    )
    return calibration, part(calibration, spread(calibration.windows, SCORED)), held_out


def test_calibration_decides_what_an_mxfp4_layer_stores() -> None:
    """The preset's layers store no scale of their input; calibrated ones do, and it counts."""
    import modelopt.torch.quantization as mtq

    plain = find_formats(["W4A8_MXFP4_FP8"], "cpu")[0]
    calibrated = try_format("CALIBRATED", {**mtq.W4A8_MXFP4_FP8_CFG, "algorithm": "max"}, "cpu")
    names = [candidate.scheme.activation.name for candidate in (plain, calibrated) if candidate.scheme.activation]
    assert names == ["fp8_per_token", "fp8_static"]
    layer = Layer(name="layer", n=256, k=512)
    costs = [candidate.cost(layer, torch.bfloat16) for candidate in (plain, calibrated)]
    assert costs == [256 * 512 * 4.25, 256 * 512 * 4.25 + 32]


def test_the_export_is_as_near_as_what_was_measured(done: Done, model: Path) -> None:
    """An independent reading of the checkpoint, against ModelOpt's fake-quantized model.

    They differ: ModelOpt simulates W4A8_NVFP4_FP8 under a global scale of amax / 2688 and exports it under amax / 448, and
    it exports FP8 by dividing in bf16. A scale or a layer that is wrong is an order of magnitude further off.
    """
    calibration, _, held_out = texts(model)
    assert held_out.record == done.report.held_out
    fake, _ = load_model(model, "cpu", progress=False)
    formats = find_formats(FORMATS.split(","), "cpu")
    (result,) = done.report.results
    search.Search(
        model=fake,
        method="gradient",
        groups=done.report.state.groups,
        formats=formats,
        calibration=calibration.batches(),
        scoring=None,
        checkpoint=None,
        pick=lambda: result.choice.formats,
        device="cpu",
    ).run()
    assert perplexity(fake, held_out.batches(), "cpu", label="", progress=False) == result.measured.perplexity
    fake.float()
    exported, plain = Reference(done.output), Reference(model)
    apart, quantized = 0.0, 0.0
    for window in held_out.windows:
        with torch.no_grad():
            logprobs = torch.log_softmax(fake(torch.tensor([window])).logits[0], dim=-1)
        apart += difference(exported.logprobs(window), logprobs).divergence
        quantized += difference(plain.logprobs(window), logprobs).divergence
    assert apart < quantized


def test_scores_are_those_of_modelopt(done: Done, model: Path) -> None:
    """``mtq.auto_quantize`` as it is, on the same windows and the same loss."""
    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model)
    calibration, _ = load_texts([str(TEXT)], [], tokenizer, samples=SAMPLES, sequence_length=48, seed=0, progress=False)
    scored = part(calibration, spread(calibration.windows, SCORED))
    state = done.report.state
    assert (calibration.record, scored.record) == (state.calibration, state.scored)
    passes: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            passes.append(0)
            return iter((scored if len(passes) > 2 else calibration).batches())

    plain = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    with FastProducts():  # sums in the same order: another one moves values over the edges of FP8's codes
        _, found = mtq.auto_quantize(
            plain,
            constraints={"effective_bits": 6.5},
            quantization_formats=[mtq.W4A8_NVFP4_FP8_CFG, mtq.FP8_DEFAULT_CFG],
            data_loader=Loader(),
            forward_step=lambda model, batch: model(input_ids=batch, labels=batch),
            loss_func=lambda output, batch: output.loss * state.loss_scale,
            num_calib_steps=SAMPLES,
            num_score_steps=SCORED,
            disabled_layers=["*lm_head*"],
        )
    assert len(passes) == 3, "two calibrations, one scoring"
    theirs = {
        frozenset(entry["module_names"]): dict(
            zip((f.num_bits for f in entry["formats"]), entry["scores"], strict=True)
        )
        for entry in found["candidate_stats"].values()
    }
    for group in state.groups:
        scores = theirs[frozenset(layer.name for layer in group.layers)]
        for name, bits in (("W4A8_NVFP4_FP8_CFG", 4), ("FP8_DEFAULT_CFG", 8)):
            score = group.candidates[name].score
            assert score == pytest.approx(scores[bits] / state.loss_scale**2, rel=1e-3), (group.name, name)


@pytest.mark.parametrize("bits", [4.5, 5.0, 8.0])
def test_a_new_target_from_the_state(done: Done, bits: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds, and no more than the file: no model, no text, no ModelOpt."""
    begin = time.process_time()
    assert (
        main(["auto-quantize", "--bits", str(bits), "--from-state", str(done.output / "autoquant.json"), "--json"]) == 0
    )
    assert time.process_time() - begin < 5
    (result,) = json.loads(capsys.readouterr().out)["report"]["results"]
    assert bits - 1 < result["choice"]["bits"] <= bits
    assert names(done.output.parent) == {"out"}


def test_an_export_from_the_state_is_that_of_a_search(done: Done, model: Path, tmp_path: Path) -> None:
    """Byte for byte: the state and the text are all it takes."""
    command = ["auto-quantize", str(model), "--bits", "6.5", "--from-state", str(done.output / "autoquant.json")]
    assert main([*command, "--output", str(tmp_path / "again"), "--device", "cpu"]) == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (done.output / file).read_bytes()


def test_a_state_of_another_model_or_text(
    done: Done, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, output = str(done.output / "autoquant.json"), str(tmp_path / "out")
    other = str(model_dir(TinyModel(layers=2, seed=5)))
    command = ["--bits", "6", "--from-state", state, "--output", output]
    assert "model: expected the one" in failure(capsys, ["auto-quantize", other, *command])
    text = tmp_path / "other.txt"
    text.write_text("Quite another text, again and again.\n" * 400)
    message = failure(capsys, ["auto-quantize", str(model), *command, "--data", str(text)])
    assert "--data" in message
    assert "expected the text" in message
    assert names(tmp_path) == {"other.txt"}


def count_windows(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Count the scored windows, and interrupt like Ctrl-C at one of them."""
    lengths: list[int] = []
    loss = search.Search._loss

    def counted(self: search.Search, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        lengths.append(batch.shape[1])
        if len(lengths) == stop_at:
            raise KeyboardInterrupt
        return loss(self, logits, batch)

    monkeypatch.setattr(search.Search, "_loss", counted)
    monkeypatch.setattr(search, "SAVE_SECONDS", 0.0)
    return lengths


def test_ctrl_c_and_resume(
    done: Done, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 130, nothing but the work folder; it goes on after the windows that were done, to the same result."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        seen = count_windows(patch, stop_at=1 + 6)  # the first one finds the loss scale
        assert main(arguments(model, output)) == 130
        assert ".out.autoquant: --resume continues it" in capsys.readouterr().err
        assert len(seen) == 7
    assert names(tmp_path) == {".out.autoquant"}
    assert (tmp_path / ".out.autoquant").stat().st_mode & 0o777 == 0o700
    message = failure(capsys, arguments(model, output))
    assert message.endswith("expected --resume to continue it, or --overwrite to discard it, got an interrupted search")
    other = failure(capsys, arguments(model, output, "--resume", formats="FP8,NVFP4"))
    assert "manifest.json: formats, groups: expected what the interrupted search was asked for, got another" in other
    with monkeypatch.context() as patch:
        seen = count_windows(patch)
        assert main(arguments(model, output, "--resume")) == 0
        assert len(seen) == SCORED - 5
    assert names(tmp_path) == {"out"}
    assert read_report(output / "autoquant.json") == done.report
    assert (output / "model.safetensors").read_bytes() == (done.output / "model.safetensors").read_bytes()


@pytest.mark.full
def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed while it scores leaves what the next one needs."""
    model, output, windows = model_dir(TinyModel(layers=1)), tmp_path / "out", 32
    more = ("--score-samples", str(windows), "--samples", str(windows))
    command = [sys.executable, "-m", "sglang_modelopt_ext.cli", *arguments(model, output, *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        saved = tmp_path / ".out.autoquant" / SCORES
        while not saved.exists():
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = json.loads(saved.read_bytes())["progress"]["windows"]
    assert 0 < before < windows
    assert not output.exists()
    seen = count_windows(monkeypatch)
    assert main(arguments(model, output, *more, "--resume")) == 0
    assert len(seen) == windows - before
    assert read_report(output / "autoquant.json").state.scored.samples == windows
    assert names(tmp_path) == {"out"}


def test_several_targets_and_kl(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint for each, the counted lm_head, an excluded layer, both plots, the text result.

    Interrupted between the two, it keeps the first checkpoint and does not make it again.
    """
    output = tmp_path / "out"
    more = [
        "--method",
        "kl_div",
        "--lm-head",
        "counted",
        "--exclude",
        "*layers.1.mlp.down_proj",
        "--score-samples",
        "2",
    ]
    command = arguments(model, output, *more, bits="9.5 8.5")

    def interrupted(*args: Any, label: str, **options: Any) -> float:
        if "8.5" in label:
            raise KeyboardInterrupt
        return perplexity(*args, label=label, **options)

    with monkeypatch.context() as patch:
        patch.setattr("sglang_modelopt_ext.workflow.autoquant.run.perplexity", interrupted)
        assert main(command) == 130
    assert names(output) == {"9.5-bits"}
    inode = (output / "9.5-bits" / "model.safetensors").stat().st_ino
    assert main([*command, "--resume"]) == 0
    assert (output / "9.5-bits" / "model.safetensors").stat().st_ino == inode
    assert names(tmp_path) == {"out"}
    assert names(output) == {"autoquant.json", "autoquant.png", "autoquant-perplexity.png", "9.5-bits", "8.5-bits"}
    report = read_report(output / "autoquant.json")
    for result in report.results:
        checkpoint = read_checkpoint(output / str(result.measured.folder))
        assert "layers.1.mlp.down_proj" not in checkpoint.linears
        assert result.measured.stored_bits == pytest.approx(result.choice.bits, abs=1e-12)
        assert result.measured.stored_bits > bits_per_weight(checkpoint), "unquantized layers count"
    first, second = (result.choice for result in report.results)
    assert first.score < second.score
    printed = capsys.readouterr().out
    assert "lm_head counted, unquantized" in printed
    assert "model.layers.1.mlp.down_proj" in printed
    assert "left unquantized" in printed


def test_no_export(done: Done, model: Path, tmp_path: Path) -> None:
    """From a state: two targets measured and drawn, nothing written but the report."""
    state = str(done.output / "autoquant.json")
    more = ["--from-state", state, "--output", str(tmp_path / "out"), "--no-export", "--device", "cpu"]
    assert main(["auto-quantize", str(model), "--bits", "6", "5", *more]) == 0
    assert names(tmp_path / "out") == {"autoquant.json", "autoquant.png", "autoquant-perplexity.png"}
    assert names(tmp_path) == {"out"}
    report = read_report(tmp_path / "out" / "autoquant.json")
    assert report.state == done.report.state
    assert all(result.measured.perplexity is not None for result in report.results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": "FP8,W4A8_NVFP4_FP9"}, "expected a ModelOpt format, such as W4A8_NVFP4_FP8"),
        ({"formats": "FP8,NVFP4_SVDQUANT"}, "NVFP4_SVDQUANT_DEFAULT_CFG: expected a calibration that .* got svdquant"),
        ({"formats": "FP8,FP8_DEFAULT_CFG"}, "every format once, got FP8_DEFAULT_CFG twice"),
        ({"formats": "NVFP4_MLP_ONLY"}, "a format for any linear layer, got one that picks layers by name"),
        ({"formats": "NVFP4_FP8_MHA"}, "a format of linear layers, got one that quantizes attention too"),
        (
            {"formats": "MXINT8"},
            "MXINT8_DEFAULT_CFG: expected blocks of no size, as W8A8_SQ_PER_CHANNEL is served, got 32",
        ),
        (
            {"formats": "MXFP6"},
            "MXFP6_DEFAULT_CFG: expected a format ModelOpt can simulate and export, got NotImplemented",
        ),
        ({"bits": "4.2"}, r"--bits: 4.2: expected at least 4\.25\d*, the fewest the formats reach, got 4.2"),
        ({"bits": "16"}, "expected less than 16"),
        ({"bits": "6 6"}, "each of them once"),
        ({"more": ("--exclude", "*nothing*")}, r"--exclude: \*nothing\*: expected a pattern of layers such as model"),
        ({"more": ("--data", "empty.txt")}, "calibration data: .*empty.txt: expected"),
        ({"more": ("--data", "short.txt")}, "calibration data: .*short.txt: expected"),
        ({"more": ("--resume",)}, "--resume: expected an interrupted search, got none"),
    ],
)
def test_refusals(
    changes: dict[str, Any],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names what is wrong, exit code 2, before the model is loaded, and nothing left behind."""
    import re

    monkeypatch.setattr("sglang_modelopt_ext.workflow.autoquant.run.load_model", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("import os\n")
    monkeypatch.chdir(tmp_path)
    more = changes.pop("more", ())
    line = failure(capsys, [*arguments(model, tmp_path / "out", **changes), *more])
    assert re.search(message, line), line
    assert names(tmp_path) == {"empty.txt", "short.txt"}


def test_formats_the_gpu_cannot_serve(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dispatch for the target decides which formats it can serve, not this machine."""
    monkeypatch.setenv("SGLANG_MODELOPT_EXT_GEMM", "triton_block_scaled")
    line = failure(capsys, arguments(model, tmp_path / "out"))
    assert (
        "--formats: FP8_DEFAULT_CFG on sm90, model.layers.0.self_attn.q_proj: FP8: expected a kernel that serves it"
        in line
    )
    assert "triton_block_scaled fp8 weights have no 4-bit blocks" in line


def test_what_is_in_the_way_is_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    for more, bits in (((), "6"), (("--overwrite",), "6"), (("--overwrite",), "5 6"), (("--no-export",), "6")):
        assert "output: expected" in failure(capsys, arguments(model, tmp_path / "out", *more, bits=bits))
    assert names(tmp_path / "out") == {"thesis.txt"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bits", "5"], "MODEL: expected a value: only --from-state does without"),
        (["--bits", "0", "--from-state", "x"], "--bits: 0: expected a positive number"),
        (
            ["--bits", "5", "--from-state", "x", "--formats", "FP8"],
            "--formats: expected no such flag beside --from-state",
        ),
        (["--bits", "5", "--from-state", "x", "--resume"], "--resume: expected no such flag beside --from-state"),
        (["--bits", "5", "--from-state", "x", "--output", "y"], "MODEL: expected the model, which --output needs"),
        (["m", "--bits", "5", "--from-state", "x"], "--output: expected a folder"),
        (["--bits", "5", "--from-state", "/no/such/file"], "/no/such/file: --from-state: expected a readable"),
    ],
)
def test_command_lines_that_make_no_sense(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failure(capsys, ["auto-quantize", *argv])


def test_fused_layers_share_a_group(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt groups the layers that SGLang fuses; otherwise the model is rejected."""
    groups = layers.read_linears(model).groups
    assert [layer.name.rpartition(".")[2] for layer in groups["model.layers.0.self_attn"]] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    assert [layer.name.rpartition(".")[2] for layer in groups["model.layers.1.mlp"]] == ["gate_proj", "up_proj"]
    monkeypatch.setattr(layers, "_group_of", lambda name: name)
    with pytest.raises(ValueError, match="q_proj: expected one group with k_proj, which SGLang fuses it with, got two"):
        layers.read_linears(model)


def failing(error: Exception) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


def test_modelopt_failing_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress is kept for ``--resume``, after an error too."""
    monkeypatch.setattr(search.Search, "_loss", failing(RuntimeError("no memory\nleft")))
    line = failure(capsys, arguments(model, tmp_path / "out"))
    assert line.endswith("auto_quantize: expected ModelOpt to search over it, got RuntimeError: no memory left")
    assert names(tmp_path) == {".out.autoquant"}
    assert os.listdir(tmp_path / ".out.autoquant")  # noqa: PTH208
