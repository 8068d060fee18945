"""A training-free drafter in live decoding: keeps what was committed and what the target said, and looks nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle
from policies.lookup.drafter import LookupDrafter
from policies.lookup.past import Past
from policies.lookup.rule import Rule
from policies.one_row import alone
from policies.order import NONE


class LiveLookup(LookupDrafter):
    """The same drafter that replay runs, over the texts of R rows as they grow (right padded, room for more)."""

    def __init__(self, rule: Rule):
        super().__init__(rule, self._committed)

    @property
    def top(self) -> int:
        """How many of the target's best tokens at each committed place it wants to hear of; see :meth:`hear`."""
        return self.rule.top

    def prefill(self, prompt: Tensor, counts: Tensor, features: Tensor | None, root: Tensor) -> None:
        """Begin with prompts int64 [R, L] (counts int64 [R]) and the first roots [R]; of the target's distributions none is
        known. ``features`` are for draft networks."""
        self._tokens = torch.nn.functional.pad(prompt, (0, 1)).scatter(1, counts[:, None], root[:, None])
        self._count, self._told = counts + 1, counts + 1
        self._heard: tuple[Tensor, Tensor] | None = None
        self._written: Past | None = None  # until something is laid out anew
        top = (*self._tokens.shape, self.rule.top)
        self._top_tokens = torch.full(top, NONE, device=prompt.device)
        self._top_logprobs = torch.full(top, -torch.inf, device=prompt.device)

    def hear(self, tokens: Tensor, logprobs: Tensor) -> None:
        """The target's best tokens int64 [R, T, M] and their log-probabilities float32, which give the next committed ones."""
        self._heard = tokens, logprobs

    def commit(self, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """The newly committed tokens int64 [R, T] (accepted and bonus, counts int64 [R]) behind those before."""
        new, end = tokens.shape[1], max(self._count.tolist())
        needed = end + new + 1
        if needed > self._tokens.shape[1]:
            more = needed + self._tokens.shape[1] // 2 - self._tokens.shape[1]
            self._tokens = torch.nn.functional.pad(self._tokens, (0, more))
            self._top_tokens = torch.nn.functional.pad(self._top_tokens, (0, 0, 0, more), value=NONE)
            self._top_logprobs = torch.nn.functional.pad(self._top_logprobs, (0, 0, 0, more), value=-torch.inf)
            self._written = None
        # what is written behind a row's own tokens is overwritten by its next ones, and never read
        if alone(tokens) and self._heard is None:
            self._tokens.narrow(1, end, new).copy_(tokens)
        else:
            place = self._count[:, None] + torch.arange(new, device=tokens.device)
            self._tokens.scatter_(1, place, tokens)
            if self._heard is not None:
                self._write(place, *self._heard)
        self._count = self._count + counts

    def _write(self, place: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        held = min(tokens.shape[2], self._top_tokens.shape[2])
        index = place[:, :, None].expand(-1, -1, held)
        self._top_tokens.scatter_(1, index, tokens[:, : place.shape[1], :held].to(torch.int64))
        self._top_logprobs.scatter_(1, index, logprobs[:, : place.shape[1], :held])

    def recall(self, tokens: Tensor, logprobs: Tensor) -> None:
        """For a text resumed in mid-generation (one row): what the target said before each of the last n committed tokens, its
        best tokens [n, M] and their log-probabilities."""
        count = len(tokens)
        self._told, self._written = self._count - count, None
        place = self._told[:, None] + torch.arange(count, device=self._told.device)
        self._write(place, tokens[None].to(place.device), logprobs[None].to(place.device))

    def gather_rows(self, rows: Tensor) -> None:
        for name in ("tokens", "count", "told", "top_tokens", "top_logprobs"):
            setattr(self, f"_{name}", getattr(self, f"_{name}")[rows])
        self._written = None

    def join(self, other: LiveLookup) -> None:
        """The texts of ``other`` behind our own."""
        for name, fill in (("tokens", 0), ("top_tokens", NONE), ("top_logprobs", -torch.inf)):
            parts = [getattr(one, f"_{name}") for one in (self, other)]
            width = max(part.shape[1] for part in parts)
            spare = [(0, 0) * (part.dim() - 2) + (0, width - part.shape[1]) for part in parts]
            padded = [torch.nn.functional.pad(part, room, value=fill) for part, room in zip(parts, spare, strict=True)]
            setattr(self, f"_{name}", torch.cat(padded))
        self._count, self._told = torch.cat([self._count, other._count]), torch.cat([self._told, other._told])
        self._written = None

    def beside(self) -> Rule:
        """Who drafts for another decoder beside this one."""
        return self.rule

    def forget(self) -> None:
        """Nothing to let go but the texts, which the next ones take the place of."""

    def forwards(self) -> list[tuple[object, str]]:
        """Owner and name of the methods that do the drafting, for timers (live/breakdown.py)."""
        return [(self, "expand"), (self, "chain_found")]

    def _committed(self, cycle: Cycle) -> Past:
        if self._written is None:
            self._written = self._laid_out()
        return self._written._replace(root=self._written.root + self._count)

    def _laid_out(self) -> Past:
        """Where the texts lie, which grow in place; roots as if nothing had been written."""
        rows, width = self._tokens.shape
        first = torch.arange(rows, device=self._tokens.device) * width
        tables = self._top_tokens.flatten(0, 1), self._top_logprobs.flatten(0, 1)
        return Past(self._tokens.view(-1), first, first - 1, *tables, torch.zeros_like(first), first + self._told)
