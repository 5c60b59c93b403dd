#!/usr/bin/env python3
"""Another version of SGLang than the installed one: its differences from the contract, and the tests with it.

    python tools/sglang_version.py contract 0.5.24   # downloads its wheel and reads it: no environment, nothing imported
    python tools/sglang_version.py test 0.5.22       # the tests that depend on the version, in an environment with it
    python tools/sglang_version.py test              # with every tested version but the installed one

Run by the Makefile with the Python of ``.venv``. The environment of another version, ``.venv-sglang-<version>``, holds that SGLang
and nothing else: every other package is that of ``.venv``, which comes behind it on the path.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang_modelopt_ext.backends import packages
from sglang_modelopt_ext.integration import contract
from sglang_modelopt_ext.integration.plugin import all_hooks
from sglang_modelopt_ext.schemes.versions import TESTED_SGLANG, installed_sglang

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/unit/test_sglang_contract.py",
    "tests/unit/test_online_launch.py",
    "tests/unit/test_plugin.py",
    "tests/unit/test_stock_decisions.py",
    "tests/unit/test_stock_models.py",
    "tests/unit/test_kv_cache.py",
    "tests/unit/test_kv_scales.py",
    "tests/unit/test_kv_scales_hub.py",
    "tests/layers/test_moe.py",
    "tests/serving/test_recipes.py::test_mixed_precision",
    "tests/serving/test_moe.py::test_mixed_precision",
)
"""Tests that read SGLang, decide about it, or run in it; the last two start servers, and update the weights of one."""

SHARED = "shared.pth"
STAMP = "sglang-version.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, ``sys.argv[1:]`` by default, and return the exit code."""
    parser = argparse.ArgumentParser(description="Another version of SGLang than the installed one.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("contract", help="list the differences of a version from the contract")
    command.add_argument("version")
    command = commands.add_parser("test", help="run the tests that depend on the version")
    command.add_argument("version", nargs="?", help="default: every tested version but the installed one")
    options, rest = parser.parse_known_args(argv)
    if options.command == "contract":
        return list_broken(options.version)
    others = [version for version in TESTED_SGLANG if version != installed_sglang()]
    codes = [test(version, rest) for version in ([options.version] if options.version else others)]
    return max(codes, default=0)


def pins(metadata: str) -> Iterator[str]:
    """Yield a line for each package of GPU kernels that an SGLang pins in another version than ours are written for."""
    for name, version in packages.VERSIONS.items():
        pattern = rf"^Requires-Dist: {name.replace('-', '[-_]')}(?:\[[^]]*\])?==([\w.]+)"
        pinned = re.search(pattern, metadata, re.MULTILINE)
        if pinned is None or pinned[1] != version:
            found = pinned[1] if pinned else "no version"
            yield f"note: pins {found} of {name}; its kernels serve here in {version} only, ours do otherwise"


def list_broken(version: str) -> int:
    """Print the differences of a version from the contract, and return 1 where there are any."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, f"sglang=={version}"]
        pip(*download)
        (wheel,) = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place, [name for name in archive.namelist() if name.endswith((".py", "/METADATA"))])
        (metadata,) = place.glob("sglang-*.dist-info/METADATA")
        for note in pins(metadata.read_text(encoding="utf-8")):
            print(note)
        uses = (*contract.USES, *contract.of_hooks(all_hooks()))
        broken = contract.check(uses, place / "sglang")
    for line in broken:
        print(line)
    print(f"SGLang {version}: {len(broken)} differences from {len(uses)} rows of the contract")
    return min(len(broken), 1)


def pip(*arguments: str) -> None:
    """Run pip. Raises SystemExit, after what pip printed, where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"sglang_version: failed: {' '.join(command)}")


def environment(version: str) -> Path:
    """Return the environment with ``version``, made if it is not there or was made beside another environment."""
    place = ROOT / f".venv-sglang-{version}"
    shared = sysconfig.get_path("purelib")
    stamp, wanted = place / STAMP, {"sglang": version, "shared": shared, "python": sys.version}
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return place
    print(f"making {place.name}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)], check=True)
    own = place / Path(shared).relative_to(sys.prefix)
    # --target: pip would otherwise find the SGLang of the shared packages and try to uninstall it.
    pip("install", "--quiet", "--no-deps", "--target", str(own), f"sglang=={version}")
    # As a directory of site-packages, so that what it has in .pth files (this project, the CPU shims) is there as well.
    (own / SHARED).write_text(f"import site; site.addsitedir({shared!r})\n")
    stamp.write_text(json.dumps(wanted))
    return place


def test(version: str, arguments: list[str]) -> int:
    """Run the tests that depend on the version with it, and return pytest's exit code."""
    python = environment(version) / "bin" / "python"
    print(f"the tests with SGLang {version}", flush=True)
    # pytest's script and not `-m pytest`, which would put the repository root on sys.path.
    script = Path(sysconfig.get_path("scripts")) / "pytest"
    sources = {"SGLANG_MODELOPT_EXT_TEST_CONTRACTS": str(Path(sys.prefix) / "contracts")}
    command = [str(python), str(script), *(arguments or TESTS)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **sources}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
