"""The entry point that SGLang calls in each of its processes (group ``sglang.srt.plugins``)."""

from __future__ import annotations

import logging

from sglang_modelopt_ext.env import ERROR_FILE
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.schemes.versions import TESTED_SGLANG, installed_sglang

logger = logging.getLogger(__name__)


def check_sglang() -> None:
    """Raise ModelOptExtError unless SGLang has a tested version, or all symbols that this plugin uses are as in those.

    The processes that a server starts are not checked again: they have their parent's error file in the environment.

    Raises:
        ModelOptExtError: there is no SGLang, or some symbols differ; the message lists these.
    """
    found, tested = installed_sglang(), ", ".join(TESTED_SGLANG)
    if found in TESTED_SGLANG or (found is not None and ERROR_FILE.read()):
        return
    broken = broken_contract() if found is not None else []
    if found is None or broken:
        what = f"{found}, where {len(broken)} are not: {'; '.join(broken)}" if broken else "none"
        expected = f"one of {tested}, or another in which all that this plugin uses is as there"
        raise ModelOptExtError.at("sglang", "version", expected, what)
    logger.warning(
        "modelopt_ext: this plugin was tested with SGLang %s, not with %s, in which all that it uses is as there",
        tested,
        found,
    )


def broken_contract() -> list[str]:
    """Return the differences of the installed SGLang from the contract, one clause for each."""
    from sglang_modelopt_ext.integration import contract

    root = contract.installed_root()
    if root is None:
        return ["sglang: missing"]
    try:
        hooks = contract.of_hooks(all_hooks())
    except ImportError as error:
        # A module of ours imports a missing symbol. The table lists it too, unless it is no symbol of SGLang's.
        return contract.check(contract.USES, root) or [str(error)]
    return contract.check((*contract.USES, *hooks), root)


def register() -> None:
    """Install the hooks of this package in SGLang; a second call does nothing.

    Raises:
        SystemExit: a check or a hook fails, with one line. SGLang swallows every other exception of a plugin and would serve
            without it.
    """
    try:
        check_sglang()
        _install()
    except ModelOptExtError as error:
        raise SystemExit(error.one_line()) from error
    except Exception as error:
        raise SystemExit(
            f"ModelOptExtError: plugin: registration: expected success, got {type(error).__name__}: {error}"
        ) from error


def all_hooks() -> tuple[Hook, ...]:
    """Return every hook of this package, which imports SGLang's modules and takes seconds."""
    from sglang_modelopt_ext.integration import (
        adapters,
        config,
        loading,
        mapping,
        observability,
        processes,
        products,
        rounding,
        updates,
    )
    from sglang_modelopt_ext.integration.kv import hooks as kv_hooks
    from sglang_modelopt_ext.integration.kv import hybrid as kv_hybrid
    from sglang_modelopt_ext.integration.kv import scales as kv_scales

    own = (
        config,
        mapping,
        loading,
        products,
        kv_hooks,
        kv_hybrid,
        kv_scales,
        updates,
        observability,
        processes,
        rounding,
        adapters,
    )
    return tuple(hook for file in own for hook in file.HOOKS)


def _install() -> None:
    # Import here: SGLang's modules take seconds, and a failure must reach the handler in register().
    from sglang_modelopt_ext.integration import config, processes
    from sglang_modelopt_ext.integration.hooks import install
    from sglang_modelopt_ext.integration.kv import hooks as kv_hooks

    processes.print_errors_in_one_line()
    processes.open_error_channel()
    config.register_methods()
    kv_hooks.register_kv_caches()
    processes.register_preflight()
    install(all_hooks())
