"""The pack: every export and its independent reading on a CPU, in one compressed archive.

    python tests/conformance pack .exports

ModelOpt makes the exports, which takes minutes the first time; they are kept in ``.export-cache``. A run needs only the
pack: the machine with the GPU has neither ModelOpt nor a network.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import time
from pathlib import Path
from typing import Any

from tests.support.cache import folder_digest

ARCHIVE, MANIFEST = "exports.xz", "manifest.json"
CHECK_PROMPTS, CHECK_LENGTH, CHECK_SEED = 4, 16, 500
CAPABILITIES = (None, 90, 100)
"""A CPU, a GPU before Blackwell, and Blackwell: they round different activations."""


class StalePack(Exception):
    """An archive that does not match its manifest."""


def check_prompts() -> list[list[int]]:
    """Return the prompts whose log probabilities are in the manifest."""
    from tests.support.models import random_ids

    return [random_ids(CHECK_LENGTH, CHECK_SEED + number, vocab=511) for number in range(CHECK_PROMPTS)]


def build(target: Path, names: list[str] | None = None) -> None:
    """Write the archive and its manifest to ``target``."""
    from tests.conformance.cases import CASES, exports_of
    from tests.conformance.exports import EXPORTS
    from tests.conformance.reading import Reading, read_check

    target.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    for name in names or exports_of(CASES):
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
    chunks: dict[bytes, bytes] = {}
    for name, folder in folders.items():
        files = {file.name: _chunks(file) for file in sorted(folder.iterdir())}
        chunks.update({_digest(part): part for parts in files.values() for part in parts})
        manifest[name]["files"] = {file: [_digest(part).hex() for part in parts] for file, parts in files.items()}
    with lzma.open(target / ARCHIVE, "wb", preset=1) as stream:
        for part in chunks.values():
            stream.write(part)
    content = {"chunks": {key.hex(): len(part) for key, part in chunks.items()}, "exports": manifest}
    (target / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    print(f"{target / ARCHIVE}: {(target / ARCHIVE).stat().st_size / 2**20:.1f} MiB, {len(folders)} exports")


def _digest(part: bytes) -> bytes:
    return hashlib.sha256(part).digest()[:12]


def _chunks(file: Path) -> list[bytes]:
    """Return the content of a file, split where the tensors of a safetensors file begin, since exports share many of them."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return [content]
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    places = sorted({start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"})
    cuts = [0, *places, len(content)]
    return [content[begin:end] for begin, end in itertools.pairwise(cuts) if end > begin]


def unpack(pack: Path, target: Path) -> dict[str, Any]:
    """Write the exports of a pack to ``target`` and return each one's manifest entry.

    Raises:
        StalePack: an export differs from the one its readings were made of.
    """
    content = json.loads((pack / MANIFEST).read_text(encoding="utf-8"))
    data = memoryview(lzma.decompress((pack / ARCHIVE).read_bytes()))
    ends = list(itertools.accumulate(content["chunks"].values()))
    parts = {key: data[end - size : end] for (key, size), end in zip(content["chunks"].items(), ends, strict=True)}
    exports: dict[str, Any] = content["exports"]
    for name, entry in exports.items():
        (target / name).mkdir(parents=True)
        for file, keys in entry["files"].items():
            (target / name / file).write_bytes(b"".join(parts[key] for key in keys))
        found = folder_digest(target / name)
        if found != entry["digest"]:
            raise StalePack(f"{pack}: {name} is {found}, its readings are of {entry['digest']}: make the pack again")
    (target / MANIFEST).write_text(json.dumps(exports), encoding="utf-8")
    return exports


def main() -> int:
    """Parse the command line and build the pack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("target", type=Path, help="the folder of the pack, such as .exports")
    parser.add_argument("--only", metavar="A,B", help="the exports of these cases alone, * for any part")
    parser.add_argument("--missing", type=Path, metavar="FILE", help="of cases that these results have no row of")
    args = parser.parse_args()
    from tests.conformance.cases import chosen, exports_of

    build(args.target, exports_of(chosen(1, args.only, args.missing)))
    return 0
