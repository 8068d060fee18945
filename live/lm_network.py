"""A small language model as a draft network: tree attention through the same cached model that runs the target."""

from __future__ import annotations

import torch
from torch import Tensor

from live.border import sent
from live.distribution import Ranked, ranked
from live.model import CachedModel
from live.network import Ancestry


class LanguageModelNetwork:
    kind = "lm"
    needs_features = False
    deepest = None
    entropies = True

    def __init__(self, model: CachedModel, name: str = "draft", vocabulary: int | None = None):
        """:param vocabulary: rows of the target's embeddings. Models pad theirs to different sizes over one tokenizer: what
        only the draft has is never proposed, what only the target has reaches the draft as its last row.
        """
        self.model, self.name = model, name
        own = model.model.get_input_embeddings().weight.shape[0]
        self.vocabulary, self._last = own if vocabulary is None else vocabulary, own - 1

    def reset(self, rows: int) -> None:
        self.entropies = True
        self.model.reset(rows)

    def gather_rows(self, rows: Tensor) -> None:
        self.model.gather_rows(rows)

    def beside(self) -> LanguageModelNetwork:
        return LanguageModelNetwork(self.model.beside(), self.name, self.vocabulary)

    def join(self, other: LanguageModelNetwork) -> None:
        self.model.join(other.model)

    def forwards(self) -> list[tuple[object, str]]:
        return [(self.model, "run")]

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        self.model.drop_tree()
        output = self.model.prefill(self._known(tokens), counts, logits="all" if everywhere else "last")
        logits = output.logits[..., : self.vocabulary]
        return logits if everywhere else logits[:, 0]

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        self.model.drop_tree()
        trees = len(source)
        if self.model.rows != trees:  # the trees of one text: each gets a copy of its keys and values, measured to be
            self.model.gather_rows(source.new_zeros(trees, dtype=torch.int64))  # cheaper than one row that masks the others
        lengths = context_length.tolist()
        self._root = sent(context_length, source.device)
        self._prefix = self._root + 1  # the root itself is committed
        self._all = [length + 1 for length in lengths] == self.model.cache.host_lengths  # at the ends of all rows: none is hidden
        self._ancestry = Ancestry(trees, source.device)
        return ranked(source, width, self.entropies)

    def grow(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        parent, count = sent(parent, self.model.device), parent.shape[1]
        # the root is slot 0 of the tree, but lies in the committed part of the cache: all others move up by one
        sees = self._ancestry.add(parent)[:, :, 1:]
        prefix = None if self._all else self._prefix[:, None].expand(-1, count)
        output = self.model.forward_tree(self._known(token), prefix, self._ancestry.below(self._root, count), sees)
        return ranked(output.logits[..., : self.vocabulary], width, self.entropies)

    def _known(self, tokens: Tensor) -> Tensor:
        """Tokens that the draft can embed; padding becomes any of them."""
        return tokens.clamp(min=0, max=self._last)
