"""The tensors of an open session of weight updates, gathered in host memory until it ends.

SGLang opens a session, passes tensors on in any number of calls, and ends it. The old weights serve until then. A session takes the
tensors of the served checkpoint, in its form: names, shapes and types.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch

from sglang_modelopt_ext.checkpoint.reader import Checkpoint, check_stored_values, is_kv_cache_tensor
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats.base import ValueRule

WHERE = "weight update"
"""The place in errors, where a file would be."""


class Session(torch.nn.Module):
    """An open session, which takes the place of the model whose loading code would write the tensors.

    Args:
        checkpoint: the checkpoint that is being served.
        used: the stored tensors that this rank loaded of it.
    """

    def __init__(self, checkpoint: Checkpoint, used: Set[str]) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.used = used
        self.tensors: dict[str, torch.Tensor] = {}
        self._fault: ModelOptExtError | None = None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Keep copies of the tensors. A session with a fault cannot end well.

        Raises:
            ModelOptExtError: one is none of the checkpoint's, of another shape or type, of its KV cache, or came before.
        """
        try:
            self._keep(weights)
        except ModelOptExtError as error:
            self._fault = self._fault or error
            raise

    def _keep(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            stored = self.checkpoint.tensors.get(name)
            if stored is None:
                raise ModelOptExtError.at(WHERE, name, "a tensor of the served checkpoint", "an unknown one")
            if is_kv_cache_tensor(name):
                raise ModelOptExtError.at(WHERE, name, "no tensor of the KV cache, which keeps its scales", "one")
            if name in self.tensors:
                raise ModelOptExtError.at(WHERE, name, "one copy in a session", "another")
            if (tensor.dtype, tuple(tensor.shape)) != (stored.dtype, stored.shape):
                expected, got = (
                    f"{str(dtype).removeprefix('torch.')} {list(shape)}"
                    for dtype, shape in ((stored.dtype, stored.shape), (tensor.dtype, tensor.shape))
                )
                raise ModelOptExtError.at(WHERE, name, expected, got)
            # The sender may overwrite its memory after the call.
            self.tensors[name] = tensor.detach().to("cpu", copy=True)

    def check(self) -> None:
        """Raise ModelOptExtError where a call had a fault, a tensor that this rank needs did not come, or a value is illegal."""
        if self._fault is not None:
            raise self._fault
        missing = sorted(self.used - self.tensors.keys())
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ModelOptExtError.at(WHERE, missing[0], "every tensor of the served checkpoint", f"none{more}")
        for linear in self.checkpoint.layers:
            if linear.stored["weight"].name not in self.tensors:
                continue  # another rank's expert
            for spec in linear.scheme.tensors:
                if spec.name in linear.stored and spec.values is not ValueRule.CODES:
                    check_stored_values(linear, spec, self._arrived, WHERE)

    def _arrived(self, stored: StoredTensor) -> torch.Tensor:
        return self.tensors[stored.name]
