"""The cases of the conformance run: an export, the arguments of its engine, and its reading."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tests.conformance import families, features
from tests.conformance.exports import EXPORTS, Export

Graphs = Literal["decode", "none", "all"]
Update = Literal["disk", "tensors"]

KV_CHUNK = 256
"""Tokens per prefill chunk in cases with a quantized cache: later chunks read earlier ones from the cache."""

DENSE_CHUNK = 512
"""Tokens per prefill chunk in some cases without a quantized cache. The others prefill each prompt in one chunk."""


@dataclass(frozen=True)
class Case:
    """The case of one engine.

    Attributes:
        name: of the case.
        export: the served export, by its name in the pack.
        reads: the export that it is read as, another one only for a control.
        kv: the recipe of the cache.
        math: the numerics of NVFP4 weights with FP8 activations.
        args: arguments of ``sglang.Engine`` besides those of every case.
        env: environment variables.
        chunk: tokens per prefill chunk; None: whole prompts.
        graphs: the CUDA graphs that are captured.
        plugin: whether this package's plugin is loaded.
        same_as: the case that must give the same log probabilities.
        expect: the verdict of a sound run; ``"any"`` for SGLang alone, and for its NVFP4 experts, whose numerics are its own.
        tp: tensor-parallel ranks.
        prefixes: whether prompts with a cached prefix are sent.
        draft: the export that drafts, none where the served checkpoint itself does, if at all.
        adapter: whether every request names a LoRA adapter on all quantized layers.
        starts_from: the export that the engine is started with, which is replaced by the case's before the first request.
        update: where the new weights come from: their folder, or tensors in a session.
    """

    name: str
    export: str
    reads: str
    kv: str
    math: Literal["exact", "fp8"] = "exact"
    activation: Literal["served", "none"] = "served"
    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    chunk: int | None = None
    graphs: Graphs = "decode"
    plugin: bool = True
    same_as: str | None = None
    expect: Literal["right", "wrong", "any"] = "right"
    tp: int = 1
    prefixes: bool = True
    draft: str | None = None
    adapter: bool = False
    starts_from: str | None = None
    update: Update = "disk"

    @property
    def of(self) -> Export:
        """Return the served export."""
        return EXPORTS[self.export]

    @property
    def classifies(self) -> bool:
        """Return whether the model scores whole prompts."""
        return self.of.family == "classifier"


def case(export: str, name: str = "", **options: Any) -> Case:
    """Return a case of an export, by default with the export's name and cache."""
    options = {"reads": export, "kv": EXPORTS[export].kv} | options
    if options["kv"] != "none":
        options.setdefault("chunk", KV_CHUNK)
    return Case(name or export, export, **options)


ROTATED = {"args": {"kv_cache_dtype": "modelopt_nvfp4_rotate"}, "kv": "nvfp4_rotate"}
MXFP4_ROUNDS = {"SGLANG_MODELOPT_EXT_MXFP4_ACTIVATIONS": "mxfp4"}
MXFP4_KEEPS = {"SGLANG_MODELOPT_EXT_MXFP4_ACTIVATIONS": "none"}
FP8_MATH: dict[str, Any] = {"math": "fp8", "env": {"SGLANG_MODELOPT_EXT_W4A8_MATH": "fp8"}}

