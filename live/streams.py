"""The residual streams that enter a model's layers, kept as a forward pass goes by."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Streams:
    """Hooks that keep what enters some decoder layers; the layer behind the last: what leaves that one, before the final norm.

    They hang on the model inside ``with``, and nothing stays there. Whoever runs many forward passes enters once around all of
    them: hanging them up and taking them off again takes as long as the rest of what the loop does for a forward pass.
    """

    def __init__(self, layers: nn.ModuleList | None, wanted: tuple[int, ...]):
        """:param layers: the model's decoder layers; None if none is wanted."""
        self._layers, self._wanted, self._entered = layers, wanted, 0  # a layer may be wanted twice
        self._found: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Streams:
        if not self._entered:
            self._handles = [self._watch(layer) for layer in dict.fromkeys(self._wanted)]
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            for handle in self._handles:
                handle.remove()

    def take(self, device: torch.device) -> Tensor | None:
        """The streams of the last forward pass side by side [R, T, n * H], on ``device`` wherever their layers are."""
        if not self._wanted:
            return None
        found, self._found = self._found, {}
        return torch.cat([found[layer].to(device) for layer in self._wanted], -1)

    def _watch(self, layer: int) -> RemovableHandle:
        def entering(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._found[layer] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, args: tuple, result: Tensor | tuple) -> None:
            self._found[layer] = result[0] if isinstance(result, tuple) else result

        if layer < len(self._layers):
            return self._layers[layer].register_forward_pre_hook(entering, with_kwargs=True)
        return self._layers[-1].register_forward_hook(leaving)
