"""The served runs and compilations in the result files of ``benchmarks/results``, for ``tools/support_matrix.py``."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


class ServedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One served checkpoint, compared with the decoded export.

    Attributes:
        algo: ``quant_algo``, in any case.
        kv: recipe of the KV cache, with or without the ``modelopt_`` of its flag; ``none`` without one.
        family: of the model, such as ``qwen2`` or ``qwen3_moe``.
        served_by: this package, or SGLang itself.
        backend: the kernels of its layers, by the names of the matrix, joined by commas or plus signs.
        verdict: ``right`` and ``wrong`` by the noise floor; ``failed`` where nothing was served; ``not run``.
        case: distinguishes it from others of its algorithm.
        experts: whether the model is a mixture of experts; None to go by ``family``.
        expected: the verdict of a sound run: ``wrong`` for a control, ``any`` where nothing is expected.
        agrees: whether it matches the case it must agree with.
        median, mean, noise: of the differences of log probabilities.
        note: anything else.
        commit: of this repository when the case was run; empty for the file's.
    """

    algo: str
    kv: str
    family: str
    served_by: Literal["ours", "sglang"]
    verdict: Literal["right", "wrong", "failed", "not run"]
    backend: str | None = None
    case: str = ""
    experts: bool | None = None
    expected: Literal["right", "wrong", "any"] = "right"
    agrees: bool | None = None
    median: float | None = None
    mean: float | None = None
    noise: float | None = None
    note: str = ""
    commit: str = ""


class ServedFile(msgspec.Struct, frozen=True, kw_only=True):
    """Runs on one GPU: ``served-*.json``.

    Attributes:
        date: of the run.
        gpu: its name, as the driver gives it.
        capability: compute capability times ten, None where nothing answered.
        versions: of the packages, by name.
        commit: of this repository.
        rows: the checkpoints.
    """

    date: datetime.date
    gpu: str
    capability: int | None
    versions: dict[str, str]
    commit: str
    rows: list[ServedRow]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A row of a file, with the file it is from."""

    row: ServedRow
    file: ServedFile

    @property
    def algo(self) -> str:
        """Return ``quant_algo`` in upper case."""
        return self.row.algo.upper()

    @property
    def kv(self) -> str:
        """Return the recipe of the KV cache, ``none`` without one."""
        return self.row.kv.removeprefix("modelopt_")

    @property
    def is_mixture(self) -> bool:
        """Return whether the model is a mixture of experts."""
        if self.row.experts is not None:
            return self.row.experts
        return "moe" in self.row.family or self.row.family.startswith("mixtral")

    @property
    def backends(self) -> list[str]:
        """Return the kernels that served it."""
        return [name.strip() for name in re.split(r"[,+]", self.row.backend or "") if name.strip()]

    @property
    def is_evidence(self) -> bool:
        """Return whether the run is evidence for a cell; a control that is wrong as expected and a skipped run are not."""
        return self.row.verdict != "not run" and self.row.expected != "wrong"

    @property
    def said(self) -> str:
        """Return the verdict; in bold what is not right, or does not match the case it must agree with."""
        apart = ", apart from its twin" if self.row.agrees is False else ""
        said = self.row.verdict + apart
        if self.row.expected == "wrong":
            said += " (a control)" if self.row.verdict == "wrong" else " (a control, which should be wrong)"
        fine = self.row.verdict == ("wrong" if self.row.expected == "wrong" else "right") and not apart
        return said if fine else f"**{said}**"


class CompiledRow(msgspec.Struct, frozen=True, kw_only=True):
    """One compilation: the Triton function, its configuration, the architecture, and whether it passed the checks."""

    kernel: str
    case: str
    arch: int
    ok: bool
    problems: list[str] = []


class CompiledFile(msgspec.Struct, frozen=True, kw_only=True):
    """The output of ``python -m benchmarks.aot --json``: ``aot-*.json``.

    Attributes:
        date: of the run.
        versions: of the packages, by name.
        commit: of this repository.
        set: ``quick`` for a sample of the configurations, or ``every configuration``; then of which, if not of all.
        stopped: architectures at which the compiler died.
        rows: the compilations.
    """

    date: datetime.date
    versions: dict[str, str]
    commit: str
    set: str
    stopped: list[int] = []
    rows: list[CompiledRow]


def read_served(folder: Path) -> list[Run]:
    """Return the newest runs: of repeated runs, the rows of the newest file.

    Runs repeat each other where capability, algorithm, KV cache, family, server and case agree; of two files of one day,
    the one whose name sorts last is the newer.

    Raises:
        ValueError: a malformed file, by its name.
    """
    newest: dict[tuple[object, ...], list[Run]] = {}
    for file in _in_order(folder, "served-*.json", ServedFile):
        found: dict[tuple[object, ...], list[Run]] = {}
        for row in file.rows:
            run = Run(row=row, file=file)
            found.setdefault((file.capability, run.algo, run.kv, row.family, row.served_by, row.case), []).append(run)
        newest |= found
    return [run for runs in newest.values() for run in runs]


def read_compiled(folder: Path) -> tuple[list[CompiledFile], list[CompiledRow]]:
    """Return the files, oldest first, and the newest verdict of every compilation. Raises ValueError for a malformed file."""
    files = _in_order(folder, "aot-*.json", CompiledFile)
    rows = {(row.kernel, row.case, row.arch): row for file in files for row in file.rows}
    return files, list(rows.values())


def _in_order(folder: Path, pattern: str, kind: Any) -> list[Any]:
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=kind))
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: {error}") from error
    return sorted(found, key=lambda file: file.date)  # a stable sort: by name within a day


def run_status(runs: Iterable[Run]) -> str:
    """Return one phrase for a cell: the verdicts of its runs with date and GPU, other verdicts than right in bold."""
    phrases: dict[str, None] = {}
    for run in runs:
        row = run.row
        cache = f" with KV {run.kv}" if run.kv != "none" else ""
        of = f" ({row.case or row.family + cache})" if run.said != "right" else ""
        phrases[f"run {run.file.date}, {run.file.gpu}: {run.said}{of}"] = None
    return "; ".join(phrases)


def compile_status(rows: Sequence[CompiledRow], kernels: Iterable[str], arch: int, within: str = "") -> str | None:
    """Return ``compiled`` or the failure, from the rows of one architecture; None where one of the kernels has no row.

    Args:
        rows: verdicts.
        kernels: names of Triton functions.
        arch: the architecture.
        within: only cases whose names contain it, such as a recipe of the KV cache.
    """
    verdicts = []
    for kernel in kernels:
        own = [row.ok for row in rows if row.kernel == kernel and row.arch == arch and within in row.case]
        if not own:
            return None
        verdicts += own
    if not verdicts:
        return None
    return "compiled" if all(verdicts) else "**does not compile**"
