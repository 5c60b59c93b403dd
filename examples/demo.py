"""A demo: quantize small language models with ModelOpt, serve them with SGLang, and show the cost and gain.

python examples/demo.py                       # the two models in examples/stdlib_lm, on a CPU or a GPU
MODEL=Qwen/Qwen2.5-0.5B python examples/demo.py   # any Llama or Qwen model: a folder or a name on the Hugging Face Hub
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

import torch
from stdlib_lm.corpus import collect, read_heldout

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import W4A8
from sglang_modelopt_ext.workflow.common.base_model import find_model
from sglang_modelopt_ext.workflow.common.text import begin_token, encode, load_tokenizer, split_windows, spread
from sglang_modelopt_ext.workflow.evaluate.measure import (
    Logprobs,
    Plan,
    Row,
    format_legend,
    format_table,
    measure,
    positions_within,
)
from sglang_modelopt_ext.workflow.server.client import vocabulary_size
from sglang_modelopt_ext.workflow.server.process import ServerProcess
from sglang_modelopt_ext.workflow.server.process_tree import ProcessTree

HERE = Path(__file__).resolve().parent
SHIPPED_MODEL = HERE / "stdlib_lm" / "model"
SHIPPED_MOE = HERE / "stdlib_lm" / "moe_model"
HELDOUT = HERE / "stdlib_lm" / "heldout.txt"
RECIPES = ("W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8")
SHIPPED = ((SHIPPED_MODEL, RECIPES), (SHIPPED_MOE, RECIPES[:1]))
"""Models and their recipes by default: a dense one and a mixture of experts."""
PROMPTS = (
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n",
)
ANSWER_TOKENS = 48
CALIBRATION_FILES = 16
SPEED_BATCH, SPEED_TOKENS = 8, 128
# Log probabilities kept for the divergence: 64 MB as float32, every position of the shipped model's windows.
DIVERGENCE_VALUES = 1 << 24
PACKAGES = ("sglang-modelopt-ext", "sglang", "nvidia-modelopt", "torch", "transformers")


class Clock:
    """A clock that prints each step with the time since the start."""

    def __init__(self, steps: int) -> None:
        self._begin = time.perf_counter()
        self._steps, self._step = steps, 0

    def step(self, title: str) -> None:
        """Begin the next step."""
        self._step += 1
        print(f"\n[{self.elapsed():5.1f} s] {self._step}/{self._steps}  {title}", flush=True)

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._begin


def write_calibration(folder: Path) -> list[Path]:
    """Write some of the standard library's modules, none of them held out, for ModelOpt to calibrate on."""
    heldout = {document.path for document in read_heldout(HELDOUT)}
    documents = [document for document in collect() if document.path not in heldout]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for document in spread(documents, CALIBRATION_FILES):
        files.append(folder / f"{document.path.replace('/', '.')}.txt")
        files[-1].write_text(document.text, encoding="utf-8")
    return files


def quantize(model: Path, recipe: str, texts: Sequence[Path], output: Path, log: Path) -> None:
    """Run ModelOpt in a process of its own, because it changes transformers for good. Its progress goes to the terminal."""
    command = [sys.executable, "-m", "sglang_modelopt_ext.cli", "quantize", str(model), "--recipe", recipe]
    command += ["--output", str(output), "--overwrite", "--samples", "32", "--no-layerwise", "--data", *map(str, texts)]
    log.parent.mkdir(parents=True, exist_ok=True)
    # A session of its own, so that Ctrl-C reaches it once, from here, and it can tidy up.
    processes = ProcessTree()
    process = processes.start(command, os.environ, log, stderr=None)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        raise
    finally:
        processes.kill()
    if code:
        raise ModelOptExtError.at(log, recipe, "a quantized checkpoint", f"exit code {code}")


def make_plan(model: Path, context: int, windows: int) -> Plan:
    """Return held-out text as windows for the model's tokenizer, and the prompts of the speed test."""
    tokenizer = load_tokenizer(model)
    documents = encode(tokenizer, [document.text for document in read_heldout(HELDOUT)])
    chosen = spread(split_windows(documents, context, begin_token(tokenizer)), windows)
    positions = positions_within(DIVERGENCE_VALUES, vocabulary_size(model), len(chosen))
    return Plan(chosen, positions, [PROMPTS[i % len(PROMPTS)] for i in range(SPEED_BATCH)], SPEED_TOKENS)


