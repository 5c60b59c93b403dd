"""Tasks of EleutherAI's lm-eval, run against a server through its OpenAI interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sglang_modelopt_ext.checkpoint.quant_config import text_config
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.server.client import ServerClient


class TaskScore(msgspec.Struct, frozen=True, kw_only=True):
    """The score of one metric of one task.

    Attributes:
        task, metric: lm-eval's names.
        value: the score, and ``stderr`` its standard error where lm-eval gives one.
    """

    task: str
    metric: str
    value: float
    stderr: float | None


def find_lm_eval() -> Any:
    """Return the package lm-eval. Raises ModelOptExtError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.models.openai_completions
        import lm_eval.tasks
    except ImportError as error:
        raise ModelOptExtError.at(
            "lm-eval", "import", "the package lm-eval (pip install 'sglang-modelopt-ext[evaluate]')", error
        ) from error
    return lm_eval


def run_tasks(
    server: ServerClient, tasks: Sequence[str], *, folder: Path | None = None, limit: int | None = None
) -> list[TaskScore]:
    """Run tasks against a running server.

    Args:
        server: the server.
        tasks: lm-eval's names.
        folder: folder with definitions of further tasks.
        limit: number of samples of each task; None for all.

    Raises:
        ModelOptExtError: no lm-eval, an unknown task, or one that fails.
    """
    lm_eval = find_lm_eval()
    manager = lm_eval.tasks.TaskManager(include_path=str(folder) if folder else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ModelOptExtError.at("command line", "--tasks", "names of lm-eval's tasks", unknown[0])
    arguments = {
        "base_url": f"{server.url}/v1/completions",
        "model": str(server.model),
        "tokenizer": str(server.model),
        "tokenizer_backend": "huggingface",
        "max_length": text_config(server.model).get("max_position_embeddings", 2048),
    }
    try:
        found = lm_eval.simple_evaluate(
            model="local-completions", model_args=arguments, tasks=list(tasks), task_manager=manager, limit=limit
        )
    except Exception as error:  # a task's data, template or metric may fail in any way
        raise ModelOptExtError.at(
            "lm-eval", ", ".join(tasks), "tasks that run", f"{type(error).__name__}: {error}"
        ) from error
    return task_scores(found["results"])


def task_scores(results: dict[str, dict[str, Any]]) -> list[TaskScore]:
    """Return lm-eval's results, ``{task: {"acc,none": 0.5, "acc_stderr,none": 0.01, ...}}``, as a list."""
    scores = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            name = metric if variant == "none" else f"{metric} ({variant})"
            stderr = float(error) if isinstance(error, int | float) else None
            scores.append(TaskScore(task=task, metric=name, value=float(value), stderr=stderr))
    return scores
