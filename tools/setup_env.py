#!/usr/bin/env python3
"""A script that makes or updates ``.venv``, run by ``make setup``; it needs only Python 3.8 or newer to start.

Environment variables:
    PYTHON   the interpreter for ``.venv``; by default the first of python3.11 and python3.12 that works
    RUNTIME  ``cpu`` or ``cuda``; by default ``cuda`` where ``nvidia-smi`` lists a GPU

On a CPU this installs the pinned list in ``cpu_runtime/``: about 1 GB of downloads, 3 GB of disk, no CUDA package. With
a GPU it installs this project with its extras, and so the SGLang that ``pip install sglang`` gives.

When nothing changed since the last run it returns at once: ``.venv`` holds a hash of everything an installation
depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-stamp.json"
LOG = VENV / "setup.log"

CPU_RUNTIME = ROOT / "cpu_runtime"
REQUIREMENTS = CPU_RUNTIME / "requirements.txt"
REQUIREMENTS_NO_DEPS = CPU_RUNTIME / "requirements-no-deps.txt"
REQUIREMENTS_CONTRACTS = CPU_RUNTIME / "requirements-contracts.txt"
CONTRACTS = VENV / "contracts"
CONTRACT_FILE = re.compile(r"\.py$|/METADATA$|_gemm_cutlass\w*\.cu$")
INSTALL_SHIMS = CPU_RUNTIME / "install_shims.py"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# 3.11 first: some machines are prepared with a CPU build of torch for it alone.
PYTHONS = ("python3.11", "python3.12")
VERSIONS = ("3.11", "3.12")
PIP = "pip==26.3"  # one resolver everywhere, and one that reads metadata without downloading wheels
PROBE = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
"""Print the version, and fail where a distribution split venv off (Debian's python3-venv)."""

START = time.monotonic()


class SetupError(Exception):
    """An error that the user has to fix, as the message says."""


def main() -> int:
    """Run all steps and return the exit code."""
    try:
        runtime = choose_runtime()
        python = os.environ.get("PYTHON") or None
        kind = {"runtime": runtime, "root": str(ROOT)}  # a venv that was moved holds paths that are wrong
        complete = {**kind, "hash": inputs_hash()}
        stamp = read_stamp()
        kept = kind.items() <= stamp.items() and venv_works(python)
        if kept and stamp == complete:
            return 0
        if not kept:
            make_venv(find_python(python), kind)
        write_stamp(kind)  # without the hash until the installation is complete
        install_cpu() if runtime == "cpu" else install_cuda()
        unpack_contracts()
        write_stamp(complete)
        step(f"done: {VENV.relative_to(ROOT)} is ready ({runtime})")
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


def choose_runtime() -> str:
    """Return ``cpu`` or ``cuda``, from RUNTIME or from the output of ``nvidia-smi``."""
    runtime = os.environ.get("RUNTIME") or ("cuda" if has_gpu() else "cpu")
    if runtime not in ("cpu", "cuda"):
        raise SetupError(f"RUNTIME={runtime!r} is neither cpu nor cuda")
    if not sys.platform.startswith("linux"):
        raise SetupError("SGLang and Triton have no packages for this platform; use Linux")
    return runtime


def has_gpu() -> bool:
    """Return whether ``nvidia-smi`` works and lists a GPU."""
    return (output_of(["nvidia-smi", "-L"]) or "").startswith("GPU ")


def find_python(override: str | None) -> str:
    """Return the interpreter for ``.venv``."""
    if override:
        version = output_of([override, "-c", PROBE])
        if version not in VERSIONS:
            raise SetupError(
                f"PYTHON={override} is not a working Python {' or '.join(VERSIONS)} with venv and ensurepip"
            )
        return override
    for name in PYTHONS:
        # Run every one on PATH: a pyenv shim may exist and fail while a working one comes after it.
        for folder in os.get_exec_path():
            candidate = shutil.which(name, path=folder)
            if candidate and output_of([candidate, "-c", PROBE]) == name[len("python") :]:
                return candidate
    raise SetupError(f"no working {' or '.join(PYTHONS)} with venv and ensurepip on PATH; name one with PYTHON=")


def venv_works(override: str | None) -> bool:
    """Return whether the interpreter in ``.venv`` runs and is of the requested version, if any."""
    version = output_of([str(VENV_PYTHON), "-c", PROBE])
    if version not in VERSIONS:
        return False
    return not override or version == output_of([override, "-c", PROBE])


def make_venv(python: str, kind: dict[str, str]) -> None:
    """Make an empty ``.venv`` in place of an earlier run's."""
    step(f"making {VENV.relative_to(ROOT)} with {python}")
    if VENV.exists():
        if not STAMP.exists():
            raise SetupError(f"{VENV} was not made by `make setup`; move it away")
        shutil.rmtree(VENV)
    VENV.mkdir()
    write_stamp(kind)  # first, so that an interrupted run is recognized as ours
    run([python, "-m", "venv", str(VENV)])
    pip("install", PIP)


def install_cpu() -> None:
    """Install the pinned CPU runtime, its import shims, and this project."""
    install_cpu_torch(pinned("torch"))
    step("installing SGLang's CPU dependencies, ModelOpt and the development tools")
    pip("install", "-r", str(REQUIREMENTS))
    step("installing SGLang without its CUDA packages")
    pip("install", "--no-deps", "-r", str(REQUIREMENTS_NO_DEPS))
    step("installing the import shims and this project")
    run([str(VENV_PYTHON), str(INSTALL_SHIMS)])
    pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))


