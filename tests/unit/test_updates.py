"""Updates of a running server's weights: what is rejected before anything is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.integration import updates

EAGER, GRAPHS = object(), object()


def answer(monkeypatch: pytest.MonkeyPatch, **runner: Any) -> tuple[bool, str]:
    fields = {
        "device": "cuda",
        "eager_runner": EAGER,
        "decode_cuda_graph_runner": None,
        "prefill_cuda_graph_runner": None,
    }
    updater = SimpleNamespace(get_model=torch.nn.Module, get_model_runner=lambda: SimpleNamespace(**fields | runner))
    monkeypatch.setattr(updates, "ext_config", lambda model: object())
    return updates._update_from_disk(lambda *_: (True, "served"), updater, "nowhere", "auto")


@pytest.mark.parametrize("kind", ["decode_cuda_graph_runner", "prefill_cuda_graph_runner"])
def test_captured_graphs_hold_the_old_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done, why = answer(monkeypatch, **{kind: GRAPHS})
    assert not done
    assert "update_weights_from_disk: CUDA graphs: expected a server without CUDA graphs (--disable-cuda-graph)" in why


@pytest.mark.parametrize(
    "runner", [{}, {"decode_cuda_graph_runner": EAGER}, {"device": "cpu", "decode_cuda_graph_runner": GRAPHS}]
)
def test_without_graphs_the_checkpoint_is_looked_at(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    done, why = answer(monkeypatch, **runner)
    assert not done
    assert "model_path: expected a local folder, got nowhere" in why
