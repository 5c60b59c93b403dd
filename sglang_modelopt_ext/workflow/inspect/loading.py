"""A test of whether a checkpoint loads: a process rehearses a server's start without weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from sglang_modelopt_ext.backends.select import rounds_fp4
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import FP4_ACTIVATIONS

MODULE = "sglang_modelopt_ext.integration.rehearsal"
RESULT = "REHEARSAL "
TIMEOUT = 600.0
"""Seconds; measured: 10 to 40, nearly all of it SGLang's imports."""


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a rehearsed load into SGLang's own model class.

    Attributes:
        checked: whether a load was rehearsed.
        why_not: the reason where it was not, else empty.
        model: the class; None where the start fails before it is built.
        problems: the errors that would stop a server.
        missing: parameters of the model without a stored tensor.
        left_over: stored tensors that no parameter reads.
        left_out: number of stored tensors that are not needed, such as those of MTP blocks.
    """

    checked: bool
    why_not: str = ""
    model: str | None = None
    problems: list[str] = []
    missing: list[str] = []
    left_over: list[str] = []
    left_out: int = 0

    @property
    def loads(self) -> bool:
        """Return whether a load was rehearsed and succeeded."""
        return self.checked and not self.problems


def not_checked(why: str) -> Loading:
    """Return the result without a rehearsal, for the reason ``why``."""
    return Loading(checked=False, why_not=why)


def rehearse_loading(folder: Path, target: Device, stock_kv_cache: bool) -> Loading:
    """Rehearse the start of a server of this package for ``folder`` on one rank of ``target``.

    The model is built on this machine's CPU, wherever it is to be served: its modules, names and shapes are the same.

    Args:
        folder: the checkpoint.
        target: the device that is to serve it.
        stock_kv_cache: whether SGLang's own KV cache is used there.
    """
    if importlib.util.find_spec("sglang") is None:
        return not_checked("SGLang is not installed")
    # The target decides which scales are needed, not the CPU that the model is built on.
    rounded = "round" if rounds_fp4(target) else "keep"
    own = {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own, FP4_ACTIVATIONS.variable: rounded}
    # -P imports nothing from the working directory, where a checkpoint may bring code of its own.
    command = [sys.executable, "-P", "-m", MODULE, str(folder), *(["--stock-kv-cache"] if stock_kv_cache else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return not_checked(f"no answer after {TIMEOUT:.0f} s")
    line = next((line for line in done.stdout.splitlines() if line.startswith(RESULT)), None)
    if line is None:
        return not_checked((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200])
    found = json.loads(line.removeprefix(RESULT))
    if "error" in found:
        return not_checked(found["error"])
    return Loading(checked=True, **found)
