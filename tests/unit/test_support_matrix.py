"""The support matrix shows what result files say and no more: made-up files in, cells out."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sglang_modelopt_ext.backends.select import BACKENDS, EXPERT_BACKENDS
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES

TOOLS = Path(__file__).resolve().parents[2] / "tools"
ALGO = "W4A8_AWQ"
"""An algorithm that ``triton_block_scaled`` serves on every GPU."""
RUN = re.compile(r"\brun \d{4}-")
AROUND = {
    *("quantize_blocks_kernel", "quantize_int8_kernel", "quantize_static_kernel", "quantize_token_kernel"),
    *("quantize_given_kernel", "rms_norm_fp8_kernel", "swiglu_fp8_kernel"),
    *("extend_kernel", "merge_kernel", "split_kernel", "store_kernel", "turn_kernel"),
}
"""Kernels that no product launches: the rounding of activations, and attention."""


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the tool, imported as it is when it is run."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("support_matrix")


def row(**fields: Any) -> dict[str, Any]:
    """Return a right run of this package's W4A8_NVFP4_FP8, with changes."""
    right = {"algo": ALGO, "kv": "none", "family": "qwen2", "served_by": "ours", "verdict": "right"}
    numbers = {
        "backend": "triton_block_scaled",
        "median": 0.01,
        "mean": 0.02,
        "noise": 0.03,
        "prompts": [1, 2],
        "note": "",
    }
    return right | numbers | fields


