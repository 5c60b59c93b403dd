"""Every YAML file of ModelOpt's recipe library: loaded with all of its fields passed on, or refused with the reason.

The files are found and read here a second time, with a resolver of imports of this module. A file that a new ModelOpt brings is
tested like the others.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("modelopt")
import modelopt_recipes

from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.rules import read_search
from sglang_modelopt_ext.workflow.quantize.library import COMMANDS, PTQ, SEARCH, files, library
from sglang_modelopt_ext.workflow.quantize.recipes import FROM_QUANTIZED, Changes, build, find_recipe

ROOT = Path(modelopt_recipes.__file__).parent
FILES = {file.relative_to(ROOT).with_suffix("").as_posix(): file for file in sorted(ROOT.rglob("*.y*ml"))}
DECIDED_BY_THE_RUN = {"enable", "checkpoint_dir", "save_every", "calib_mutates_weights"}
"""Options of ``layerwise`` that change no result: whether and where progress is kept."""


@functools.cache
def content(name: str) -> Any:
    """Return a file's content with its imports resolved: a part of a list is spliced in, a part of an object is merged."""
    documents = list(yaml.safe_load_all(FILES[name].read_text(encoding="utf-8")))
    head = documents[0] if isinstance(documents[0], dict) else {}
    parts = {key: content(re.sub(r"\.ya?ml$", "", path)) for key, path in head.get("imports", {}).items()}
    body = documents[-1]
    if len(documents) == 1 and isinstance(body, dict):
        body = {key: value for key, value in body.items() if key != "imports"}
    return resolved(body, parts)


def resolved(value: Any, parts: dict[str, Any]) -> Any:
    """Return ``value`` with every ``$import`` in it replaced by a part."""
    if isinstance(value, list):
        found: list[Any] = []
        for entry in value:
            if isinstance(entry, dict) and entry.keys() == {"$import"}:
                part = parts[entry["$import"]]
                found += part if isinstance(part, list) else [part]
            else:
                found.append(resolved(entry, parts))
        return found
    if isinstance(value, dict):
        own = {key: resolved(entry, parts) for key, entry in value.items() if key != "$import"}
        return {**parts[value["$import"]], **own} if "$import" in value else own
    return value


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the value of every leaf; number types (``e4m3``) as ModelOpt stores them."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from leaves(entry, (*path, str(index)))
    elif isinstance(value, str) and (match := re.fullmatch(r"e(\d+)m(\d+)", value)):
        yield (*path, "0"), int(match[1])
        yield (*path, "1"), int(match[2])
    else:
        yield path, value


def dropped(of_file: Any, passed: Any) -> dict[tuple[str, ...], Any]:
    """Return the leaves of the file that are not passed on as they are."""
    ours = dict(leaves(passed))
    return {path: value for path, value in leaves(of_file) if (path, ours.get(path, "nothing")) != (path, value)}


def steps(algorithm: Any) -> list[dict[str, Any]]:
    """Return the calibration steps of a file, without what the run decides."""
    if algorithm is None:
        return []
    found = []
    for step in algorithm if isinstance(algorithm, list) else [algorithm]:
        own = {"method": step} if isinstance(step, str) else dict(step)
        layerwise = {key: value for key, value in own.pop("layerwise", {}).items() if key not in DECIDED_BY_THE_RUN}
        found.append(own | ({"layerwise": layerwise} if layerwise else {}))
    return found


def kind(name: str) -> str | None:
    """Return what a file says it is."""
    documents = list(yaml.safe_load_all(FILES[name].read_text(encoding="utf-8")))
    metadata = documents[0].get("metadata") if isinstance(documents[0], dict) else None
    return metadata.get("recipe_type") if isinstance(metadata, dict) else None


