"""The rounding of weights on the GPU, in a process of its own: what it holds there is gone when the server looks for memory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.online.recipe import Recipe
from sglang_modelopt_ext.online.tensors import write_tensors

logger = logging.getLogger(__name__)

_REJECTED = 3
"""The exit code of a process whose last line is the error to raise."""


def write_apart(
    source: Path, modules: Collection[str], recipe: Recipe, folder: Path, device: str
) -> tuple[float, float]:
    """Call :func:`~sglang_modelopt_ext.online.tensors.write_tensors` in another process, which ends with this one.

    Where that process ends with an error of its own, such as no room on the GPU, the CPU does the work, with a warning.

    Raises:
        ModelOptExtError: what that function raises there.
    """
    request = {
        "source": str(source),
        "modules": sorted(modules),
        "recipe": asdict(recipe) | {"input_scales": recipe.input_scales and str(recipe.input_scales)},
        "folder": str(folder),
        "device": device,
    }
    # The other process reads the request up to the end of its line, and waits for the end of the stream, which is that of this one.
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended before
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            errors: list[str] = []
            reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
            reader.start()
            printed = process.stdout.read()
            code = process.wait()
            reader.join()
        except BaseException:
            process.kill()
            raise
    last = (errors or ["no output"])[-1].strip()
    if code == _REJECTED:
        raise ModelOptExtError(last)
    if code:
        logger.warning("modelopt_ext: weights are rounded on the CPU, for the process on the GPU ended: %s", last)
        for file in folder.iterdir():
            file.unlink()
        return write_tensors(source, modules, recipe, folder)
    error, max_error = json.loads(printed.splitlines()[-1])
    return float(error), float(max_error)


def _watch_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """Read a request from standard input and print the two errors; an error that is the user's ends with ``_REJECTED``."""
    request: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch_parent, daemon=True).start()
    fields = request["recipe"]
    scales = fields["input_scales"]
    recipe = Recipe(**(fields | {"input_scales": None if scales is None else Path(scales)}))
    try:
        found = write_tensors(
            Path(request["source"]), request["modules"], recipe, Path(request["folder"]), request["device"]
        )
    except ModelOptExtError as error:
        print(error, file=sys.stderr)
        return _REJECTED
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
