"""The residual streams that enter a model's layers, kept as a forward pass goes by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Streams:
    """Hooks that keep what enters some decoder layers; n, behind the last of n: what leaves that one, before the final norm; and
    n + 1: what leaves the decoder, behind it.

    They look on inside ``with``, which is put around a forward pass, and nothing stays on the model. Whoever runs many passes puts
    :meth:`hanging` around them all: hanging the hooks up and taking them off again takes as long as much of what else is done for a
    pass. There they hang, but do not look on when somebody else runs the model.
    """

    def __init__(self, layers: nn.ModuleList | None, wanted: tuple[int, ...], decoder: nn.Module | None = None):
        """:param layers: the model's decoder layers; None if none is wanted. :param wanted: may name a layer twice.
        :param decoder: the model without its output layer."""
        self._layers, self._wanted, self._decoder, self._hung, self._looking = layers, wanted, decoder, 0, False
        self._found: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Within, the hooks stay where they are from one pass to the next."""
        self._hang()
        try:
            yield
        finally:
            self._take_off()

    def __enter__(self) -> Streams:
        self._hang()
        self._looking = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._looking = False
        if kind is not None:
            self._found = {}  # of a pass that failed, perhaps for want of memory
        self._take_off()

    def take(self, device: torch.device) -> Tensor | None:
        """The streams of the last forward pass side by side [R, T, n * H], on ``device`` wherever their layers are."""
        if not self._wanted:
            return None
        found, self._found = self._found, {}
        return torch.cat([found[layer].to(device) for layer in self._wanted], -1)

    def _hang(self) -> None:
        if not self._hung:
            self._handles = [self._watch(layer) for layer in dict.fromkeys(self._wanted)]
        self._hung += 1

    def _take_off(self) -> None:
        self._hung -= 1
        if not self._hung:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _watch(self, layer: int) -> RemovableHandle:
        def entering(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self._looking:
                self._found[layer] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, args: tuple, result: Tensor | Sequence[Tensor]) -> None:
            if self._looking:
                self._found[layer] = result if isinstance(result, Tensor) else result[0]

        if layer < len(self._layers):
            return self._layers[layer].register_forward_pre_hook(entering, with_kwargs=True)
        return (self._layers[-1] if layer == len(self._layers) else self._decoder).register_forward_hook(leaving)
