"""The contract with SGLang: it holds, names all that is used and nothing else, and a breach of any row is seen."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.integration import contract
from sglang_modelopt_ext.integration.plugin import all_hooks
from sglang_modelopt_ext.integration.sources import Sources
from sglang_modelopt_ext.integration.uses import Base, Called, Fields, Holds, Object, Passes, Use, Written
from tests.support.sglang_uses import attributes, symbols, trees, words

HOOKED = tuple(contract.of_hooks(all_hooks()))
ALL = (*contract.USES, *HOOKED)
GONE = "not_there"

RECEIVERS = {
    # what a variable of that name is of SGLang's: the rows that say which attributes it has
    "args": ("arg_groups.fields", "server_args.ServerArgs"),
    "server_args": ("arg_groups.fields", "server_args.ServerArgs"),
    "a": ("arg_groups.fields",),
    "parallel": ("arg_groups.fields.parallel",),
    "get_parallel()": ("arg_groups.fields.parallel",),
    "platform": ("runtime_context._PLATFORM_PROBES",),
    "get_platform()": ("runtime_context._PLATFORM_PROBES",),
    "get_model()": ("arg_groups.fields.model",),
    "moe": ("arg_groups.fields.exec_",),
    "kvc": ("mem_cache.kv_cache_configurator.KVCacheConfigurator",),
    "configurator": ("mem_cache.kv_cache_configurator.KVCacheConfigurator",),
    "runner": ("model_executor.model_runner.ModelRunner",),
    "model_config": ("configs.model_config.ModelConfig",),
    "load_config": ("configs.load_config.LoadConfig",),
    "recv_req": ("managers.io_struct.BeginWeightUpdateReqInput",),
    "self._config": ("layers.moe.moe_runner.base.MoeRunnerConfig",),
    "dispatch_output": ("layers.moe.token_dispatcher.StandardDispatchOutput",),
}
LAYERS = (
    *("layers.linear.LinearBase", "layers.linear.RowParallelLinear", "layers.linear.MergedColumnParallelLinear"),
    *("layers.linear.QKVParallelLinear", "layers.vocab_parallel_embedding.VocabParallelEmbedding"),
    *("layers.moe.fused_moe_triton.layer.FusedMoE", "layers.radix_attention.RadixAttention"),
    *("lora.layers.BaseLayerWithLoRA", "layers.layernorm.RMSNorm"),
)


@pytest.fixture(scope="module")
def sources() -> Sources:
    root = contract.installed_root()
    assert root is not None
    return Sources(root)


def named(*targets: str) -> set[str]:
    """The attributes that the rows of these symbols name, and methods that have a row of their own."""
    of_rows = {word for use in ALL if use.symbol in targets for word in use.words}
    return of_rows | {use.symbol.rpartition(".")[2] for use in ALL if use.symbol.rpartition(".")[0] in targets}


def test_it_holds(sources: Sources) -> None:
    assert contract.check(ALL, sources.root) == []


def test_every_symbol_that_is_used_has_a_row(sources: Sources) -> None:
    targets = {use.target for use in ALL}
    members = {f"{use.target}.{word}" for use in ALL for word in use.words}
    # Of a class or a module, rows for what is in it are enough.
    owners = {target[:end] for target in targets for end, letter in enumerate(target) if letter == "."}
    missing = {(where, symbol) for where, symbol in symbols(sources) if symbol not in targets | members | owners}
    assert not missing


def test_every_attribute_that_is_read_has_a_row() -> None:
    read: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees().items():
        if file.parent.name in ("integration", "methods", "kv") and "sglang" in file.read_text():
            for receiver in RECEIVERS:
                read[receiver] |= set(attributes(tree, receiver))
    assert {receiver for receiver in RECEIVERS if not read[receiver]} == set()
    missing = {receiver: read[receiver] - named(*rows) for receiver, rows in RECEIVERS.items()}
    assert {receiver: names for receiver, names in missing.items() if names} == {}


def is_written(word: str) -> bool:
    """Whether the package has the word, whole or as ``f"{name}_suffix"`` with a name that it has."""
    name, _, suffix = word.rpartition("_")
    return word in words() or {name, f"_{suffix}"} <= words()


def test_every_row_is_used() -> None:
    """Each name in it is written somewhere, and so is the symbol where the row names nothing else."""
    for use in ALL:
        wanted = use.words or (use.target, use.symbol.rpartition(".")[2])
        found = [word for word in wanted if is_written(word)]
        assert found == list(wanted) if use.words else found or use in HOOKED, use


def test_rows_say_why_and_are_there_once() -> None:
    assert all(use.why for use in ALL)
    kinds = [(type(use), use.symbol) for use in ALL]
    assert len(set(kinds)) == len(kinds)


def test_every_row_is_there_when_it_is_imported() -> None:
    """The symbols that were read in the sources are those that Python finds."""
    for use in ALL:
        assert pkgutil.resolve_name(use.target) is not None


def breaches() -> Iterator[Use]:
    """Each row with one thing in it changed to what SGLang does not have."""
    for use in ALL:
        yield dataclasses.replace(use, symbol=f"{use.symbol}_{GONE}")
        match use:
            case Called():
                yield dataclasses.replace(use, given=(*use.given, GONE))
            case Written():
                yield dataclasses.replace(use, parameters=(*use.parameters, GONE))
                yield dataclasses.replace(use, parameters=use.parameters[:-1], later=())
            case Object() | Fields():
                yield dataclasses.replace(use, members=(*use.members, GONE))
            case Passes():
                yield dataclasses.replace(use, names=(*use.names, GONE))
            case Holds():
                yield dataclasses.replace(use, strings=(*use.strings, GONE))


def test_a_breach_of_any_row_is_seen(sources: Sources) -> None:
    unseen = [use for use in breaches() if not list(use.broken(sources))]
    assert not unseen


def test_a_parameter_that_must_be_given_is_seen(sources: Sources) -> None:
    for use in ALL:
        if isinstance(use, Called) and (use.given or use.named):
            found = sources.find(use.target)
            assert found is not None
            parameters = sources.parameters(found)
            assert parameters is not None
            fewer = dataclasses.replace(use, given=(), named=())
            assert [f"needs {name}" for name in sorted(parameters.required)] == list(fewer.broken(sources))


FILES = {
    "__init__.py": "",
    "a.py": """
