"""Rules about config.json and hf_quant_config.json: names with a left-over sentinel, fields that disagree, missing exclusions.

Where the two files disagree, or a layer is declared otherwise than it is stored, the tensors decide. Where they fit both files, the
caller has to say which one is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.checkpoint.leftovers import BUFFERS, ServedLayers, layer_position
from sglang_modelopt_ext.checkpoint.names import canonical_name, matches
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QuantConfig, parse_quant_config, text_config
from sglang_modelopt_ext.checkpoint.reader import survey_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import MIXED_PRECISION
from sglang_modelopt_ext.workflow.quantize.markers import without_markers
from sglang_modelopt_ext.workflow.repair.working_copy import Step, WorkingCopy, quantized_modules

FIELDS = {"quant_algo": "algo", "group_size": "group_size", "kv_cache_quant_algo": "kv_cache_algo"}
"""The fields that both files may state, and the attribute of :class:`QuantConfig` for each."""

_EXCLUSIONS = ("exclude_modules", "ignore")
_KV_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")
_LISTED = "quantized_layers"
_FP8_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
"""ModelOpt's converted form of FP8 in config.json; other caches have their name there."""


def strip_sentinels(copy: WorkingCopy) -> Iterator[Step]:
    """Take the left-over marker off every name of both files. Raises ModelOptExtError where two entries become one."""
    for file, section in copy.sections().items():
        cleaned, names = without_markers(section, copy.source / file)
        if names:
            copy.set_section(file, cleaned)
        for old, new in names.items():
            yield Step(rule="sentinel", file=file, subject=new, change=f"was {old!r}: ModelOpt's marker is taken off")


def reconcile(copy: WorkingCopy, trust: str | None) -> Iterator[Step]:
    """Make the fields that both files state equal, and state in both what only one of them says of the KV cache.

    Args:
        copy: the working copy.
        trust: the file that is right where the tensors fit both; None where that is not known.

    Raises:
        ModelOptExtError: the tensors do not decide between the files.
    """
    sections = copy.sections()
    if len(sections) < 2:
        return
    (first, one), (second, other) = sections.items()
    parsed = {name: parse_quant_config(section, copy.folder / name) for name, section in sections.items()}
    differ = {
        name: {file: getattr(config, attribute) for file, config in parsed.items()}
        for name, attribute in FIELDS.items()
        if _states(one, name) and _states(other, name) and len({getattr(c, attribute) for c in parsed.values()}) > 1
    }
    if (
        all(_LISTED in section for section in (one, other))
        and parsed[first].quantized_layers != parsed[second].quantized_layers
    ):
        differ[_LISTED] = {first: one[_LISTED], second: other[_LISTED]}
    if differ:
        right, why = _decide(copy, differ, trust)
        for name, file in right.items():
            target = second if file == first else first
            value, old = differ[name][file], differ[name][target]
            _set_field(copy, target, name, value)
            what = "as in" if name == _LISTED else f"{value} instead of {old}, as in"
            yield Step(rule="disagreement", file=target, subject=name, change=f"{what} {file}: {why[name]}")
    for file, target in ((first, second), (second, first)):
        name = "kv_cache_quant_algo"
        algo = parsed[file].kv_cache_algo
        if algo is not None and not _states(sections[target], name):
            _set_field(copy, target, name, algo)
            yield Step(
                rule="disagreement", file=target, subject=name, change=f"{algo}, as in {file}: the only one to state it"
            )


def _states(section: Mapping[str, Any], name: str) -> bool:
    if name == "kv_cache_quant_algo":
        return any(key in section for key in _KV_KEYS)
    if name == "group_size":
        return _group_size_of(section) is not None
    return name in section


def _group_size_of(section: Mapping[str, Any]) -> int | None:
    return parse_quant_config({"quant_algo": None, **section}, Path(CONFIG_NAME)).group_size


