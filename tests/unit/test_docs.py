"""Generated documents match the code, and links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_modelopt_ext.env import ERROR_FILE, SETTINGS
from sglang_modelopt_ext.schemes.stock import STOCK_BEHAVIOUR
from sglang_modelopt_ext.schemes.table import FAMILIES, SCHEMES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("tool", ["support_matrix.py", "ownership_table.py", "cli_reference.py"])
def test_generated_pages_are_not_stale(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


def test_stock_behaviour_covers_the_table() -> None:
    assert STOCK_BEHAVIOUR.keys() == SCHEMES.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_names_every_flag_and_setting() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in [*FAMILIES, *(setting.variable for setting in SETTINGS if setting is not ERROR_FILE)]:
        assert name in text, name
