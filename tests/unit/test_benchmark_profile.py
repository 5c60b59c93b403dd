"""``sglang_modelopt_ext.workflow.bench.profile``: a decode step out of a small trace written by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_modelopt_ext.checkpoint.tensors import read_headers
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.bench import report
from sglang_modelopt_ext.workflow.bench.load import Deadline, Load
from sglang_modelopt_ext.workflow.bench.models import make_models, model_folder
from sglang_modelopt_ext.workflow.bench.profile import capture, group_of, own_kernels, product_bytes, read_trace
from sglang_modelopt_ext.workflow.bench.server import Result
from tests.support.stub_server import running_stub

STEP = 100.0
ARGMAX = "void at::native::reduce_kernel<512, ArgMaxOps>"


def event(
    category: str, name: str, start: float, duration: float, correlation: int, **arguments: int
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "args": {"correlation": correlation, **arguments},
    }


def decode_step(number: int) -> list[dict[str, Any]]:
    """A graph of five kernels with two layers' products, 60 us; then a copy and the sampling, 15 us, outside of it."""
    at, graph = number * STEP, 10 * number
    return [
        event("cuda_runtime", "cudaGraphLaunch", at - 50, 5, graph),
        event("kernel", "rmsnorm_kernel", at, 10, graph),
        event("kernel", "decode_kernel", at + 10, 20, graph),
        event("kernel", "quantize_token_kernel", at + 20, 5, graph),  # while the product runs
        event("kernel", "decode_kernel", at + 35, 20, graph),
        event("kernel", "nvjet_hsh_128x8_TNT", at + 55, 5, graph),
        event("cuda_runtime", "cudaLaunchKernel", at + 10, 1, graph + 1),
        event("kernel", ARGMAX, at + 70, 10, graph + 1),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", at + 85, 5, graph + 2, bytes=64),
    ]


def write_trace(file: Path, steps: int) -> Path:
    events = [one for number in range(steps) for one in decode_step(number)]
    # Not of a step: a graph of one kernel, an event without a duration, and a kernel before the first step.
    events += [event("cuda_runtime", "cudaGraphLaunch", 0, 1, 9999), event("kernel", "fill", 65, 1, 9999)]
    events += [{"ph": "M", "name": "process_name"}, event("kernel", "earlier", -20, 5, 9998)]
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_models(root, "tiny", ["mxfp4"])
    return model_folder(root, "tiny", "mxfp4")


def test_a_decode_step(model: Path, tmp_path: Path) -> None:
    profile = read_trace(write_trace(tmp_path / "t.trace.json.gz", 4), model, 16)
    assert (profile.requests, profile.layers, profile.steps, profile.microseconds) == (16, 2, 3, STEP)
    rows = {row.name: (row.group, row.launches, row.microseconds) for row in profile.kernels}
    assert rows["decode_kernel"] == ("products, this package", 2, 40)
    assert rows["quantize_token_kernel"] == ("rounding, this package", 1, 5)
    assert rows["nvjet_hsh_128x8_TNT"] == ("products, others", 1, 5)
    assert rows["rmsnorm_kernel"] == ("norms", 1, 10)
    assert rows[ARGMAX] == ("sampling", 1, 10)
    assert "earlier" not in rows
    # Busy: 0-30, 35-60, 70-80, 85-90; the overlapped rounding counts once, and `fill` runs in one of three steps.
    assert profile.idle == pytest.approx(30 - 1 / 3)
    assert profile.kernels[0].name == "decode_kernel"


def test_groups_have_the_bytes_that_are_known(model: Path, tmp_path: Path) -> None:
    groups = {row.group: row for row in read_trace(write_trace(tmp_path / "t.gz", 3), model, 1).groups()}
    headers = read_headers(model)
    head = headers["lm_head.weight"].num_bytes
    codes = sum(tensor.num_bytes for name, tensor in headers.items() if "proj" in name)
    assert groups["products, this package"].bytes == codes
    assert groups["products, others"].bytes == head
    assert groups["copies"].bytes == 64
    assert groups["norms"].bytes is None
    assert product_bytes(model, own=False) == {"products, others": codes + head}


def test_a_mixture_reads_what_its_routing_decides(tmp_path: Path) -> None:
    make_models(tmp_path, "tiny-moe", ["mxfp4"])
    assert product_bytes(model_folder(tmp_path, "tiny-moe", "mxfp4"), own=True) == {}
    make_models(tmp_path, "tiny", ["mxfp4"], dummy=True)
    assert product_bytes(model_folder(tmp_path, "tiny", "mxfp4", dummy=True), own=True) == {}


def test_a_trace_without_graphs_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelOptExtError, match="CUDA graph"):
        read_trace(write_trace(tmp_path / "t.gz", 1), model, 1)


def test_a_server_is_asked_for_the_trace_of_its_decode_steps(model: Path, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def profiled(body: dict[str, Any]) -> None:
        asked.append(body)
        write_trace(Path(body["output_dir"]) / "1-TP-0-DECODE.trace.json.gz", 3)
        (Path(body["output_dir"]) / "1-TP-0-EXTEND.trace.json.gz").touch()

    with running_stub() as stub:
        load = Load(stub.port, 512, seed=0, threads=3)
        with pytest.raises(ModelOptExtError, match="decode steps, got none"):
            capture(load, model, 3, tmp_path, Deadline(30))
        stub.profiled = profiled
        profile = capture(load, model, 3, tmp_path, Deadline(30))
        load.close()
    assert (profile.requests, profile.microseconds) == (3, STEP)
    assert asked[0]["profile_by_stage"] is True
    assert asked[0]["activities"] == ["GPU"]
    # Requests outlive the profiled steps.
    assert stub.most == 3
    assert all(body["sampling_params"]["max_new_tokens"] > 2 * asked[0]["num_steps"] for body in stub.bodies)


def test_tables(model: Path, tmp_path: Path) -> None:
    profile = read_trace(write_trace(tmp_path / "t.gz", 3), model, 1)
    groups, kernels = report.profile_cells(profile)
    assert groups[0] == ["group", "launches a layer", "us", "MB", "TB/s", "share"]
    megabytes = profile.product_bytes["products, this package"] / 1e6
    assert groups[1] == [
        "products, this package",
        "1.00",
        "40.0",
        f"{megabytes:.1f}",
        f"{megabytes / 40:.2f}",
        "40.0 %",
    ]
    assert groups[-1][0] == "no kernel"
    assert kernels[1][:4] == ["decode_kernel", "products, this package", "1.00", "40.0"]
    run = report.Run("2026-11-29", "GPU", {}, "tiny", "command", "a", "Load.")
    page = report.as_markdown(run, [Result("a", profile=profile)])
    assert "## a: a decode step of 1 request(s), 100 us" in page


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("decode_kernel", "products, this package"),
        ("split_kernel", "attention, this package"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention, others"),
        ("fused_add_rmsnorm", "norms"),
        ("void flashinfer::sampling::TopPSamplingFromProbKernel", "sampling"),
        ("ncclDevKernel_AllReduce_Sum_bf16", "communication"),
        ("act_and_mul_kernel<silu>", "activation"),
        ("something_else", "other"),
    ],
)
def test_groups_of_kernels(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_own_kernels_are_found_in_every_group() -> None:
    assert set(own_kernels().values()) == {"gemm", "moe", "attention", "quantize"}
    assert own_kernels()["streamed_kernel"] == "gemm"  # written in Gluon, not in Triton
