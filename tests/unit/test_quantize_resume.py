"""A stopped calibration resumes and ends at the same tensors; several processes end at them too."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.quantize import export as export_module
from sglang_modelopt_ext.workflow.quantize.calibrate import resume_point, work_folder
from sglang_modelopt_ext.workflow.quantize.recipes import Changes
from sglang_modelopt_ext.workflow.quantize.run import Options, Quantized, goes_layerwise, quantize
from tests.support.models import TinyModel, model_dir

SMALL = TinyModel(dtype="float32", hidden=128, intermediate=256, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of calibration text, several windows long."""
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("\n".join(f"def square_{i}():\n    return {i} * {i}  # {i * i}" for i in range(60)))
    return str(file)


def options(recipe: str, changes: Changes, data: str, **more: Any) -> Options:
    """Return options for few tokens on a CPU."""
    return Options(recipe=recipe, changes=changes, data=(data,), samples=6, sequence_length=32, device="cpu", **more)


def run(output: Path, chosen: Options) -> Quantized:
    """Run :func:`quantize` on the tiny model."""
    done = quantize(str(model_dir(SMALL)), output, chosen, progress=False)
    assert done is not None
    return done


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor."""
    return tensor.flatten().view(torch.uint8)


def same_tensors(first: Path, second: Path) -> None:
    """Check that two checkpoints store the same tensors, bit for bit."""
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(raw(one[name]), raw(other[name]))]
    assert not different


@contextlib.contextmanager
def stopping_after_a_layer() -> Iterator[None]:
    """Interrupt like Ctrl-C as soon as ModelOpt has written the first layer's progress."""
    from modelopt.torch.quantization.utils import layerwise_calib

    save = layerwise_calib._CheckpointState.save

    def stop(self: Any, layer: int, *args: Any, **kwargs: Any) -> None:
        save(self, layer, *args, **kwargs)
        if layer == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise_calib._CheckpointState, "save", stop)
        yield


