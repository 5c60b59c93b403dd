"""Makes the pack: every export, and what an independent reading of it says on a CPU, in one compressed archive.

    python tests/conformance pack .exports

ModelOpt makes the exports, which takes minutes the first time; they are kept in ``.export-cache``. A run needs the pack alone: the
machine with the GPU has neither ModelOpt nor a network.
"""

from __future__ import annotations

import argparse
import json
import lzma
import tarfile
import time
from pathlib import Path
from typing import Any

from tests.support.cache import folder_digest

ARCHIVE, MANIFEST = "exports.tar.xz", "manifest.json"
CHECK_PROMPTS, CHECK_LENGTH, CHECK_SEED = 4, 16, 500
CAPABILITIES = (None, 90, 100)
"""On a CPU, before Blackwell and on it: which activations are rounded differs."""

DICTIONARY = 128 << 20
"""Bytes xz looks back: exports of one model have its unquantized tensors in common, and these are stored once."""


class StalePack(Exception):
    """The archive is not the one that its manifest describes."""


def check_prompts() -> list[list[int]]:
    """The prompts whose log probabilities are in the manifest."""
    from tests.support.models import random_ids

    return [random_ids(CHECK_LENGTH, CHECK_SEED + number, vocab=511) for number in range(CHECK_PROMPTS)]


def build(target: Path, names: list[str] | None = None) -> None:
    """Writes the archive and its manifest to ``target``."""
    from tests.conformance.cases import CASES
    from tests.conformance.exports import EXPORTS
    from tests.conformance.reading import Reading, read_check

    target.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    for name in names or list(EXPORTS):
        start = time.monotonic()
        folder = EXPORTS[name].make()
        readings: dict[str, Any] = {}
        cases = [case for case in CASES if case.reads == name]
        for reading in (Reading.of(case, capability) for case in cases for capability in CAPABILITIES):
            if reading.key not in readings:
                readings[reading.key] = read_check(folder, reading, check_prompts())
        folders[name] = folder
        manifest[name] = {"digest": folder_digest(folder), "readings": readings}
        print(f"{name}: {folders[name].name}, {time.monotonic() - start:.1f} s", flush=True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": DICTIONARY}]
    with (
        lzma.open(target / ARCHIVE, "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for name, folder in sorted(folders.items()):
            for file in sorted(folder.iterdir()):
                archive.add(file, arcname=f"{name}/{file.name}", filter=_anonymous)
    (target / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    print(f"{target / ARCHIVE}: {(target / ARCHIVE).stat().st_size / 2**20:.1f} MiB, {len(folders)} exports")


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
    return member


def unpack(pack: Path, target: Path) -> dict[str, Any]:
    """Extracts the archive to ``target`` and returns the manifest. Raises StalePack where a folder is not the one it describes."""
    text = (pack / MANIFEST).read_text(encoding="utf-8")
    manifest: dict[str, Any] = json.loads(text)
    with tarfile.open(pack / ARCHIVE, "r:xz") as archive:
        archive.extractall(target, filter="data")
    for name, entry in manifest.items():
        found = folder_digest(target / name)
        if found != entry["digest"]:
            raise StalePack(
                f"{pack}: {name} has the digest {found}, its manifest says {entry['digest']}: build the pack again"
            )
    (target / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("target", type=Path, help="the folder of the pack, such as .exports")
    parser.add_argument("--only", metavar="A,B", help="these exports alone")
    args = parser.parse_args()
    build(args.target, args.only.split(",") if args.only else None)
    return 0
