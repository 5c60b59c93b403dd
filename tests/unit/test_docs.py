"""Generated documents match the code, and links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_modelopt_ext.env import SETTINGS
from sglang_modelopt_ext.schemes.stock import STOCK_BEHAVIOUR
from sglang_modelopt_ext.schemes.table import FAMILIES, SCHEMES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
TEMPLATE = "sglang_modelopt_ext/cli/NAME.py"
"""The file of a command that is still to be written, in docs/adding.md."""
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


@pytest.mark.parametrize("tool", ["support_matrix.py", "model_classes.py", "ownership_table.py", "cli_reference.py"])
def test_generated_pages_are_not_stale(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


def test_stock_behaviour_covers_the_table() -> None:
    assert STOCK_BEHAVIOUR.keys() == SCHEMES.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_to_headings() -> None:
    """``page.md#heading`` and ``#heading`` name a heading of that page, by GitHub's rule."""
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert anchor in anchors(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings: lower case, spaces as hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_links_to_every_document() -> None:
    linked = {(DOCS / target).resolve() for target in LINK.findall(INDEX.read_text(encoding="utf-8"))}
    assert {page.name for page in DOCS.glob("*.md") if page not in linked} == {INDEX.name}


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_figures_of_the_readme_stand_in_the_page_that_their_row_links_to() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = text.partition("## Measured\n")[2].partition("\n## ")[0]
    rows = [line for line in measured.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) >= 4
    for row in rows:
        (source,) = LINK.findall(row)
        page = (ROOT / source).read_text(encoding="utf-8")
        figures = re.findall(r"\d+\.\d+(?:-\d+\.\d+)?", LINK.sub("", row))
        assert figures, row
        assert [figure for figure in figures if figure not in page] == [], row


def test_every_flag_and_setting_is_documented() -> None:
    settings = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert [setting.variable for setting in SETTINGS if setting.variable not in settings] == []
    serving = (DOCS / "serving.md").read_text(encoding="utf-8")
    assert [flag for flag in FAMILIES if flag not in serving] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/adding.md", "docs/architecture.md"])
def test_named_files_exist(page: str) -> None:
    """A file is named by its path, or by the end of it."""
    folders = ("benchmarks", "cpu_runtime", "examples", "kernels", "sglang_modelopt_ext", "tests", "tools")
    paths = [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.*")]
    named = set(re.findall(r"`([\w/.-]+\.(?:py|txt))`", (ROOT / page).read_text(encoding="utf-8")))
    assert named
    missing = {name for name in named - {TEMPLATE} if not any(f"/{path}".endswith(f"/{name}") for path in paths)}
    assert missing == set()