NO_WARM_UP = {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
"""Without this SGLang compiles its block-FP8 product for 16384 numbers of tokens before it serves."""

_SPECIAL: dict[str, dict[str, Any]] = {
    "mxfp4": {"env": MXFP4_ROUNDS},
    "moe-mxfp4": {"env": MXFP4_ROUNDS},
    "kv-nvfp4-rotate": dict(ROTATED),
    "w4a8-nvfp4-mistral": {"graphs": "none"},
    "w4a8-nvfp4-qwen3": {"chunk": DENSE_CHUNK},
    "w4a8-mxfp4-llama": {"graphs": "all"},
    "w4a8-mxfp4-mistral": {"chunk": DENSE_CHUNK, "graphs": "none"},
    "w4a8-awq": {"graphs": "none"},
    "mxfp8": {"graphs": "none"},
    "int8-smoothquant": {"graphs": "none"},
    "moe-w4a8-nvfp4-mixtral": {"chunk": DENSE_CHUNK},
    "moe-mxfp8": {"graphs": "none"},
    "moe-int8-weight-only": {"graphs": "none"},
    "kv-nvfp4": {"graphs": "none"},
    "kv-linear-nvfp4-affine": {"args": families.STATES, "prefixes": False},
    "mix-block-fp8-inv": {"reads": "mix-block-fp8-rounded", "env": NO_WARM_UP},
    "mix-block-fp8-flat-deepseek-v3": {"reads": "mix-block-fp8-rounded-deepseek-v3", "env": NO_WARM_UP},
    "w4afp8": {"reads": "w4afp8-read", "env": NO_WARM_UP},
    "mix-unknown": {"reads": "mix-nvfp4-fp8"},
    "wrong-scale": {"reads": "trained-w4a8-nvfp4", "expect": "wrong"},
}
"""Arguments that differ from the plain case of an export."""

UNSTABLE = ("mix-block-fp8-flat-deepseek-v3",)
"""Exports that SGLang serves whose reading is unstable: where the rounding of one input falls the other way, as between a CPU
and a GPU, experts change, and the log probabilities of three tokens in four by 0.05 or more. They are held to SGLang alone."""

SGLANG_EXPERTS = ("moe-nvfp4", "mix-nvfp4-w4a16", "mix-nvfp4-fp8", "mix-block-fp8-inv", "mix-unknown")
"""Exports with NVFP4 experts that SGLang serves. It rounds what enters them by the largest of their scales, and adds atomically:
their answers differ from a reading of the recipe by about a tolerance, with this package and without it."""
_SPECIAL.update({name: {**_SPECIAL.get(name, {}), "expect": "any"} for name in (*UNSTABLE, *SGLANG_EXPERTS)})

LEFT_TO_SGLANG = (
    *("fp8", "nvfp4", "fp8-kv-fp8", "w4a16-nvfp4", "moe-nvfp4", "moe-fp8"),
    *("mix-nvfp4-w4a16", "mix-nvfp4-fp8", "mix-fp8-experts", "mix-block-fp8-inv", "mix-unknown"),
    *("mix-nvfp4-w4a16-gemma3", "mix-nvfp4-fp8-gemma3", "mix-block-fp8-flat-deepseek-v3", "w4afp8"),
)
"""Exports served without the plugin as well: the log probabilities must be the same."""


def of_family(name: str) -> list[Case]:
    """Return the cases of one of :data:`tests.conformance.families.ARCHITECTURES`, its unquantized twin first."""
    of = families.ARCHITECTURES[name]
    options: dict[str, Any] = {"args": of.args, "prefixes": of.prefixes}
    alone: dict[str, Any] = {**options, "plugin": False, "expect": "any"}
    cases = [case(f"bf16-{name}", **{**alone, "args": {**of.args, **of.twin}})]
    for recipe in of.recipes:
        if recipe in of.ours:
            cases.append(case(f"{recipe}-{name}", **{**options, "args": {**of.args, **families.OURS}}))
            cases.append(case(f"{recipe}-{name}", f"{recipe}-{name}-alone", **alone))
        else:
            cases.append(case(f"{recipe}-{name}", **options))
    return cases


FAMILY_CASES = tuple(one for name in families.ARCHITECTURES for one in of_family(name))

FEATURE_CASES = (
    case("bf16", "online-w4a8-mxfp4", reads="online", args={"quantization": features.ONLINE_FLAG}),
    case("w4a8-nvfp4-llama", "draft-eagle3-w4a8-nvfp4", draft="draft-eagle3", args=features.EAGLE3),
    case("trained-w4a8-nvfp4", "draft-standalone-w4a8-nvfp4", draft="trained-w4a8-nvfp4", args=features.STANDALONE),
    case(
        "w4a8-nvfp4-deepseek-v3-mtp",
        "mtp-w4a8-nvfp4-deepseek-v3",
        reads="w4a8-nvfp4-deepseek-v3",
        args=features.NEXTN,
    ),
    case("w4a8-nvfp4-llama", "lora-w4a8-nvfp4", adapter=True),
    case("w4a8-mxfp4-qwen2", "lora-w4a8-mxfp4", adapter=True),
    case("w4a8-nvfp4-phi3", "fast-w4a8-nvfp4-phi3", args=features.FAST, same_as="w4a8-nvfp4-phi3"),
    case("moe-w4a8-mxfp4-mixtral", "fast-moe-w4a8-mxfp4", args=features.FAST, same_as="moe-w4a8-mxfp4-mixtral"),
    case("w4a8-mxfp4-glm4", "streamer-w4a8-mxfp4-glm4", args=features.STREAMED, same_as="w4a8-mxfp4-glm4"),
    *(
        case("trained-w4a8-nvfp4", f"update-{kind}-w4a8-nvfp4", starts_from="wrong-scale", update=kind, graphs="none")
        for kind in get_args(Update)
    ),
    case("w4a8-nvfp4-classifier", args={"is_embedding": True}),
    case("w4a8-nvfp4-lm-head"),
)
"""Features that a CPU runs in part, or not at all."""

_OTHERS = {
    *("online", "draft-eagle3", "w4a8-nvfp4-deepseek-v3-mtp"),
    *("mix-block-fp8-rounded", "mix-block-fp8-rounded-deepseek-v3", "w4afp8-read"),
    *(one.name for one in (*FAMILY_CASES, *FEATURE_CASES)),
}
"""Exports that are served in these cases, or not by themselves, or only read."""

CASES: tuple[Case, ...] = (
    *(case(name, **_SPECIAL.get(name, {})) for name in EXPORTS if name not in _OTHERS),
    *FAMILY_CASES,
    *FEATURE_CASES,
    case("w4a8-nvfp4-qwen2", "w4a8-nvfp4-fp8-math", **FP8_MATH),
    case("moe-w4a8-nvfp4-mixtral", "moe-w4a8-nvfp4-fp8-math", **FP8_MATH),
    case("mxfp4", "mxfp4-weight-only", env=MXFP4_KEEPS, activation="none"),
    case("bf16", "kv-nvfp4-rotate-by-flag", **ROTATED),
    *(
        case(name, f"{name}-alone", **{**_SPECIAL.get(name, {}), "plugin": False, "same_as": name, "expect": "any"})
        for name in LEFT_TO_SGLANG
    ),
)

RANKS: tuple[Case, ...] = tuple(
    case(name, f"{name}-tp2", tp=2, same_as=name)
    for name in ("w4a8-nvfp4-qwen2", "w4a8-mxfp4-qwen2", "kv-nvfp4-affine", "moe-w4a8-nvfp4-qwen3_moe")
)
"""Cases over two ranks, by ``--tp 2``: beside those of one that they must agree with."""


FIRST = ("trained", "wrong-scale", "large", "w4a8", "moe-w4a8", "kv")
"""Cases that begin first, since a run may be ended early."""


def chosen(tp: int, only: str | None, missing: Path | None = None) -> list[Case]:
    """Return the cases of a run, the longest and most informative first.

    Args:
        tp: 1, or 2 for those over two ranks, beside those of one that they must agree with.
        only: names, comma-separated, with ``*`` for any part; None for all.
        missing: results of earlier runs: the cases that they have no row of, and those that these must agree with.
    """
    cases = sorted(CASES, key=lambda case: (case.graphs != "all", not case.name.startswith(FIRST)))
    if tp > 1:
        partners = {case.same_as for case in RANKS}
        cases = [*(case for case in CASES if case.name in partners), *RANKS]
    patterns = (only or "*").split(",")
    cases = [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
    if missing is None:
        return cases
    known = {row["case"] for row in json.loads(missing.read_text(encoding="utf-8"))["rows"]}
    partners = {case.same_as for case in cases if case.name not in known}
    return [case for case in cases if case.name not in known or case.name in partners]


def exports_of(cases: Iterable[Case]) -> list[str]:
    """Return the exports that cases need from a pack."""
    names = (name for case in cases for name in (case.export, case.reads, case.draft, case.starts_from) if name)
    return [name for name in dict.fromkeys(names) if not EXPORTS[name].large]