def install_cpu_torch(version: str) -> None:
    """Install a CPU build of torch, never a CUDA build: pip is asked for the local version ``+cpu``."""
    step(f"installing torch {version} (CPU build)")
    requirement = f"torch=={version}+cpu"
    try:
        pip("install", "--no-deps", requirement, quiet=True)  # found where pip is configured with an index that has it
    except SetupError:
        step(f"not in pip's own indexes, trying {TORCH_CPU_INDEX}")
        try:
            pip("install", "--no-deps", "--timeout=15", "--retries=2", "--index-url", TORCH_CPU_INDEX, requirement)
        except SetupError as error:
            raise SetupError(
                f"found no {requirement} for {VENV_PYTHON} in pip's own indexes or at {TORCH_CPU_INDEX}.\n"
                "Let pip find the wheel (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), or try another PYTHON="
            ) from error
    code = "import runpy, sysconfig; print(runpy.run_path(sysconfig.get_path('purelib') + '/torch/version.py')['cuda'])"
    cuda = output_of([str(VENV_PYTHON), "-c", code])
    if cuda != "None":
        raise SetupError(f"pip installed torch for CUDA {cuda} where a CPU build was asked for")


def install_cuda() -> None:
    """Install this project, SGLang with CUDA, ModelOpt and the development tools."""
    step("installing SGLang with CUDA, ModelOpt and the development tools (about 10 GB)")
    pip("install", "-e", f"{ROOT}[cuda,quantize,dev]")


def unpack_contracts() -> None:
    """Unpack the sources of GPU packages that the plugin calls, for the tests of its calls; nothing is installed."""
    step("unpacking the sources of the GPU kernels' packages (67 MB to download)")
    if CONTRACTS.exists():
        shutil.rmtree(CONTRACTS)
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, "-r", str(REQUIREMENTS_CONTRACTS))
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if CONTRACT_FILE.search(name)]
                archive.extractall(CONTRACTS, members=names)


def pinned(name: str) -> str:
    """Return the version of ``name`` in the requirements."""
    match = re.search(rf"^{re.escape(name)}==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE)
    if match is None:
        raise SetupError(f"{REQUIREMENTS} pins no {name}")
    return match.group(1)


def inputs_hash() -> str:
    """Return a hash of everything an installation depends on.

    Of pyproject.toml only the tables that describe the package: a change to the linter's settings installs nothing.
    """
    digest = hashlib.sha256()
    shims = sorted(path for path in (CPU_RUNTIME / "shims").iterdir() if path.is_file())
    requirements = (REQUIREMENTS, REQUIREMENTS_NO_DEPS, REQUIREMENTS_CONTRACTS)
    for path in (Path(__file__), *requirements, INSTALL_SHIMS, *shims):
        digest.update(path.read_bytes())
    table = ""
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        if table.startswith(("build-system", "project", "tool.setuptools")):
            digest.update(line.encode())
    return digest.hexdigest()


def read_stamp() -> dict[str, str]:
    """Return the record of the last run, empty without one."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp: dict[str, str]) -> None:
    """Record the content of ``.venv``."""
    STAMP.write_text(json.dumps(stamp) + "\n")


def pip(*args: str, quiet: bool = False) -> None:
    """Run the venv's pip; see :func:`run`."""
    run([str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *args], quiet=quiet)


def run(command: list[str], quiet: bool = False) -> None:
    """Run a command with its output in the log, and print pip's progress now and then.

    Args:
        command: the program and its arguments.
        quiet: a failure is expected and its output not worth showing.

    Raises:
        SetupError: the command failed.
    """
    tail: deque[str] = deque(maxlen=30)
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        assert process.stdout is not None
        shown = time.monotonic()
        for line in process.stdout:
            log.write(line)
            tail.append(line)
            words = line.split()
            if words[:1] == ["Installing"] or (words[:1] == ["Downloading"] and time.monotonic() - shown > 5):
                shown = time.monotonic()
                step("  " + " ".join(words)[:90])
    if process.wait() != 0:
        if not quiet:
            sys.stderr.writelines(tail)
        raise SetupError(f"failed: {' '.join(command)}\nThe whole output is in {LOG}")


def output_of(command: list[str]) -> str | None:
    """Return the output of a command, stripped; None when it cannot run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def step(text: str) -> None:
    """Print a line of progress with the seconds elapsed."""
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
