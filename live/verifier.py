"""The model-backed verifier: the target scores the kept tree in one pass and commits the accepted path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from live.border import fetched, sent
from live.distribution import log_probabilities
from live.model import CachedModel
from live.sampling import Sampler
from policies.contract import Cycle
from policies.one_row import alone, ancestors, integers, with_root
from policies.order import NONE, most_likely
from policies.verification import Kept, Walk, walk


def sees_ancestors(kept: Kept) -> Tensor:
    """bool [B, V, V]: which kept nodes each kept node attends to, itself and its ancestors."""
    if alone(kept.parent):
        return ancestors(kept.parent)
    rows, count = kept.token.shape
    sees = torch.eye(count, dtype=torch.bool, device=kept.token.device).expand(rows, -1, -1)
    own, parent = sees, kept.parent.clamp(min=0)[:, :, None].expand(-1, -1, count)
    for _ in range(int(kept.depth.max())):
        sees = own | sees.gather(1, parent)
    return sees


class LiveVerifier:
    """Verification by a Hugging Face target. After :meth:`accept` the target's cache holds the accepted path.

    ``sampler`` chooses the target's tokens, the same at any node as in plain decoding; None is greedy.
    ``features`` [B, A + 1, F] are the captured hidden states at the root and the accepted nodes. They and the logits lie on the
    target's device; all else lies on the host, where what the target chose is fetched in one piece.
    """

    sampler: Sampler | None = None

    def __init__(self, target: CachedModel, end_tokens: Tensor):
        self.target, self.end_tokens, self._end_set = target, end_tokens, frozenset(end_tokens.tolist())

    def ends(self, tokens: Tensor) -> Tensor:
        """bool, like ``tokens`` int64: which of them end a sequence."""
        if len(self.end_tokens) == 1:
            return tokens == self.end_tokens
        return (tokens[..., None] == self.end_tokens).any(-1)

    def go_on(self, tokens: Tensor) -> Tensor | None:
        """bool [B]: which of the newest tokens int64 [B], -1 = none, leave a sequence open; None: all do (if the host sees it)."""
        if alone(tokens) and (token := int(tokens)) >= 0 and token not in self._end_set:
            return None
        return (tokens >= 0) & ~self.ends(tokens)

    def accept(self, cycle: Cycle, kept: Kept) -> Walk:
        known = kept if alone(kept.token) else kept._replace(token=kept.token.clamp(min=0), depth=kept.depth.clamp(min=0))
        sees = sees_ancestors(kept)
        output = self.target.forward_tree(known.token, None, cycle.context_length[:, None] + known.depth, sees)
        self.logits = output.logits
        self.choice = self._choice(cycle, known, sees)
        choice = self.choice
        if not alone(kept.token) or self._end_set.intersection(kept.token[0].tolist()):  # a single row has no padding
            ended = self.ends(kept.token) & (kept.depth > 0)  # nothing follows an end of sequence
            choice = choice.masked_fill(ended | (kept.token < 0), NONE)
        outcome = walk(kept, choice)
        self.walked = with_root(outcome.path)
        self.target.commit(self.walked, outcome.accepted + 1)
        self.features = None if output.captured is None else _at(output.captured, self.walked.clamp(min=0))
        return outcome

    def _choice(self, cycle: Cycle, kept: Kept, sees: Tensor) -> Tensor:
        """The target's token behind each kept node, int64 [B, V]: at depth d, the one of place ``position + d + 1``; no padding in
        ``kept`` is below 0."""
        if self.sampler is None or self.sampler.only_argmax:
            found = most_likely(self.logits)
        else:
            place = cycle.position[:, None] + kept.depth + 1
            found = self.sampler.choose(self.logits, place, self.sampler.on_paths(kept.token, sees))
        self._spoilt = None
        if found.is_cpu:
            return found
        told = fetched(torch.where(self._no_numbers(found), ~found, found))  # both in one piece: ~token is below 0
        self._spoilt = told < 0
        return torch.where(self._spoilt, ~told, told)

    def _no_numbers(self, choice: Tensor) -> Tensor:
        """bool [B, V]: behind which kept nodes the logits are not numbers; ``choice`` are the tokens that they chose."""
        greedy = self.sampler is None or self.sampler.greedy  # the argmax is the first NaN where there is one
        return (self.logits.gather(2, choice[:, :, None])[:, :, 0] if greedy else self.logits.amax(-1)).isnan()

    def broken(self) -> Tensor | None:
        """bool [B]: logits that the last walk followed are not numbers; None: all are numbers."""
        if self._spoilt is None:
            greedy = self.sampler is None or self.sampler.greedy
            if alone(self.logits):
                seen = self.logits.gather(2, self.choice[:, :, None]) if greedy else self.logits.sum(-1)
                if not math.isnan(sum(seen.flatten().tolist())):
                    return None
            self._spoilt = self._no_numbers(self.choice)
        return self._spoilt.gather(1, self.walked.clamp(min=0)).any(1)

    def committed(self, kept: Kept, outcome: Walk) -> tuple[Tensor, Tensor]:
        """The newly committed tokens int64 [B, A + 1]: accepted ones, then the bonus; and how many [B]."""
        if alone(kept.token):
            held, bonus = kept.token[0].tolist(), int(outcome.bonus)
            path = [place for place in outcome.path[0].tolist() if place >= 0]
            tokens = [*(held[place] for place in path), bonus]
            return integers([tokens], kept.token), integers([len(path) + (bonus >= 0)], kept.token)
        accepted = kept.token.gather(1, outcome.path.clamp(min=0))
        tokens = torch.nn.functional.pad(accepted, (0, 1)).scatter(1, outcome.accepted[:, None], outcome.bonus[:, None])
        return tokens, outcome.accepted + (outcome.bonus >= 0)

    def bonus_logits(self, outcome: Walk) -> Tensor:
        """The target's logits [B, V] at the last accepted node, which chose the bonus token."""
        if alone(self.logits):
            return self.logits.select(1, self.walked[0].tolist()[-1])
        return _at(self.logits, self.walked.gather(1, outcome.accepted[:, None]))[:, 0]

    def target_top(self, cycle: Cycle, kept: Kept, outcome: Walk, count: int = 64) -> tuple[Tensor, Tensor]:
        logprob = log_probabilities(_at(self.logits, self.walked.clamp(min=0))).float()
        top = logprob.topk(min(count, logprob.shape[-1]), dim=-1)
        nothing = (self.walked < 0)[:, :, None]
        return fetched(top.indices).masked_fill(nothing, NONE), fetched(top.values).masked_fill(nothing, -torch.inf)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """What the network said at places int64 [B, A] of the kept nodes: [B, A, X] of ``values`` [B, V, X], where these lie."""
    place = sent(place, values.device)
    if len(place) == 1:
        return values.index_select(1, place[0])
    return values.gather(1, place[:, :, None].expand(-1, -1, values.shape[-1]))
