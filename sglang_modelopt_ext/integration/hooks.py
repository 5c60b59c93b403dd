"""Hooks: wrappers around functions of SGLang. Every target is checked before it is wrapped, and confirmed afterwards.

SGLang logs and swallows exceptions of plugins and of ``apply_hooks``. A server that went on without its hooks would read a
checkpoint wrongly, so a failure here becomes ``SystemExit``, which is not swallowed.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError


@dataclass(frozen=True)
class Hook:
    """One function of SGLang that this plugin wraps.

    Attributes:
        target: the function's dotted path.
        parameters: the parameter names that it must have; with others the hook was not tested.
        why: the fault without the hook, as a clause for errors ("tensors would be dropped").
        around: the wrapper, called as ``around(original, *args, **kwargs)``.
    """

    target: str
    parameters: tuple[str, ...]
    why: str
    around: Callable[..., Any]


def check_target(hook: Hook) -> None:
    """Raise ModelOptExtError when the target is missing or has other parameters than expected."""
    try:
        function = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError) as error:
        raise ModelOptExtError.at("sglang", hook.target, "a function of that name", error) from error
    found = tuple(inspect.signature(function).parameters)
    if found != hook.parameters:
        raise ModelOptExtError.at("sglang", hook.target, f"parameters {hook.parameters}", found)


def install(hooks: Iterable[Hook]) -> None:
    """Register and apply ``hooks``, except those that are installed already.

    Raises:
        ModelOptExtError: a target is not as expected, or SGLang did not apply a hook.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = tuple(hooks)
    for hook in hooks:
        if hook.target in HookRegistry._patched:
            continue
        check_target(hook)
        HookRegistry.register(hook.target, hook.around, HookType.AROUND)
    HookRegistry.apply_hooks()
    for hook in hooks:
        if hook.target not in HookRegistry._patched:
            raise ModelOptExtError.at(
                "sglang", hook.target, "to be hooked", f"a failure (see the log); without it {hook.why}"
            )