def test_there_are_recipes_of_every_kind() -> None:
    kinds = [kind(name) for name in FILES]
    assert kinds.count(PTQ) >= 49
    assert kinds.count(SEARCH) >= 8
    assert files() == FILES
    assert {name: kind(name) for name in FILES if kind(name) in COMMANDS} == library()


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) == PTQ])
def test_ptq(name: str) -> None:
    recorded, config = find_recipe(name)
    assert recorded == name
    assert find_recipe(f"{name}{FILES[name].suffix}") == (recorded, config)
    of_file = content(name)
    assert of_file.keys() == {"metadata", "quantize"}
    assert not dropped(of_file["quantize"], config)
    if (
        steps(of_file["quantize"].get("algorithm"))[:1]
        and steps(of_file["quantize"]["algorithm"])[0]["method"] == "lsq"
    ):
        with pytest.raises(ModelOptExtError, match="recipe: algorithm: expected one that needs no training, got lsq"):
            build(config, Changes())
        return
    built = build(config, Changes())
    assert not dropped(of_file["quantize"]["quant_cfg"], built["quant_cfg"])
    assert not dropped(steps(of_file["quantize"].get("algorithm")), built["algorithm"])
    if "gptq" in name:
        assert built["algorithm"][0]["layerwise"][FROM_QUANTIZED] is True, "ModelOpt's default for it"
    with pytest.raises(
        ModelOptExtError, match=r"expected a recipe of auto_quantize, got one of ptq: run .* quantize MODEL"
    ):
        read_search(name)


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) == SEARCH])
def test_search(name: str) -> None:
    search = read_search(name)
    assert search.name == name
    assert read_search(f"{name}{FILES[name].suffix}") == search
    rules, formats = search.rules, search.formats
    cost = dict(rules.cost)
    not_counted = cost.pop("excluded_module_name_patterns", [])
    passed = {
        "constraints": {"effective_bits": search.target, "cost_model": rules.cost_model, "cost": cost},
        "candidate_formats": [formats[candidate] for candidate in search.all_layers],
        "module_search_spaces": [
            {
                "module_name_patterns": space.patterns,
                "candidate_formats": [formats[candidate] for candidate in space.formats],
                "allow_no_quant": space.unquantized,
            }
            for space in rules.spaces
        ],
        "auto_quantize_method": search.method,
        "score_size": search.score_samples,
        "disabled_layers": rules.disabled,
        "cost_excluded_layers": not_counted,
    }
    of_file = content(name)
    assert of_file.keys() <= {"metadata", "auto_quantize", "quantize"}
    assert not dropped(of_file["auto_quantize"], passed)
    assert not dropped(of_file.get("quantize", {}), rules.fixed or {})


@pytest.mark.parametrize("suffix", ["", ".yaml"])
@pytest.mark.parametrize("name", [name for name in FILES if kind(name) == SEARCH])
def test_quantize_names_the_command_of_a_search(name: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A search is never run by half: its PTQ part alone, where it has one, is another model."""
    with pytest.raises(ModelOptExtError) as caught:
        find_recipe(name + suffix)
    command = f"sglang-modelopt auto-quantize MODEL --recipe {name} --data FILE --output DIR"
    assert str(caught.value) == (
        f"--recipe: {name}{suffix}: expected a recipe of ptq, got one of auto_quantize: run {command}"
    )
    assert read_search(command.split()[4]).name == name
    assert main(["auto-quantize", *command.split()[2:]]) == 2
    assert "MODEL: expected a folder" in capsys.readouterr().err, "the command line itself is right"


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) not in COMMANDS])
def test_others(name: str) -> None:
    """Parts of recipes, and recipes that train, are refused by both commands."""
    reason = "without metadata.recipe_type" if kind(name) is None else f"one of {kind(name)}"
    for read in (find_recipe, read_search):
        with pytest.raises(ModelOptExtError, match=f"--recipe: {re.escape(name)}: expected .* got .*{reason}$"):
            read(name)


def test_own_files(tmp_path: Path) -> None:
    """A path may lack its suffix too; a recipe that is a folder has its sections in files."""
    text = (
        "metadata: {recipe_type: ptq}\nquantize: {algorithm: max, quant_cfg: [{quantizer_name: '*', enable: false}]}\n"
    )
    (tmp_path / "mine.yml").write_text(text)
    assert find_recipe(str(tmp_path / "mine"))[1] == find_recipe(str(tmp_path / "mine.yml"))[1]
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "metadata.yml").write_text("recipe_type: ptq\n")
    (folder / "quantize.yml").write_text("algorithm: max\nquant_cfg: [{quantizer_name: '*', enable: false}]\n")
    assert find_recipe(str(folder))[1] == find_recipe(str(tmp_path / "mine"))[1]
    (tmp_path / "broken.yaml").write_text("metadata: {recipe_type: ptq}\n")
    with pytest.raises(ModelOptExtError, match="expected a recipe ModelOpt can load, got ValueError: PTQ recipe file"):
        find_recipe(str(tmp_path / "broken"))
    with pytest.raises(ModelOptExtError, match=r"--recipe: none\.yaml: expected a recipe of ModelOpt's library or"):
        find_recipe("none.yaml")


def test_a_layer_is_given_the_quantized_models_activations_where_a_recipe_says_so() -> None:
    _, config = find_recipe("fp8")
    asked = {"method": "max", "layerwise": {"enable": True, FROM_QUANTIZED: True}}
    (step,) = build({**config, "algorithm": asked}, Changes())["algorithm"]
    assert step["layerwise"] == {"enable": True, FROM_QUANTIZED: True}
    (step,) = build({**config, "algorithm": {"method": "max", "layerwise": {"enable": True}}}, Changes())["algorithm"]
    assert "layerwise" not in step
