"""The command line of the conformance run: ``python tests/conformance run``, and ``pack`` to make what it needs.

A folder that is run, and no ``python -m``: that would put the repository's root on sys.path, where the folder kernels/ would be
importable as ``kernels``, the name of a Hugging Face package.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMANDS = ("run", "pack", "worker")


def main() -> int:
    """Run the module that the first argument names."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
    runpy.run_path(str(HERE.parents[1] / "conftest.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python tests/conformance {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        return 2
    command = sys.argv.pop(1)
    from importlib import import_module

    result: int = import_module(f"tests.conformance.{command}").main()
    return result


if __name__ == "__main__":
    sys.exit(main())
