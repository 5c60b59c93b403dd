"""The entry point SGLang calls in each of its processes (group ``sglang.srt.plugins``)."""

from __future__ import annotations

import logging

from sglang_modelopt_ext.env import ERROR_FILE
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.schemes.versions import TESTED_SGLANG, installed_sglang

logger = logging.getLogger(__name__)


def check_sglang() -> None:
    """Check an SGLang that this plugin was not tested with: one in which every symbol that is used is as expected serves.

    The processes that a server starts are not checked again: they have their parent's channel for errors in the environment.

    Raises:
        ModelOptExtError: there is no SGLang, or some symbols are not as expected; the message lists them.
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
        # Of a symbol that a module of ours imports at its top: the table has it too, unless it is no symbol of SGLang's.
        return contract.check(contract.USES, root) or [str(error)]
    return contract.check((*contract.USES, *hooks), root)


def register() -> None:
    """Hooks this package into SGLang; called again it does nothing.

    Raises:
        SystemExit: with one line, when anything does not fit. SGLang swallows every other exception of a plugin and would serve
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
    """Return every hook of this package. Importing them imports SGLang's modules, which takes seconds."""
    from sglang_modelopt_ext.integration import config, loading, processes, updates
    from sglang_modelopt_ext.integration.kv import hooks as kv_hooks
    from sglang_modelopt_ext.integration.kv import scales as kv_scales

    return (*config.HOOKS, *loading.HOOKS, *kv_hooks.HOOKS, *kv_scales.HOOKS, *updates.HOOKS, *processes.HOOKS)


def _install() -> None:
    # Imported here: importing SGLang's modules takes seconds, and a failure must reach the handler above.
    from sglang_modelopt_ext.integration import config, processes
    from sglang_modelopt_ext.integration.hooks import install
    from sglang_modelopt_ext.integration.kv import hooks as kv_hooks

    processes.print_errors_in_one_line()
    processes.open_error_channel()
    config.register_methods()
    kv_hooks.register_kv_caches()
    processes.register_preflight()
    install(all_hooks())
