"""Damaged files end in one line, soon, and in little memory: never in another exception, whatever is in them.

Damage is random and repeatable: ``FUZZ=first:count`` runs other seeds, and a failure names the seed.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.ownership import decide
from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.checkpoint.reader import check_all_values
from sglang_modelopt_ext.checkpoint.unserved import read_for_serving
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.models import served_dtype
from sglang_modelopt_ext.workflow.inspect.run import inspect_checkpoint
from sglang_modelopt_ext.workflow.repair.run import repair
from tests.support import edits, fuzz
from tests.support.exports import export
from tests.support.kv_exports import kv_export
from tests.support.models import TinyModel, model_dir
from tests.support.moe import mixed_checkpoint

SECONDS = 20
"""For everything that is done with one damaged folder; it takes 0.1 s."""
MEGABYTES = 400
"""The process may grow by this much over a run: the checkpoints have less than 2 MB."""
SHORT, LONG = 60, 2500
W4A8 = "W4A8_NVFP4_FP8_CFG"
SMALL: dict[str, Any] = {"hidden": 128, "intermediate": 128, "heads": 2, "kv_heads": 1, "vocab": 320, "layers": 1}

GPU, CPU = Device.cuda(90), Device.parse("cpu")


def read_everything(folder: Path) -> None:
    """Read a checkpoint in every way that a command or a server does; errors of this package are what is expected."""
    readers: tuple[Callable[[], object], ...] = (
        lambda: decide(folder, None, GPU),
        lambda: decide(folder, "modelopt_ext", CPU),
        lambda: _load(folder),
        lambda: read_plan(folder, read_quant_config(folder), "auto"),
        lambda: _layers(folder),
        lambda: served_dtype(folder, "auto"),
        lambda: inspect_checkpoint(folder, CPU, scales=True),
        lambda: repair(folder, None),
    )
    for reader in readers:
        try:
            reader()
        except ModelOptExtError as error:
            check_line(error)


def check_line(error: ModelOptExtError) -> None:
    """Check that an error is one line, which any terminal can be given."""
    assert "\n" not in error.one_line()
    assert error.one_line().encode("utf-8")


def _load(folder: Path) -> None:
    checkpoint, problems = read_for_serving(folder)
    for problem in problems:
        check_line(problem)
    check_all_values(checkpoint)


def _layers(folder: Path) -> None:
    plan = read_plan(folder, read_quant_config(folder), "auto")
    if plan is not None:
        _ = plan.layers


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def run(make: Callable[[Path], Path], folder: Path, count: int) -> None:
    """Damage and read ``count`` copies of a checkpoint."""
    first, _, wanted = os.environ.get("FUZZ", f"0:{count}").partition(":")
    whole = make(folder / "whole")
    read_everything(whole)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(int(first), int(first) + int(wanted or 1)):
        generator, target = random.Random(seed), folder / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(whole, target)
        names = {fuzz.damage(target, generator) for _ in range(generator.choice((1, 1, 1, 2)))}
        began, previous = time.monotonic(), signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            read_everything(target)
        except Exception as error:
            error.add_note(f"seed {seed}, damaged: {', '.join(sorted(names))}")
            raise
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        assert time.monotonic() - began < SECONDS
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert now - grown < 1024 * MEGABYTES, f"seed {seed}: {(now - grown) / 1024:.0f} MB more, by {names}"


def _dense(target: Path) -> Path:
    return edits.copy_with(kv_export("fp8_affine", weights=W4A8, **SMALL), target)


def _sharded(target: Path) -> Path:
    model = model_dir(TinyModel(**SMALL))
    return edits.copy_with(export(model, "NVFP4_DEFAULT_CFG"), target, [edits.shard()])


def _mixture(target: Path) -> Path:
    return mixed_checkpoint("qwen3_moe", target, layers=1, hidden=128, intermediate=128, heads=2, kv_heads=1, vocab=320)


KINDS = {"cache": _dense, "sharded": _sharded, "mixture": _mixture}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints(kind: str, tmp_path: Path) -> None:
    run(KINDS[kind], tmp_path, SHORT)


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_checkpoints(kind: str, tmp_path: Path) -> None:
    run(KINDS[kind], tmp_path, LONG)
