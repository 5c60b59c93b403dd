"""The corpus: the standard library's sources, split into training and held-out documents."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Folders that hold tests, other people's packages, machine-written tables or build configuration.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "pydoc_data",
    "encodings",
    "_bundled",
    "lib-dynload",
}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")

# Some modules carry a licence of their own (MIT, BSD, Secret Labs, ...). Leaving them out keeps the corpus,
# and the held-out text that is redistributed, under the Python licence alone.
_OTHER_LICENCE = re.compile(
    r"permission\s+(is\s+hereby\s+granted|to\s+use,?\s+copy)|SPDX-License-Identifier|apache\s+licen[sc]e"
    r"|redistribution\s+and\s+use\s+in\s+source|with\s+permission\s+from|(BSD|MIT)\s+licen[sc]e"
    r"|provided\s+.?as[- ]is",
    re.IGNORECASE,
)
_RESERVED = re.compile(r"all\s+rights\s+reserved", re.IGNORECASE)
_PYTHON_OWNED = re.compile(r"Python\s+Software\s+Foundation|Licensed\s+to\s+(the\s+)?PSF", re.IGNORECASE)

_HELDOUT_BYTES = 150_000
_HELDOUT_FILE_BYTES = (2_000, 40_000)
_SHINGLE_WORDS = 12
_MAX_OVERLAP = 0.05

_SEPARATOR = "=====#### held-out file: {} ####====="
_SEPARATOR_LINE = re.compile(r"^=====#### held-out file: (\S+) ####=====\n", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library folder, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Split:
    """The corpus in two disjoint sets of whole files."""

    train: list[Document]
    heldout: list[Document]
    max_overlap: float
    """Largest share of one held-out file's word 12-grams that also occur in some training file."""


def _is_under_python_licence(text: str) -> bool:
    """Return whether the file states no licence other than Python's own."""
    if _OTHER_LICENCE.search(text):
        return False
    return _RESERVED.search(text) is None or _PYTHON_OWNED.search(text) is not None


def collect(stdlib: Path | None = None) -> list[Document]:
    """Read a standard library's sources (the running interpreter's), in path order, exact duplicates dropped."""
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    documents: list[Document] = []
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip() or text in seen or not _is_under_python_licence(text):
            continue
        seen.add(text)
        documents.append(Document(relative.as_posix(), text))
    return documents


def _shingles(text: str) -> set[int]:
    """Return hashes of every run of twelve words, the unit in which near-duplicates are measured."""
    words = re.findall(r"\w+", text)
    return {hash(tuple(words[i : i + _SHINGLE_WORDS])) for i in range(len(words) - _SHINGLE_WORDS + 1)}


def _overlap(shingles: set[int], files_with: Counter[int], own_copies: int) -> float:
    """Return the share of the shingles that more files contain than `own_copies`."""
    return sum(files_with[s] > own_copies for s in shingles) / max(1, len(shingles))


def split(documents: list[Document]) -> Split:
    """Hold out whole files in the order of their path's sha256, until the held-out size is reached.

    A file that shares more than 5 % of its word 12-grams with any other file is never held out, so that a
    model cannot score well by having memorised a near-duplicate.
    """
    shingles = {d.path: _shingles(d.text) for d in documents}
    files_with = Counter(s for file in shingles.values() for s in file)
    low, high = _HELDOUT_FILE_BYTES
    heldout: list[Document] = []
    size = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.path.encode()).digest()):
        length = len(document.text.encode())
        # Small files are mostly imports; one large file would dominate the score.
        if not low <= length <= high or _overlap(shingles[document.path], files_with, 1) > _MAX_OVERLAP:
            continue
        heldout.append(document)
        size += length
        if size >= _HELDOUT_BYTES:
            break
    heldout.sort(key=lambda d: d.path)
    held_paths = {d.path for d in heldout}
    train = [d for d in documents if d.path not in held_paths]
    in_training = Counter(s for d in train for s in shingles[d.path])
    return Split(train, heldout, max(_overlap(shingles[d.path], in_training, 0) for d in heldout))


def digest(documents: list[Document]) -> str:
    """Return the sha256 over every document's path and text, in order."""
    sha = hashlib.sha256()
    for document in documents:
        sha.update(document.path.encode() + b"\0" + document.text.encode() + b"\0")
    return sha.hexdigest()


def write_heldout(documents: list[Document], file: Path) -> None:
    """Write the documents to one text file, each after a separator line that names it."""
    file.write_text(
        "".join(f"{_SEPARATOR.format(d.path)}\n{d.text}\n" for d in documents), encoding="utf-8", newline=""
    )


def read_heldout(file: Path) -> list[Document]:
    """Read the documents from a file of `write_heldout`."""
    with file.open(encoding="utf-8", newline="") as stream:
        _, *parts = _SEPARATOR_LINE.split(stream.read())
    # The newline before each separator belongs to the file format, not to the document.
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [Document(path, text.removesuffix("\n")) for path, text in pairs]
