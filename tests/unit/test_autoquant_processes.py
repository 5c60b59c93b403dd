"""``auto-quantize`` in several processes: the result of one, one error that ends all, a search that any number of them resume."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("modelopt")

from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.parallel import reduces
from sglang_modelopt_ext.workflow.autoquant.sums import added
from sglang_modelopt_ext.workflow.common.processes import Processes, joined
from sglang_modelopt_ext.workflow.quantize.calibration import CalibrationData
from sglang_modelopt_ext.workflow.quantize.record import Calibration
from tests.support import failing_search
from tests.support.models import TinyModel, model_dir
from tests.support.moe import tiny
from tests.unit.test_autoquant_kv import CACHE
from tests.unit.test_autoquant_run import FORMATS, SCORED, arguments, count_windows, failure, names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> Path:
    return model_dir(TinyModel(layers=2))


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the result of one process."""
    output = tmp_path_factory.mktemp("one") / "out"
    assert main(arguments(model, output)) == 0
    return output


def several(argv: Sequence[str], count: int = 2, fail: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in several processes over gloo, of as many threads as this one.

    Args:
        argv: the command line.
        count: the number of processes.
        fail: for :mod:`tests.support.failing_search`.
    """
    module = "tests.support.failing_search" if fail else "sglang_modelopt_ext.cli"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "GLOO_SOCKET_IFNAME": "lo", "FAIL": fail}
    return subprocess.run(
        [*launcher, "-m", module, *argv],
        cwd=ROOT,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=False,
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines of this package's errors. The launcher's own report is no such line."""
    assert done.returncode != 0
    print(done.stderr)
    return [line for line in done.stderr.splitlines() if line.startswith(("ModelOptExtError", "OtherProcessFailed"))]


def same_files(first: Path, second: Path) -> None:
    """Check that two folders have the same files, byte for byte; a model card names its folder."""
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert files == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert Path("autoquant.json") in files
    different = [str(file) for file in files if (first / file).read_bytes() != (second / file).read_bytes()]
    assert not [file for file in different if not file.endswith("README.md")]


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "formats", "bits", "more", "count"),
    [
        pytest.param("dense", FORMATS, "6.5 5", CACHE, 2, id="gradient-cache-two-targets"),
        pytest.param("dense", "NVFP4_AWQ,INT8_SMOOTHQUANT", "6.5", ("--method", "kl_div", *CACHE), 3, id="kl-awq"),
        pytest.param("dense", FORMATS, "6.5", ("--scored-as", "export"), 2, id="export"),
        pytest.param(
            "dense",
            "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN,NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP,NVFP4_AWQ_CLIP",
            "9",
            (),
            3,
            id="hessian-mse-clip",
        ),
        pytest.param("mixture", "NVFP4,FP8", "6.5", (), 2, id="mixture"),
    ],
)
def test_several_processes_make_the_files_of_one(
    kind: str, formats: str, bits: str, more: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    """Scores, choices, perplexities and checkpoints, bit for bit; only the first process prints."""
    model = model_dir(tiny("qwen3_moe") if kind == "mixture" else TinyModel(layers=2))
    assert main(arguments(model, tmp_path / "one" / "out", *more, formats=formats, bits=bits)) == 0
    done = several(arguments(model, tmp_path / "several" / "out", *more, formats=formats, bits=bits), count)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written:") == 1
    assert names(tmp_path / "several") == {"out"}
    same_files(tmp_path / "one" / "out", tmp_path / "several" / "out")


@pytest.mark.full
@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        ("1:score:3:error", f"ModelOptExtError: {failing_search.ERROR}"),
        ("0:score:4:error", f"ModelOptExtError: {failing_search.ERROR}"),
        (
            "1:score:2:kill",
            "ModelOptExtError: torchrun: processes: expected all of them until the end, got one that ended",
        ),
    ],
)
def test_a_process_that_fails_ends_all_and_the_search_resumes(
    fail: str, expected: str, model: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; the work folder alone is left; one process or three continue after the windows that all had scored."""
    output = tmp_path / "several" / "out"
    done = several(arguments(model, output), fail=fail)
    if fail.endswith("kill") and not errors(done):  # the launcher noticed it first, and asked the other one to stop
        assert done.stderr.splitlines().count("interrupted") == 1
    else:
        assert errors(done) == [expected]
    assert names(tmp_path / "several") == {".out.autoquant"}
    shutil.copytree(tmp_path / "several", tmp_path / "alone")
    (tmp_path / "alone" / ".out.autoquant").chmod(0o700)
    with monkeypatch.context() as patch:
        seen = count_windows(patch)
        assert main(arguments(model, tmp_path / "alone" / "out", "--resume")) == 0
    assert 0 < len(seen) < SCORED, "some windows were kept"
    same_files(one, tmp_path / "alone" / "out")
    done = several(arguments(model, output, "--resume"), 3)
    assert done.returncode == 0, done.stderr[-2000:]
    same_files(one, output)
    assert names(tmp_path / "several") == {"out"}


@pytest.mark.full
def test_a_process_that_fails_while_it_calibrates(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert errors(several(arguments(model, output), fail="1:calibrate:2:error")) == [
        f"ModelOptExtError: {failing_search.ERROR}"
    ]
    assert names(tmp_path) == {".out.autoquant"}


@pytest.mark.full
def test_an_interrupt_of_one_ends_all(model: Path, tmp_path: Path) -> None:
    done = several(arguments(model, tmp_path / "out"), fail="1:score:2:interrupt")
    assert errors(done) == []
    assert done.stderr.splitlines().count("interrupted") == 1
    assert names(tmp_path) == {".out.autoquant"}


@pytest.mark.full
def test_export_from_a_state(model: Path, one: Path, tmp_path: Path) -> None:
    """Only the calibration is shared."""
    command = ["auto-quantize", str(model), "--bits", "6.5", "--from-state", str(one / "autoquant.json")]
    done = several([*command, "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


@pytest.mark.full
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--measure-only",), "torchrun: --nproc-per-node: expected one process for --measure-only"),
        (("--formats", "FP9"), "--formats: FP9: expected a ModelOpt format"),
        (
            ("--samples", "1", "--sequence-length", "96", "--held-out", "HELD_OUT"),
            "expected at least one window for each of 2 processes, got 1",
        ),
    ],
)
def test_what_cannot_be_shared_is_one_line(more: tuple[str, ...], message: str, model: Path, tmp_path: Path) -> None:
    words = [str(ROOT / "examples/stdlib_lm/heldout.txt") if word == "HELD_OUT" else word for word in more]
    (line,) = errors(several([*arguments(model, tmp_path / "out"), *words]))
    assert message in line
    assert not list(tmp_path.iterdir())


def test_processes_that_no_launcher_started(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    line = failure(capsys, arguments(model, tmp_path / "out"))
    assert "torchrun: environment: expected processes that torchrun started" in line
    assert not list(tmp_path.iterdir())


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as (processes, device):
        assert (processes, device) == (Processes(), "cpu")
        assert processes.gather("own") == ["own"]
        assert processes.from_first(lambda: "made") == "made"
        assert not torch.distributed.is_initialized()


def test_shares_are_of_all_items_once() -> None:
    shares = [Processes(rank, 3).share(range(8)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(8))
    assert [len(share) for share in shares] == [3, 3, 2]


def test_sums_are_added_in_the_order_of_the_windows() -> None:
    """In float32: another order, or float64, would be another sum."""
    rows = [{"a": {"x": value}} for value in (1.0, 2.0**-24, 2.0**-24)]
    assert added({}, rows) == {"a": {"x": 1.0}}
    assert added({}, rows[::-1]) == {"a": {"x": 1.0 + 2.0**-23}}
    assert added({"a": {"x": 1.0}}, [{}, {"a": {"y": 2.0}}]) == {"a": {"x": 1.0, "y": 2.0}}


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (None, True),
        ("max", True),
        ({"method": "mse", "fp8_scale_sweep": True}, True),
        ({"method": "smoothquant", "alpha": 0.5}, True),
        ({"method": "awq_lite", "alpha_step": 0.1}, False),
        ("local_hessian", False),
        (["max", "awq_clip"], False),
    ],
)
def test_algorithms_whose_maxima_are_reduced(algorithm: object, expected: bool) -> None:
    assert reduces(algorithm) is expected


def test_every_process_needs_a_window() -> None:
    record = Calibration(data=("text",), sha256="", samples=2, tokens=4, sequence_length=2, batch_size=1, seed=0)
    data = CalibrationData(((1, 2), (3, 4)), record)
    data.check_shares(2)
    with pytest.raises(ModelOptExtError, match="text: expected at least one window for each of 3 processes, got 2"):
        data.check_shares(3)
