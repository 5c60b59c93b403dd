"""Time servers of several models under one load: run ``python -m benchmarks.serving --model DIR[=FLAG] ... --text FILE``.

Each ``--model`` is a checkpoint's folder, with ``=FLAG`` for its ``--quantization``; the first is the reference of the
divergence, so give the unquantized model first, then models that SGLang serves without this package, then ours.
``sglang.benchmark.serving`` drives the load (random token ids, no download). Arguments after ``--`` go to every server. Prints
one line for each model, at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.text import begin_token, encode, load_tokenizer, split_windows, spread
from sglang_modelopt_ext.workflow.evaluate.measure import Logprobs, describe, mean_divergence
from sglang_modelopt_ext.workflow.server.process import ServerProcess


@dataclass(frozen=True)
class Load:
    """Requests that every server gets.

    Attributes:
        windows: token windows whose distributions are compared.
        requests: number of requests, all of one length.
        input_tokens, output_tokens: tokens in and out of each request.
        concurrency: requests in flight at a time.
    """

    windows: Sequence[Sequence[int]]
    requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int


@dataclass(frozen=True)
class Result:
    """Result of one model: milliseconds to the first token and between tokens (medians), output tokens a second, KL in nats."""

    name: str
    first_token: float
    between_tokens: float
    tokens_per_second: float
    divergence: float | None


def parse_model(text: str) -> tuple[Path, str | None]:
    """Parse ``DIR`` or ``DIR=FLAG`` into a folder and a flag."""
    folder, _, flag = text.partition("=")
    return Path(folder), flag or None


def drive(server: ServerProcess, load: Load, folder: Path) -> dict[str, float]:
    """Run ``sglang.benchmark.serving`` and return its results. Raises ModelOptExtError when a request failed."""
    output = folder / "result.jsonl"
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--host", "127.0.0.1"]
    command += ["--port", str(server.port), "--model", str(server.model), "--tokenizer", str(server.model)]
    command += ["--dataset-name", "random-ids", "--num-prompts", str(load.requests), "--random-range-ratio", "1.0"]
    command += ["--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)]
    command += ["--max-concurrency", str(load.concurrency), "--output-file", str(output), "--disable-tqdm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not output.exists():
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ModelOptExtError.at(server.model, "sglang.benchmark.serving", "a result", last)
    result: dict[str, float] = json.loads(output.read_text(encoding="utf-8").splitlines()[-1])
    if result["completed"] != load.requests:
        raise ModelOptExtError.at(server.model, "completed requests", load.requests, result["completed"])
    return result


def measure(
    model: Path, flag: str | None, load: Load, reference: Sequence[Logprobs] | None, arguments: Sequence[str], log: Path
) -> tuple[Result, list[Logprobs]]:
    """Start a server, score the windows, drive the load and stop the server."""
    with (
        ServerProcess(model, log=log, quantization=flag, arguments=arguments) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        logprobs = [server.full_vocab_logprobs(window) for window in load.windows]
        server.flush_cache()
        result = drive(server, load, Path(folder))
    name = describe(model)[0] + (f" {flag}" if flag else "")
    divergence = None if reference is None else mean_divergence(reference, logprobs)
    times = result["median_ttft_ms"], result["median_itl_ms"], result["output_throughput"]
    return Result(name, *times, divergence), logprobs


def format_line(result: Result) -> str:
    """Format a result as a row under :data:`HEADER`."""
    divergence = "-" if result.divergence is None else f"{result.divergence:.5f}"
    return (
        f"{result.name:40}{result.first_token:10.1f}{result.between_tokens:10.2f}{result.tokens_per_second:10.1f}"
        f"{divergence:>11}"
    )


HEADER = f"{'option':40}{'TTFT ms':>10}{'ITL ms':>10}{'tok/s':>10}{'KL (nats)':>11}"


def main() -> int:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, type=parse_model, metavar="DIR[=FLAG]")
    parser.add_argument("--text", required=True, type=Path, help="held-out text for the divergence")
    parser.add_argument("--windows", type=int, default=8, help="windows of it")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--input-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--log", type=Path, default=Path("serving.log"), help="what the servers print")
    arguments = parser.parse_args(sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else None)
    extra = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    try:
        tokenizer = load_tokenizer(arguments.model[0][0])
        tokens = encode(tokenizer, [arguments.text.read_text(encoding="utf-8")])
        windows = spread(split_windows(tokens, arguments.window_tokens, begin_token(tokenizer)), arguments.windows)
        sizes = arguments.requests, arguments.input_tokens, arguments.output_tokens, arguments.concurrency
        load = Load(windows, *sizes)
        results, reference = [], None
        for model, flag in arguments.model:
            result, logprobs = measure(model, flag, load, reference, extra, arguments.log)
            reference = reference or logprobs
            results.append(result)
    except ModelOptExtError as error:
        print(error, file=sys.stderr)
        return 1
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{hardware}; {load.requests} requests, {load.input_tokens} + {load.output_tokens} tokens, {load.concurrency} at a time"
    )
    print(HEADER)
    for result in results:
        print(format_line(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