def serve(
    model: Path, quantization: str | None, plan: Plan, reference: list[Logprobs] | None, log: Path
) -> tuple[Row, list[str], list[Logprobs]]:
    """Start a server, measure it, and stop it."""
    with ServerProcess(model, quantization=quantization, log=log, record=True) as server:
        answers = [completion.text for completion in server.generate(PROMPTS, ANSWER_TOKENS)]
        row, logprobs = measure(server, plan, reference)
    return row, answers, logprobs


def print_answers(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> None:
    """Print every prompt with each model's continuation."""
    for number, prompt in enumerate(PROMPTS):
        print(f"\n=== {prompt!r}")
        for row, texts in zip(rows, answers, strict=True):
            print(f"--- {row.name}")
            print(prompt + texts[number])


def hardware() -> str:
    """Return a description of the hardware of the servers."""
    if torch.cuda.is_available():
        return f"hardware: {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # No CPU kernels for these formats: the quantized layers are computed by a plain PyTorch reference.
    return (
        f"hardware: {name}, {cores} cores, no GPU: the speeds are those of the reference path, not of the GPU kernels"
    )


def versions() -> str:
    """Return the versions of the packages that the table depends on."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return "versions: " + ", ".join(found)


def try_model(model: Path, recipes: Sequence[str], args: argparse.Namespace, clock: Clock) -> None:
    """Quantize one model to every recipe, serve it unquantized and quantized, and print its answers and its table."""
    output = args.output / model.name
    logs = output / "logs"
    clock.step(f"{model}: calibration and held-out text")
    texts = write_calibration(args.output / "calibration")
    plan = make_plan(model, args.context, args.windows)
    for recipe in recipes:
        clock.step(f"{model.name}: quantizing to {recipe} with NVIDIA ModelOpt")
        quantize(model, recipe, texts, output / recipe, logs / f"quantize-{recipe}.log")

    clock.step(f"{model.name}: serving it unquantized")
    row, texts_of, reference = serve(model, None, plan, None, logs / "serve-unquantized.log")
    rows, answers = [row], [texts_of]
    for recipe in recipes:
        clock.step(f"{model.name}: serving {recipe} with --quantization {W4A8}")
        row, texts_of, _ = serve(output / recipe, W4A8, plan, reference, logs / f"serve-{recipe}.log")
        rows.append(row)
        answers.append(texts_of)
    print_answers(rows, answers)
    print(f"\n{model}\n\n{format_table(rows)}\n\n{format_legend(plan)}")


def run(args: argparse.Namespace) -> None:
    """Run the whole demo."""
    chosen = SHIPPED if args.model is None else ((find_model(args.model), RECIPES),)
    clock = Clock(sum(2 + 2 * len(recipes) for _, recipes in chosen))
    load = os.getloadavg()[0]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / ".gitignore").write_text("*\n", encoding="utf-8")
    for model, recipes in chosen:
        try_model(model.resolve(), recipes, args, clock)
    print(f"\n{hardware()}\n{versions()}")
    print(f"load average when the run began: {load:.1f}; tokens/s suffer from every other busy process")
    print(f"checkpoints and logs: {args.output}; whole run {clock.elapsed():.0f} s")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL") or None,
        help="folder or Hugging Face name of a Llama, Qwen or Mixtral model (default: $MODEL, else the two shipped ones)",
    )
    parser.add_argument("--output", type=Path, default=HERE / "demo-output", help="where checkpoints and logs go")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens in a held-out window (default: 512, as the model was trained)"
    )
    parser.add_argument("--windows", type=int, default=12, help="held-out windows to score (default: 12)")
    return parser.parse_args()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; return the exit code."""
    args = parse_args()
    # Signals that stop the demo stop its servers too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        run(args)
    except ModelOptExtError as error:
        print(f"\n{error.one_line()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