def served(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    content = {"date": "2026-11-29", "gpu": "NVIDIA H200", "capability": 90, "commit": "abc1234", "rows": rows}
    content["versions"] = {"sglang": "0.5.23", "torch": "2.13.0", "triton": "3.8.0"}
    (folder / f"served-{name}.json").write_text(json.dumps(content | fields))


def compiled(folder: Path, name: str, rows: list[tuple[str, str, int, bool]], date: str = "2026-11-28") -> None:
    found = [
        {"kernel": kernel, "case": case, "arch": arch, "ok": ok, "problems": []} for kernel, case, arch, ok in rows
    ]
    content = {"date": date, "versions": {"triton": "3.8.0"}, "commit": "def5678", "set": "quick", "stopped": []}
    (folder / f"aot-{name}.json").write_text(json.dumps(content | {"rows": found}))


def cells(page: str, title: str, name: str) -> dict[str, str]:
    """Return the row ``name`` of the first table under ``title``, by column."""
    table = page[page.index(title) :]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    header = next(line for line in lines if "| CPU |" in line)
    found = next(line for line in lines[lines.index(header) :] if line.startswith(f"| `{name}` |"))
    return dict(zip(header.strip("| ").split(" | "), found.strip("| ").split(" | "), strict=True))


def linear(page: str, algo: str = ALGO) -> dict[str, str]:
    return cells(page, "# Support matrix", algo)


def test_without_files_nothing_was_run_or_compiled(matrix: ModuleType, tmp_path: Path) -> None:
    page = matrix.render(matrix.read_evidence(tmp_path))
    assert not RUN.search(page)
    for title, names in (("# Support", SCHEMES), ("## KV caches", KV_RECIPES)):
        for name in names:
            found = cells(page, title, name)
            assert found["CPU"].endswith(": tested")
            assert all("compiled" not in found[target] for target in matrix.TARGETS)
    assert linear(page)["SM90"] == "`triton_block_scaled`: interpreted"
    assert linear(page, "MXFP8")["SM100"] == "`flashinfer_mm_mxfp8`: not run"
    assert linear(page, "W4A8_MXFP4_FP8")["SM90"] == "`gluon_streamed`: not run", "no interpreter runs Gluon"
    assert linear(page, "NVFP4")["SM90"] == "*SGLang*: not run"
    assert "No GPU column has been run as a served model." in page
    assert "Nothing was compiled for these columns" in page


def test_a_run_shows_where_it_was_and_nowhere_else(matrix: ModuleType, tmp_path: Path) -> None:
    served(tmp_path, "one", [row()])
    page = matrix.render(matrix.read_evidence(tmp_path))
    assert linear(page)["SM90"] == "`triton_block_scaled`: run 2026-11-29, NVIDIA H200: right"
    for algo in SCHEMES:
        for target in matrix.TARGETS:
            if (algo, target) != (ALGO, "SM90"):
                assert not RUN.search(linear(page, algo)[target])
    assert not RUN.search(cells(page, "## Experts", "W4A8_NVFP4_FP8")["SM90"]), "a dense model has no experts"
    runs = page[page.index("## Served runs") :]
    assert (
        "| 2026-11-29 | NVIDIA H200 (SM90) | - | `W4A8_AWQ` | none | qwen2 | this package | triton_block_scaled |"
        in runs
    )
    assert "| right | 0.01 | 0.02 | 0.03 | sglang 0.5.23, torch 2.13.0, triton 3.8.0 | abc1234 | - |" in runs


@pytest.mark.parametrize("verdict", ["wrong", "failed"])
def test_what_is_not_right_shows_as_such(matrix: ModuleType, tmp_path: Path, verdict: str) -> None:
    """Beside a right run of the same cell, too."""
    bad = row(family="llama", verdict=verdict, median=None, mean=None, noise=None, note="CUDA error | line 2\nline 3")
    served(tmp_path, "one", [row(), bad])
    page = matrix.render(matrix.read_evidence(tmp_path))
    said = f"run 2026-11-29, NVIDIA H200: right; run 2026-11-29, NVIDIA H200: **{verdict}** (llama)"
    assert linear(page)["SM90"] == f"`triton_block_scaled`: {said}"
    assert rf"| **{verdict}** | - | - | - | sglang" in page
    assert r"CUDA error \| line 2 line 3 |" in page


def test_the_newest_file_wins(matrix: ModuleType, tmp_path: Path) -> None:
    served(tmp_path, "a", [row(verdict="wrong")], date="2026-12-01")
    served(tmp_path, "b", [row(), row(family="llama")], date="2026-11-29")
    page = matrix.render(matrix.read_evidence(tmp_path))
    found = linear(page)["SM90"]
    assert "run 2026-12-01, NVIDIA H200: **wrong** (qwen2)" in found
    assert "run 2026-11-29, NVIDIA H200: right" in found, "llama was not run since"
    served(tmp_path, "c", [row(), row(family="llama")], date="2026-12-02")
    page = matrix.render(matrix.read_evidence(tmp_path))
    assert linear(page)["SM90"] == "`triton_block_scaled`: run 2026-12-02, NVIDIA H200: right"
    assert "wrong" not in page[page.index("## Served runs") :]


def test_a_kernel_that_did_not_run_is_not_run(matrix: ModuleType, tmp_path: Path) -> None:
    """The kernel that served is named, and the kernel of the cell keeps its own state."""
    served(tmp_path, "one", [row(backend="dense_bfloat16"), row(algo="NVFP4", backend="triton_block_scaled")])
    page = matrix.render(matrix.read_evidence(tmp_path))
    run = "run 2026-11-29, NVIDIA H200: right"
    assert linear(page)["SM90"] == f"`triton_block_scaled`: interpreted<br>`dense_bfloat16`: {run}"
    assert linear(page, "NVFP4")["SM90"] == f"*SGLang*: not run<br>by name `triton_block_scaled`: {run}"


def test_sglangs_own_runs_are_its_own(matrix: ModuleType, tmp_path: Path) -> None:
    rows = [row(algo="NVFP4", served_by="sglang", backend=None), row(served_by="sglang", verdict="failed", backend="")]
    served(tmp_path, "one", rows)
    page = matrix.render(matrix.read_evidence(tmp_path))
    assert linear(page, "NVFP4")["SM90"] == "*SGLang*: run 2026-11-29, NVIDIA H200: right"
    assert linear(page)["SM90"] == "`triton_block_scaled`: interpreted"
    assert "| `W4A8_AWQ` | none | qwen2 | SGLang | - | **failed** |" in page


def test_controls_and_cases_that_must_agree(matrix: ModuleType, tmp_path: Path) -> None:
    """A control is wrong by design and says nothing of a cell; a right case that is not what its twin gave does."""
    rows = [
        row(case="control", expected="wrong", verdict="wrong"),
        row(case="blind", expected="wrong"),
        row(case="skipped", verdict="not run"),
        row(case="plain"),
    ]
    served(tmp_path, "one", rows)
    page = matrix.render(matrix.read_evidence(tmp_path))
    assert linear(page)["SM90"] == "`triton_block_scaled`: run 2026-11-29, NVIDIA H200: right"
    runs = page[page.index("## Served runs") :]
    for said in ("| wrong (a control) |", "| **right (a control, which should be wrong)** |", "| **not run** |"):
        assert said in runs
    served(tmp_path, "two", [row(case="graphs", agrees=False, backend="triton_block_scaled + other")])
    page = matrix.render(matrix.read_evidence(tmp_path))
    assert linear(page)["SM90"].endswith("NVIDIA H200: **right, apart from its twin** (graphs)")


def test_the_conformance_run_writes_what_is_read(matrix: ModuleType, tmp_path: Path) -> None:
    from tests.conformance import cases, report

    numbers = {"median": 0.1, "mean": 0.2, "noise_mean": 0.3, "used": 0.5, "groups": {}}
    result = {
        "gpu": "NVIDIA H200",
        "capability": 90,
        "versions": {"torch": "2"},
        "attention": "fa3",
        "judgement": numbers,
    }
    outcome = report.Outcome(cases.case(next(iter(cases.EXPORTS))), "right", result=result, kernels=["a", "b"])
    failed = report.Outcome(outcome.case, "failed")
    for outcomes, count in (([outcome], 1), ([failed], 1), ([outcome, failed], 2)):
        content = json.dumps(report.as_json(outcomes, "abc"))
        (tmp_path / "served-x.json").write_text(content)
        runs = matrix.read_evidence(tmp_path).runs
        assert len(runs) == count
        assert runs[0].is_mixture is outcome.case.of.mixture
    assert runs[0].backends == ["a", "b"]


def test_experts_and_caches(matrix: ModuleType, tmp_path: Path) -> None:
    mixture = row(algo="W4A8_NVFP4_FP8", family="qwen3_moe", backend="gluon_streamed, gluon_streamed_experts")
    cache = [row(kv="nvfp4_affine"), row(kv="modelopt_fp8", verdict="wrong")]
    served(tmp_path, "one", [mixture, *cache])
    page = matrix.render(matrix.read_evidence(tmp_path))
    run = "run 2026-11-29, NVIDIA H200:"
    assert cells(page, "## Experts", "W4A8_NVFP4_FP8")["SM90"] == f"`gluon_streamed_experts`: {run} right"
    assert not RUN.search(linear(page)["SM90"])
    assert cells(page, "## KV caches", "nvfp4_affine")["SM90"] == f"`triton`: {run} right"
    assert cells(page, "## KV caches", "fp8")["SM90"] == f"*SGLang*: {run} **wrong** (qwen2 with KV fp8)"
    assert cells(page, "## KV caches", "fp8")["SM100"] == "*SGLang*: not run"


def test_compilations(matrix: ModuleType, tmp_path: Path) -> None:
    """A cell is compiled where every kernel of its backend is, and nothing of it failed in the newest file."""
    backend = next(backend for backend in BACKENDS if backend.name == "triton_block_scaled")
    rows = [(name, f"{name} 64x16", 90, True) for name in backend.kernels]
    compiled(tmp_path, "a", rows)
    assert linear(matrix.render(matrix.read_evidence(tmp_path)))["SM90"] == "`triton_block_scaled`: compiled"
    assert linear(matrix.render(matrix.read_evidence(tmp_path)))["SM80"] == "`triton_block_scaled`: interpreted"
    compiled(tmp_path, "a", rows[1:])
    assert linear(matrix.render(matrix.read_evidence(tmp_path)))["SM90"] == "`triton_block_scaled`: interpreted"
    compiled(tmp_path, "a", [*rows, (backend.kernels[0], "other", 90, False)])
    page = matrix.render(matrix.read_evidence(tmp_path))
    assert linear(page)["SM90"] == "`triton_block_scaled`: **does not compile**"
    assert (
        f"{len(rows) + 1} kernels and configurations (a sample of the configurations) for SM90, 1 with a problem."
        in page
    )
    compiled(tmp_path, "b", [(backend.kernels[0], "other", 90, True)], date="2026-11-30")
    assert linear(matrix.render(matrix.read_evidence(tmp_path)))["SM90"] == "`triton_block_scaled`: compiled"


def test_compilations_of_a_cache(matrix: ModuleType, tmp_path: Path) -> None:
    """Each recipe by its own cases; a rotated one needs the kernel that turns the queries as well."""
    recipes = ("nvfp4_rotate", "nvfp4")
    rows = [(name, f"x {recipe} D=128", 90, True) for name in matrix.ATTENTION for recipe in recipes]
    compiled(tmp_path, "a", rows)
    found = {
        recipe: cells(matrix.render(matrix.read_evidence(tmp_path)), "## KV caches", recipe)["SM90"]
        for recipe in KV_RECIPES
    }
    assert found == {
        "fp8": "*SGLang*: not run",
        "fp8_affine": "`triton`: interpreted",
        "nvfp4": "`triton`: compiled",
        "nvfp4_affine": "`triton`: interpreted",
        "nvfp4_rotate": "`triton`: interpreted",
    }
    compiled(tmp_path, "b", [("turn_kernel", "turn nvfp4_rotate D=128", 90, True)])
    page = matrix.render(matrix.read_evidence(tmp_path))
    assert cells(page, "## KV caches", "nvfp4_rotate")["SM90"] == "`triton`: compiled"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("served-x.json", "{}", "missing required field"),
        ("served-x.json", json.dumps({"date": "today"}), "Invalid"),
        ("aot-x.json", "{", "truncated"),
    ],
)
def test_a_file_of_another_form_is_an_error(
    matrix: ModuleType, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        matrix.read_evidence(tmp_path)


def test_an_unknown_verdict_is_an_error(matrix: ModuleType, tmp_path: Path) -> None:
    served(tmp_path, "x", [row(verdict="fine")])
    with pytest.raises(ValueError, match="Invalid enum value 'fine'"):
        matrix.read_evidence(tmp_path)


def test_backends_name_the_kernels_they_launch() -> None:
    """By the names of ``benchmarks.aot``: a kernel that no backend names would never count as compiled."""
    from benchmarks import aot

    known = {case.kernel.fn.__name__ for arch in aot.ARCHITECTURES for case in aot.cases(arch)}
    named = {name for backend in (*BACKENDS, *EXPERT_BACKENDS) for name in backend.kernels}
    assert named == known - AROUND
