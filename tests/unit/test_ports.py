"""Ports that are given out: free, and not among those that the kernel gives to others."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sglang_modelopt_ext import ports


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the range that the kernel hands out."""
    file = tmp_path / "range"
    monkeypatch.setattr(ports, "_RANGE", file)
    return file


def test_it_is_below_the_ports_that_the_kernel_hands_out(given: Path) -> None:
    given.write_text("32768\t60999\n")
    found = {ports.free_port() for _ in range(50)}
    assert len(found) > 1
    assert all(20000 <= port < 32768 for port in found)


def test_a_port_in_use_is_not_given(given: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert not ports._is_free(taken.getsockname()[1])


@pytest.mark.parametrize("content", [None, "", "many", "1024 65535"])
def test_where_the_range_leaves_none_or_is_unknown_the_kernel_gives_one(content: str | None, given: Path) -> None:
    if content is not None:
        given.write_text(content)
    assert ports._is_free(ports.free_port())