CASES = [
    pytest.param("fp8", Changes(kv="nvfp4_affine"), id="max-affine-kv"),
    pytest.param("fp8", Changes(algorithm="smoothquant", alpha=0.5), id="fp8-smoothquant"),
    pytest.param("nvfp4_awq_lite", Changes(), id="awq_lite", marks=pytest.mark.full),
    pytest.param("int4_awq", Changes(algorithm="awq_clip"), id="awq_clip", marks=pytest.mark.full),
    pytest.param("nvfp4_w4a4_weight_mse_fp8_sweep", Changes(), id="mse", marks=pytest.mark.full),
    pytest.param("nvfp4_w4a4_weight_local_hessian", Changes(), id="local_hessian", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("recipe", "changes"), CASES)
def test_resumed_run_ends_at_the_same_tensors(tmp_path: Path, data: str, recipe: str, changes: Changes) -> None:
    chosen = options(recipe, changes, data)
    whole = run(tmp_path / "whole", chosen)
    assert (whole.outcome.layerwise, whole.outcome.resumed_from) == (True, 0)
    with stopping_after_a_layer(), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", chosen)
    (work,) = tmp_path.glob(".out.calibration-*")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", work.name}, "only the progress is left"
    assert work.stat().st_mode & 0o077 == 0
    resumed = run(tmp_path / "out", chosen)
    assert resumed.outcome.resumed_from == 1
    same_tensors(tmp_path / "whole", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}, "the progress goes once it is of no use"


def test_layer_by_layer_is_the_whole_model_at_once(tmp_path: Path, data: str) -> None:
    changes = Changes(kv="fp8", algorithm="smoothquant", alpha=0.5)
    layers = run(tmp_path / "layers", options("fp8", changes, data))
    whole = run(tmp_path / "whole", options("fp8", changes, data, layerwise=False))
    assert (layers.outcome.layerwise, whole.outcome.layerwise) == (True, False)
    same_tensors(tmp_path / "layers", tmp_path / "whole")


@pytest.mark.parametrize(
    ("methods", "device", "expected"),
    [
        (["max"], "cpu", True),
        (["max"], "cuda", False),
        (["max"], "auto", False),
        (["awq_lite"], "cuda", True),
        (["max", "mse"], "cuda", True),
    ],
)
def test_what_goes_layer_by_layer_unless_told_otherwise(methods: list[str], device: str, expected: bool) -> None:
    assert goes_layerwise([{"method": method} for method in methods], device) == expected
    asked = {"method": "max", "layerwise": {"enable": True}}
    assert goes_layerwise([asked], device), "the recipe's own wish"


def test_stopped_while_exporting(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are done: only the last one is calibrated again."""
    chosen = options("fp8", Changes(), data)
    run(tmp_path / "whole", chosen)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "copy_tokenizer", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", chosen)
    assert run(tmp_path / "out", chosen).outcome.resumed_from == 1
    same_tensors(tmp_path / "whole", tmp_path / "out")


def test_progress_of_another_run_is_not_used(tmp_path: Path) -> None:
    first = work_folder(tmp_path / "out", {"seed": 0})
    assert work_folder(tmp_path / "out", {"seed": 0}) == first
    assert work_folder(tmp_path / "out", {"seed": 1}) != first


def test_progress_others_could_have_written_is_not_read(tmp_path: Path) -> None:
    """Progress is pickled."""
    folder = work_folder(tmp_path / "out", {})
    folder.chmod(0o777)
    with pytest.raises(ModelOptExtError, match="expected a folder only its owner can read"):
        work_folder(tmp_path / "out", {})
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelOptExtError, match="expected a folder only its owner can read"):
        work_folder(tmp_path / "out", {})


@pytest.mark.parametrize(("last", "total", "expected"), [(0, 2, 1), (1, 2, 1), (0, 1, 0), (3, 9, 4)])
def test_resume_point(tmp_path: Path, last: int, total: int, expected: int) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"last_completed_layer": last, "num_layers": total}))
    assert resume_point(tmp_path) == expected
    manifest.write_text("{")
    assert resume_point(tmp_path) == 0


def command(model: Path, output: Path, data: str, *more: str) -> list[str]:
    """Return the subcommand, for a process of its own."""
    arguments = [str(model), "--output", str(output), "--data", data, "--samples", "6", "--sequence-length", "32"]
    return ["-m", "sglang_modelopt_ext.cli", "quantize", *arguments, "--device", "cpu", *more]


@pytest.mark.full
def test_killed_and_resumed(tmp_path: Path, data: str) -> None:
    """SIGKILL in the middle of a run of six layers, then the same command again; SIGTERM leaves with 130."""
    model = model_dir(TinyModel(dtype="float32", hidden=128, intermediate=256, heads=2, kv_heads=1, layers=6))
    arguments = ("--recipe", "nvfp4_awq_lite", "--json")
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, *command(model, tmp_path / "out", data, *arguments)])
        wanted = 1 if number == signal.SIGKILL else 3
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            manifests = list(tmp_path.glob(".out.calibration-*/manifest.json"))
            if manifests and json.loads(manifests[0].read_text())["last_completed_layer"] >= wanted:
                process.send_signal(number)
                break
            time.sleep(0.02)
        assert process.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert not (tmp_path / "out").exists()
    done = subprocess.run(
        [sys.executable, *command(model, tmp_path / "out", data, *arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["resumed_from"] >= 4
    whole = quantize(
        str(model),
        tmp_path / "whole",
        Options("nvfp4_awq_lite", data=(data,), samples=6, sequence_length=32, device="cpu"),
        progress=False,
    )
    assert whole is not None
    same_tensors(tmp_path / "whole", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("recipe", "changes", "arguments"),
    [
        ("fp8", Changes(kv="fp8", algorithm="smoothquant", alpha=0.5), ("--kv", "fp8", "--alpha", "0.5")),
        ("nvfp4_four_over_six", Changes(), ()),
        ("W4A8_NVFP4_FP8", Changes(), ()),
    ],
)
def test_two_processes_find_the_scales_of_one(
    tmp_path: Path, data: str, recipe: str, changes: Changes, arguments: tuple[str, ...]
) -> None:
    """Over gloo. Each process sees half of the data; the first one writes."""
    run(tmp_path / "one", options(recipe, changes, data))
    if changes.algorithm:
        arguments += ("--calibration-algorithm", changes.algorithm)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command(model_dir(SMALL), tmp_path / "two", data, "--recipe", recipe, *arguments)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "process 1: done" in done.stdout
    same_tensors(tmp_path / "one", tmp_path / "two")


@pytest.mark.full
def test_algorithms_whose_processes_disagree_are_refused(tmp_path: Path, data: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command(model_dir(SMALL), tmp_path / "out", data, "--recipe", "nvfp4_awq_lite")],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "awq_lite: expected one of max, mse, smoothquant with several processes" in done.stderr
    assert not list(tmp_path.iterdir())
