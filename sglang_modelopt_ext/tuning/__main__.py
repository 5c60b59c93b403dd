"""The command line of :mod:`sglang_modelopt_ext.tuning.run`::

python -m sglang_modelopt_ext.tuning --model DIR [--tp-size N] [--tokens 1,16,256] [--output FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sglang_modelopt_ext.backends.timings import FORMAT, TuningFile, file_name, gpu_of, versions, write
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import TUNING
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.tuning.run import TOKENS, merge, tune


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the tuning file, and print how it is used.

    Args:
        argv: the command line, ``sys.argv`` by default.

    Returns:
        The exit status: 0, or 1 after an error, which is printed in one line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sglang_modelopt_ext.tuning",
        description="Measure which kernel serves the layers of a checkpoint fastest on the GPU at hand.",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a ModelOpt checkpoint")
    parser.add_argument("--tp-size", type=int, default=1, metavar="N", help="ranks that share the model (default: 1)")
    parser.add_argument(
        "--tokens",
        type=_numbers,
        default=TOKENS,
        metavar="M,M,...",
        help=f"numbers of tokens to measure, with equal weight (default: {','.join(map(str, TOKENS))})",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write or to add to (default: named after the GPU, here)"
    )
    arguments = parser.parse_args(argv)
    try:
        device = Device.here()
        if device.kind != "cuda":
            raise ModelOptExtError.at("command line", "device", "an NVIDIA GPU to measure on", device.name)
        gpu = gpu_of(torch.device("cuda"))
        path = arguments.output or Path(file_name(gpu))
        if not path.parent.is_dir():
            raise ModelOptExtError.at(path, "folder", "one that exists", "none")
        # Raise the error of a file that cannot be added to before measuring, which takes minutes.
        merge(path, TuningFile(FORMAT, gpu, versions(), list(arguments.tokens), []))
        content = tune(arguments.model, tp_size=arguments.tp_size, tokens=arguments.tokens, report=_say)
        write(path, merge(path, content))
    except ModelOptExtError as error:
        print(error.one_line(), file=sys.stderr)
        return 1
    print(f"{path}: {len(content.results)} layers. To serve with it: {TUNING.variable}={path.resolve()}")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if not all(number > 0 for number in numbers) or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different positive numbers")
    return numbers


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
