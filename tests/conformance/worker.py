"""One case in a process of its own, started by ``run.py``: starts the engine, queries it and judges the answers."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

PACKAGES = (
    "sglang",
    "torch",
    "triton",
    "transformers",
    "sglang-kernel",
    "flashinfer-python",
    "humming-kernels",
    "quack-kernels",
)


def hardware(device: str) -> dict[str, Any]:
    """Return the name and compute capability of the device, and the versions of the packages that decide kernels."""
    from importlib import metadata

    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    if device == "cpu":
        return {"gpu": "CPU", "capability": None, "versions": versions}
    major, minor = torch.cuda.get_device_capability()
    versions["cuda"] = str(torch.version.cuda)
    return {"gpu": torch.cuda.get_device_name(), "capability": 10 * major + minor, "versions": versions}


def run(name: str, tp: int, exports: Path, device: str, port: int) -> dict[str, Any]:
    """Serve and judge the case, and return the result with the answers."""
    import sglang
    import torch

    from tests.conformance import large
    from tests.conformance.cases import chosen
    from tests.conformance.drive import ADAPTER, Drive, engine_arguments, update
    from tests.conformance.judge import Judge
    from tests.conformance.pack import MANIFEST, check_prompts
    from tests.conformance.reading import Reading
    from tests.support.adapters import make_adapter
    from tests.support.reference import Reference

    case = next(case for case in chosen(tp, None) if case.name == name)
    seconds: dict[str, float] = {}
    start = time.monotonic()

    def lap(what: str) -> None:
        nonlocal start
        now = time.monotonic()
        seconds[what], start = round(now - start, 1), now
        print(f"CONFORMANCE {what} {seconds[what]} s", flush=True)

    served = exports / case.export
    if case.of.large:
        # A folder of its own: a control or a twin that runs at the same time makes one too.
        served = exports / "large" / case.name
        large.make(served, case.of.algo, device, shrink=1 if device == "cuda" else 8)
        lap("checkpoint")
    first = served if case.starts_from is None else exports / case.starts_from
    arguments = engine_arguments(case, str(first), device, port)
    adapter = None
    if case.adapter:
        # In bf16, as SGLang keeps it.
        weights = Reference(served).weights
        adapter = make_adapter(exports / "adapters" / case.name, weights, torch.bfloat16)
        arguments["lora_paths"] = [f"{ADAPTER}={adapter}"]
    if case.draft is not None:
        arguments["speculative_draft_model_path"] = str(exports / case.draft)
    engine = sglang.Engine(**arguments)
    attention = _attention(engine)
    lap("start")
    if case.starts_from is not None:
        update(engine, case.update, served)
        lap("update")
    drive = Drive(engine, case)
    scored = drive.all()
    lap("requests")
    engine.shutdown()
    found = hardware(device)
    reading = Reading.of(case, found["capability"], attention)
    manifest = json.loads((exports / MANIFEST).read_text(encoding="utf-8"))
    known = None if case.of.large or adapter else (manifest[case.reads]["readings"][reading.key], check_prompts())
    with torch.inference_mode():
        judge = Judge(served if case.of.large else exports / case.reads, case, reading, device, known, adapter)
        judgement = judge.judge(scored)
    lap("judgement")
    return {
        "judgement": judgement.as_json(),
        "repeats": drive.repeats,
        "variation": drive.variation,
        "tokens_per_step": drive.tokens_per_step,
        "reading": asdict(reading),
        "attention": attention,
        "seconds": seconds,
        "scored": [asdict(one) for one in scored],
        **found,
    }


def _attention(engine: Any) -> str:
    """Return SGLang's attention backend, from its resolved arguments."""
    from sglang.srt.arg_groups.overrides import resolved_view

    return str(resolved_view(engine.server_args).attention_backend)


def main() -> int:
    """Run one case by the command line, which ``run.py`` writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--exports", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    result = run(args.case, args.tp, args.exports, args.device, args.port)
    args.result.write_text(json.dumps(result), encoding="utf-8")
    # Remaining threads of the engine would keep the process alive.
    sys.stdout.flush()
    os._exit(0)
