"""Generated parts of hand-written documents."""

from __future__ import annotations

from pathlib import Path


def replace_part(page: Path, name: str, text: str) -> None:
    """Replace what stands in a document between the lines ``<!-- begin: NAME ... -->`` and ``<!-- end: NAME -->``.

    Raises:
        SystemExit: the document has no such part.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- begin: {name}")
    head, newline, rest = rest.partition("\n")
    _, end, after = rest.partition(f"<!-- end: {name} -->")
    if not (begin and newline and end):
        raise SystemExit(f"{page}: expected the lines <!-- begin: {name} ... --> and <!-- end: {name} -->")
    page.write_text(f"{before}{begin}{head}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
