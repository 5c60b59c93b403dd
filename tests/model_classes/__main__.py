"""The command line of the walk: ``python tests/model_classes [CLASS ...] [--results FILE]``.

A folder that is run, and no ``python -m``: see :mod:`tests.conformance.__main__`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import runpy
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("sglang", "nvidia-modelopt", "transformers")


def main() -> int:
    """Walk over the classes that are named, by default all, print a line for each, and write the results."""
    parser = argparse.ArgumentParser(description="Build and load SGLang's model classes without weights.")
    parser.add_argument("classes", nargs="*", help="names of classes (default: all)")
    parser.add_argument("--results", type=Path, help="a JSON file, whose other classes are kept")
    parser.add_argument("--only", action="append", metavar="ALGORITHM", help="only this recipe (may be repeated)")
    options = parser.parse_args()
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
    runpy.run_path(str(HERE.parents[1] / "conftest.py"))

    from tests.model_classes.export import RECIPES
    from tests.model_classes.registry import registered_classes
    from tests.model_classes.walk import preload, walk_all

    preload()
    recipes = [recipe for recipe in RECIPES if not options.only or recipe.algo in options.only]
    results = (
        json.loads(options.results.read_text()) if options.results and options.results.exists() else {"classes": {}}
    )
    results |= {"date": str(date.today()), "versions": {name: metadata.version(name) for name in PACKAGES}}
    for name, found in walk_all(options.classes or sorted(registered_classes()), recipes):
        line = {key: value for key, value in dataclasses.asdict(found).items() if value}
        results["classes"][name] = line
        print(name, json.dumps(line), flush=True)
        if options.results:
            options.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