import abc
from p.b import *
from p.b import helper as renamed
from typing import NamedTuple
TABLE = {}
if True:
    def register(name):
        return lambda function: function
@register("first")
def one(x, y=1, *, z, **more): return call(size=2)
class Pair(NamedTuple):
    left: int
    right: int = 2
class Child(Parent):
    def own(self): self.made = 1
Child = Pair and Child
""",
    "b/__init__.py": """
import abc
def helper(first, second): ...
class Parent(abc.ABC):
    field: int
    def __init__(self, size): self.size = size
    @abc.abstractmethod
    def must(self): ...
""",
    "fields/x.py": "class Group:\n    width: int = 1\n",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("small") / "p"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Sources(root)


def differences(use: Use, sources: Sources, target: str) -> list[str]:
    """Return the differences of a row, in a package that is not SGLang."""
    found = sources.find(target)
    return ["missing"] if found is None else list(use._differences(sources, found))


@pytest.mark.parametrize(
    ("use", "target", "expected"),
    [
        (Called("x", "y", ("first", "second")), "p.a.renamed", []),
        (Called("x", "y", ("first", "second")), "p.a.helper", []),
        (
            Called("x", "y", ("first", "third")),
            "p.b.helper",
            ["takes (first, second), not (first, third) by position", "needs second"],
        ),
        (Called("x", "y", ("x",), ("z", "any")), "p.a.one", []),
        (Called("x", "y", ("x",)), "p.a.one", ["needs z"]),
        (Called("x", "y", ("left",)), "p.a.Pair", []),
        (Called("x", "y", (), ("right", "up")), "p.a.Pair", ["takes no up", "needs left"]),
        (Called("x", "y", ("size",)), "p.a.Child", []),
        (Called("x", "y"), "p.a.TABLE", ["no function"]),
        (Written("x", "y", ("x", "y", "z", "more")), "p.a.one", []),
        (Written("x", "y", ("x", "y"), later=("z", "more")), "p.a.one", []),
        (Written("x", "y", ("x", "y")), "p.a.one", ["parameters (x, y, z, more), not (x, y)"]),
        (Written("x", "y", ()), "p.a.Pair", ["no function"]),
        (Object("x", "y", ("made", "size", "field", "must", "own")), "p.a.Child", []),
        (Object("x", "y", ("more",)), "p.a.Child", ["no attribute more"]),
        (Object("x", "y", ("more",)), "p.a.one", ["no class"]),
        (Base("x", "y", ("must",)), "p.a.Child", []),
        (Base("x", "y", ("size",)), "p.a.Child", ["an abstract method more, must"]),
        (Fields("x", "y", ("width",)), "p.fields", []),
        (Fields("x", "y", ("width", "depth")), "p.fields.x", ["no field depth"]),
        (Holds("x", "y", ("first",)), "p.a.TABLE", []),
        (Holds("x", "y", ("second",)), "p.a.TABLE", ["no 'second' in it"]),
        (Passes("x", "y", ("size",)), "p.a.one", []),
        (Passes("x", "y", ("width",)), "p.a.one", ["passes no width"]),
        (Use("x", "y"), "p.a.register", []),
        (Use("x", "y"), "p.c.register", ["missing"]),
        (Use("x", "y"), "p.a.renamed.inside", ["missing"]),
    ],
)
def test_how_sources_are_read(small: Sources, use: Use, target: str, expected: list[str]) -> None:
    assert differences(use, small, target) == expected


def test_the_attributes_of_layers_have_rows() -> None:
    """``layer`` and ``module`` in the methods: what is neither torch's nor our own is SGLang's, and has a row."""
    from sglang_modelopt_ext.checkpoint.kv_scales import KVLayer

    known = named(*LAYERS) | set(dir(torch.nn.Linear(1, 1)))
    known |= {field.name for field in dataclasses.fields(KVLayer)}
    read = {
        name
        for file, tree in trees().items()
        if file.parent.name in ("integration", "methods", "kv") and "sglang.srt" in file.read_text()
        for receiver in ("layer", "module")
        for name in attributes(tree, receiver)
    }
    assert sorted(read - known) == []


def test_nothing_of_sglang_is_imported_to_check_it(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom sglang_modelopt_ext.integration import contract\n"
        "root = contract.installed_root()\nassert root is not None\n"
        "assert contract.check(contract.USES, root) == []\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'sglang'], sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