def _decide(
    copy: WorkingCopy, differ: Mapping[str, Mapping[str, Any]], trust: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return, for each field, the file that is right, and why.

    Every combination is tried. Those under which the reader finds fewest faults in the tensors are possible: none but faults
    of another kind, such as scales that are missing, which other rules mend.

    Raises:
        ModelOptExtError: several are possible, and no file is trusted or none of them is free of faults.
    """
    files = list(next(iter(differ.values())))
    originals = copy.sections()
    tried: list[tuple[dict[str, str], list[ModelOptExtError]]] = []
    for choice in itertools.product(files, repeat=len(differ)):
        chosen = dict(zip(differ, choice, strict=True))
        for name, file in chosen.items():
            for target in files:
                _set_field(copy, target, name, differ[name][file])
        tried.append((chosen, survey_checkpoint(copy.folder, copy.config())[1]))
        for target, section in originals.items():
            copy.set_section(target, section)
    least = min(len(problems) for _, problems in tried)
    possible = [chosen for chosen, problems in tried if len(problems) == least]
    if least and len(possible) > 1:
        fault = next(problems[0] for _, problems in tried if len(problems) == least)
        expected = f"tensors that fit {' or '.join(files)} in {', '.join(differ)}"
        raise ModelOptExtError.at(copy.source, ", ".join(differ), expected, fault)
    right, why = {}, {}
    for name in differ:
        fitting = {chosen[name] for chosen in possible}
        if len(fitting) == 1:
            (right[name],) = fitting
            why[name] = "the tensors fit it" + (" best" if least else " only")
        elif trust is not None:
            right[name], why[name] = trust, "by --trust; the tensors fit both"
        else:
            values = " or ".join(f"{value} ({file})" for file, value in differ[name].items())
            got = "tensors that fit both" if name != _LISTED else "tensors that fit both lists"
            expected = f"--trust FILE, to say which is right: {values}" if name != _LISTED else "--trust FILE"
            raise ModelOptExtError.at(copy.source, name, expected, got)
    return right, why


def _set_field(copy: WorkingCopy, file: str, name: str, value: Any) -> None:
    """State a field in one file, in the form that ModelOpt gives it there."""
    section = copy.section(file)
    assert section is not None, "both sections were found"
    if name == "kv_cache_quant_algo":
        for key in _KV_KEYS:
            section.pop(key, None)
        if file == CONFIG_NAME:
            if value is not None:  # ModelOpt leaves the field out of config.json where there is none
                section["kv_cache_scheme"] = _FP8_SCHEME if value == "FP8" else value
        else:
            section[name] = value
    elif name == "group_size":
        groups = section.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            for side in ("weights", "input_activations"):
                if isinstance(group, dict) and isinstance(group.get(side), dict) and "group_size" in group[side]:
                    group[side]["group_size"] = value
        if name in section or not isinstance(groups, dict):
            section[name] = value
    else:
        if name == "quant_algo" and section.get(name) != value:
            section.pop("config_groups", None)  # they describe the other algorithm; readers go by quant_algo
        section[name] = value
    copy.set_section(file, section)


def reconcile_exclusions(copy: WorkingCopy) -> Iterator[Step]:
    """Exclude what is stored unquantized although it is declared as quantized, and make both lists of exclusions equal.

    A pattern that only one file has stays where no quantized layer is stored under it.
    """
    sections = copy.sections()
    config, tensors = copy.config(), copy.headers()
    quantized = quantized_modules(tensors)
    lists = {file: _excluded(section) for file, section in sections.items()}
    wanted = list(dict.fromkeys(name for names in lists.values() for name in names or ()))
    dropped = [pattern for pattern in config.doubtful_modules if any(matches(pattern, module) for module in quantized)]
    wanted = [name for name in wanted if name not in dropped]
    new, kind = _missing(config, tensors, quantized, ServedLayers.of(text_config(copy.folder)))
    wanted += [name for name in new if name not in wanted]
    if not new and not config.doubtful_modules:
        return
    for file, section in sections.items():
        old = lists[file]
        if old is None and not new:
            continue  # a file without a list does not disagree
        key = next((key for key in _EXCLUSIONS if section.get(key) is not None), _EXCLUSIONS[file == CONFIG_NAME])
        copy.set_section(file, {**section, key: wanted})
        for name in wanted:
            if name not in (old or ()):
                reason = kind.get(name, "excluded by the other file, and no quantized layer is stored under it")
                rule = "mtp-exclusion" if "multi-token" in reason else "exclusion"
                yield Step(rule=rule, file=file, subject=key, change=f"{name} added: {reason}")
        for name in old or ():
            if name in dropped:
                change = (
                    f"{name} taken off: a quantized layer is stored under it, and the other file does not exclude it"
                )
                yield Step(rule="exclusion", file=file, subject=key, change=change)


def _excluded(section: Mapping[str, Any]) -> Sequence[str] | None:
    return next((section[key] for key in _EXCLUSIONS if section.get(key) is not None), None)


def _missing(
    config: QuantConfig, tensors: Mapping[str, StoredTensor], quantized: set[str], served: ServedLayers
) -> tuple[list[str], dict[str, str]]:
    """Return the patterns of layers that are stored unquantized and declared as quantized, and the reason of each."""
    leaves = {module.rpartition(".")[2] for module in quantized}
    partly = {_block(module) for module in quantized if served.leaves_out(module)}
    names: dict[str, str] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        plain = last == "weight" and len(tensor.shape) == 2 and module not in quantized
        if not plain or name.endswith(BUFFERS) or config.layer(module) is None:
            continue
        if served.leaves_out(name):
            block = _block(module)
            if block in partly:
                names[module] = "a layer of a multi-token prediction block, stored in 16 bits"
            else:
                names[f"{block}*"] = "a multi-token prediction block, stored in 16 bits"
        elif module.rpartition(".")[2] in leaves and config.algo != MIXED_PRECISION:
            names[module] = "stored in 16 bits"
    return list(names), names


def _block(module: str) -> str:
    """Return the name of the multi-token prediction block that a module is in: up to its layer number, or ``mtp``."""
    parts = module.split(".")
    if layer_position(module) is not None and not canonical_name(module).startswith("mtp"):
        number = next(index for index, part in enumerate(parts) if part.isdigit())
        return ".".join(parts[: number + 1])
    first = next(index for index, part in enumerate(parts) if part == "mtp" or part.startswith("mtp_"))
    return ".".join(parts[: first + 1])
