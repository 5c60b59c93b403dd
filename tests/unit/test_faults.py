"""Kills at every change to a file, and full disks: what is there afterwards is whole or absent, and the same command finishes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("modelopt")

from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.workflow.quantize.export import check_folder
from tests.support import edits
from tests.support.exports import export
from tests.support.faults import KILLED, count_changes, killed_at, small_disk
from tests.support.models import TinyModel, model_dir

SMALL = TinyModel(dtype="float32", hidden=128, intermediate=256, heads=2, kv_heads=1)
SHORT = 5
"""Kills in a short run, spread over all changes."""
DISKS = (8, 40, 150, 400, 700)
"""Sizes in KB of disks that are too small for an output of 1 MB."""
LARGE = 64 * 1024


@dataclass(frozen=True)
class Task:
    """A command that writes a checkpoint.

    Attributes:
        start: its words for an output folder.
        again: those that continue it after a kill.
    """

    start: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    """Return the commands that write checkpoints, on a tiny model."""
    folder, model = tmp_path_factory.mktemp("sources"), str(model_dir(SMALL))
    text = folder / "text.txt"
    text.write_text("\n".join(f"def square_{i}():\n    return {i} * {i}  # {i * i}" for i in range(60)))
    data = ["--data", str(text), "--samples", "6", "--sequence-length", "32", "--device", "cpu"]
    broken = edits.copy_with(
        export(model_dir(SMALL), "W4A8_NVFP4_FP8_CFG"),
        folder / "broken",
        [edits.drop_tensors("model.layers.0.self_attn.q_proj.input_scale")],
    )

    def quantize(output: Path) -> list[str]:
        return ["quantize", model, "--recipe", "fp8", "--kv", "nvfp4_affine", *data, "--output", str(output)]

    def search(output: Path) -> list[str]:
        formats = ["--formats", "W4A8_NVFP4_FP8,FP8", "--bits", "6.5", "--gpu", "sm90", "--score-samples", "4"]
        return ["auto-quantize", model, *formats, *data, "--output", str(output)]

    def resume(output: Path) -> list[str]:
        kept = (output.parent / f".{output.name}.autoquant").exists()
        return [*search(output), *(["--resume"] if kept else [])]

    def repair(output: Path) -> list[str]:
        return ["repair", str(broken), "--copy", "--output", str(output)]

    return {"quantize": Task(quantize, quantize), "search": Task(search, resume), "repair": Task(repair, repair)}


def check_same(first: Path, second: Path) -> None:
    """Check that two checkpoints store the same tensors, bit for bit."""
    one, other = (edits.read_tensors(folder) for folder in (first, second))
    assert one.keys() == other.keys()
    raw = {name: [part[name].reshape(-1).view(torch.uint8) for part in (one, other)] for name in one}
    assert not [name for name, pair in raw.items() if not torch.equal(*pair)]


def visible(folder: Path) -> set[str]:
    """Return the names in a folder that a user would take for results."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def check_kills(task: Task, folder: Path, most: int | None, *, overwrite: Path | None = None) -> None:
    """Kill a task before each of its changes (or ``most`` of them), check what is there, and run it again to the end."""
    (folder / "whole").mkdir()
    start = task.start(folder / "whole" / "out")
    if overwrite is not None:
        shutil.copytree(overwrite, folder / "whole" / "out")
        start.append("--overwrite")
    changes = count_changes(lambda: main(start), folder / "whole")
    assert changes > 5
    step = 1 if most is None else max(1, changes // most)
    for change in range(0, changes, step):
        place = folder / f"killed-{change}"
        place.mkdir()
        output, more = place / "out", []
        if overwrite is not None:
            shutil.copytree(overwrite, output)
            more = ["--overwrite"]
        code = killed_at(change, lambda output=output, more=more: main([*task.start(output), *more]), place)  # type: ignore[misc]
        assert code == KILLED, f"change {change} of {changes}"
        assert visible(place) <= {"out"}
        if output.exists():
            check_folder(output)
        else:
            assert overwrite is None, f"the old checkpoint is gone after change {change} of {changes}"
        done = output.exists() and overwrite is None
        assert main([*task.again(output), *(more or (["--overwrite"] if done else []))]) == 0
        check_folder(output)
        check_same(folder / "whole" / "out", output)
        left = {path.name for path in place.iterdir()} - {"out"}
        assert not left, f"left behind after change {change}: {left}"
        shutil.rmtree(place)


SLOW = [pytest.param(name, marks=pytest.mark.full) for name in ("quantize", "search")]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["repair", *SLOW])
def test_some_kills(name: str, tasks: dict[str, Task], tmp_path: Path) -> None:
    check_kills(tasks[name], tmp_path, SHORT)


@pytest.mark.full
def test_a_kill_at_every_change(tasks: dict[str, Task], tmp_path: Path) -> None:
    check_kills(tasks["repair"], tmp_path, None)


@pytest.mark.parametrize(
    "most", [pytest.param(SHORT, id="some"), pytest.param(None, id="every", marks=pytest.mark.full)]
)
def test_a_kill_while_overwriting(most: int | None, tasks: dict[str, Task], tmp_path: Path) -> None:
    """The old checkpoint is there until the new one is in its place."""
    check_kills(tasks["repair"], tmp_path, most, overwrite=export(model_dir(SMALL), "FP8_DEFAULT_CFG"))


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["repair", *SLOW])
def test_full_disks(
    name: str,
    tasks: dict[str, Task],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, nothing that looks like a result, and after room was made the same command finishes."""
    task, place = tasks[name], tmp_path / "disk"
    # Otherwise the check of free space before the work would be all that is tested.
    for module in ("quantize.export", "quantize.run", "repair.run"):
        monkeypatch.setattr(f"sglang_modelopt_ext.workflow.{module}.check_space", lambda folder, needed: None)
    for size in DISKS:
        with small_disk(place, size) as resize:
            output = place / "out"
            capsys.readouterr()
            assert main(task.start(output)) == 2, size
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert re.match(r"ModelOptExtError: .*(space on disk|No space left on device|os error 28)", line), line
            assert not visible(place)
            resize(LARGE)
            assert main(task.again(output)) == 0
            check_folder(output)
            assert {path.name for path in place.iterdir()} == {"out"}
