"""The target's processed distribution, and the token that one uniform number chooses from it.

Processors in Hugging Face's order (repetition penalty, temperature, top-k, top-p), in float64; cumulated in token-id order;
the token is the first whose cumulative probability exceeds u. So a text is a function of the prompt and of one number per
position, whatever the policy drafts (DESIGN section 5).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from live.border import sent
from policies.contract import Sampling
from policies.order import most_likely
from policies.philox import uniform

GREEDY = Sampling()


class Processed(NamedTuple):
    """A processed distribution.

    weight  float64 [..., V]  probabilities up to a factor per place; 0 where a processor has cut the token off
    cutoff  float64 [...]     how far the nearest cut is from letting another token in or out (nats at top-k, probability
                              at top-p), inf where nothing is cut
    """

    weight: Tensor
    cutoff: Tensor


def process(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Processed:
    """The processed distribution of logits [B, ..., V]; rows at temperature 0 are treated as at 1.

    :param sampling: its fields are numbers or tensors [B].
    :param seen: bool, broadcast against the logits: the tokens that stand before each place, for the repetition penalty.
    """
    scores = penalised(logits, sampling, seen)
    temperature = _column(sampling.temperature, scores)
    scores = scores / torch.where(temperature > 0, temperature, 1.0)
    cutoff = torch.full_like(scores[..., 0], torch.inf)
    if bool(torch.as_tensor(sampling.top_k > 0).any()) or bool(torch.as_tensor(sampling.top_p < 1).any()):
        scores, cutoff = _cut(scores, _column(sampling.top_k, scores).long(), _column(sampling.top_p, scores))
    return Processed((scores - scores.amax(-1, keepdim=True)).exp(), cutoff)


def penalised(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """float64 scores after the repetition penalty (Keskar et al. 2019, section 4.1): of seen tokens, positive scores are
    divided by it and negative ones multiplied."""
    scores = logits.to(torch.float64)
    if seen is None:
        return scores
    penalty = _column(sampling.repetition_penalty, scores)
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _cut(scores: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with -inf where top-k, then top-p cuts, and the distance of the nearer cut; the settings are [B, 1, ...]."""
    size = scores.shape[-1]
    ranked, index = scores.sort(dim=-1, descending=True, stable=True)
    last = torch.where(top_k > 0, top_k, size).clamp(max=size).expand_as(ranked[..., :1]) - 1
    kth = ranked.gather(-1, last)
    below = ranked < kth  # ties with the k-th stay, as in Hugging Face
    gap_k = (kth - ranked.masked_fill(~below, -torch.inf).amax(-1, keepdim=True)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    ranked = ranked.masked_fill(below, -torch.inf)
    before = torch.nn.functional.pad(torch.softmax(ranked, dim=-1).cumsum(-1), (1, 0))[..., :-1]
    beyond = (before >= top_p) & (top_p < 1)  # the likelier tokens hold top-p already; the first always stays
    edge = (before - top_p).abs().masked_fill(below | (top_p >= 1), torch.inf)[..., 1:].amin(-1, keepdim=True)
    least = ranked.masked_fill(below | beyond, torch.inf).amin(-1, keepdim=True)
    gap_p = (least - ranked.masked_fill(~beyond, -torch.inf).amax(-1, keepdim=True)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    cut = torch.zeros_like(below).scatter(-1, index, below | beyond)
    return scores.masked_fill(cut, -torch.inf), torch.minimum(torch.minimum(gap_k, edge), gap_p)[..., 0]


def inverse_cdf(weight: Tensor, u: Tensor) -> Tensor:
    """The chosen token int64 [...]: the first in id order whose cumulative probability exceeds ``u`` float64 [...]."""
    cumulative = weight.cumsum(-1)
    wanted = (u * cumulative[..., -1])[..., None]
    return torch.searchsorted(cumulative, wanted, right=True)[..., 0].clamp(max=weight.shape[-1] - 1)


def measured(processed: Processed, u: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """What a choice was like: (processed log-probability, margin) float64 [...] of ``token`` int64 [...] chosen by ``u``.

    The margin is the least change that could choose another token: the distance of u to the nearer edge of the token's step
    in the cumulative distribution, or the distance of a processor's cut. 0 and 1 are no edges; at most 1.
    """
    cumulative = processed.weight.cumsum(-1)
    total = cumulative[..., -1]
    place = token[..., None]
    own = processed.weight.gather(-1, place)[..., 0]
    upper = cumulative.gather(-1, place)[..., 0] / total
    lower = torch.where(token > 0, cumulative.gather(-1, (place - 1).clamp(min=0))[..., 0] / total, 0.0)
    down = torch.where(lower > 0, (u - lower).abs(), torch.inf)
    up = torch.where(upper < 1, (upper - u).abs(), torch.inf)
    return own.log() - total.log(), torch.minimum(torch.minimum(down, up), processed.cutoff).clamp(max=1.0)


def _column(value: float | Tensor, scores: Tensor) -> Tensor:
    """A setting as float64 [B, 1, ..., 1], to be broadcast against scores [B, ..., V]."""
    setting = sent(torch.as_tensor(value, dtype=torch.float64), scores.device)
    return setting.reshape(-1, *[1] * (scores.dim() - 1))


class Sampler:
    """Chooses the target's tokens of R texts that are decoded side by side.

    sampling  the settings, tensors [R] on the host
    text      int64 [R]  number of each text: with the seed and the position it keys the uniform number
    seen      bool [R, V]  tokens of prompt and text so far, where the logits lie; None where nobody is penalised
    """

    def __init__(self, sampling: Sampling, text: Tensor, prompts: Tensor, counts: Tensor, logits: Tensor):
        """:param prompts: int64 [R, L], padded on the right; counts int64 [R], 1 or more.
        :param logits: [..., V], some that it is to choose from; their device remembers what is penalised.
        """
        self.sampling = sampling.by_row(torch.arange(len(text)))
        self.text, self.seen, self.vocabulary, self.device = text, None, logits.shape[-1], logits.device
        self.greedy = not bool((self.sampling.temperature > 0).any())
        if bool((self.sampling.repetition_penalty != 1).any()):
            self.seen = torch.zeros((len(text), self.vocabulary), dtype=torch.bool, device=self.device)
        self.commit(prompts, counts)

    @property
    def only_argmax(self) -> bool:
        """Whether tokens depend on nothing but the logits."""
        return self.greedy and self.seen is None

    def choose(self, logits: Tensor, position: Tensor, drafted: Tensor | None = None) -> Tensor:
        """The target's tokens int64 [R, N] at N places of each text, where the logits lie.

        :param logits: [R, N, V].   :param position: int64 [R, N] on the host, place of the chosen token among the generated ones.
        :param drafted: bool [R, N, V], tokens that stand between the committed text and each place (see :meth:`on_paths`).
        """
        seen = None
        if self.seen is not None:
            seen = self.seen[:, None] if drafted is None else self.seen[:, None] | drafted
        if self.greedy:
            return most_likely(logits if seen is None else penalised(logits, self.sampling, seen))
        u = uniform(self.sampling.seed[:, None], self.text[:, None], position)
        drawn = inverse_cdf(process(logits, self.sampling, seen).weight, sent(u, logits.device))
        hot = self.sampling.temperature > 0
        if bool(hot.all()):
            return drawn
        greedy = most_likely(logits if seen is None else penalised(logits, self.sampling, seen))
        return torch.where(sent(hot, logits.device)[:, None], drawn, greedy)

    def on_paths(self, tokens: Tensor, sees: Tensor) -> Tensor | None:
        """bool [R, N, V]: tokens on the path down to each of N tree nodes, for tokens int64 [R, N] and ``sees`` bool [R, N, N]
        (row: node, column: itself and its ancestors); None where nobody is penalised."""
        if self.seen is None:
            return None
        tokens, sees = sent(tokens, self.device), sent(sees, self.device)
        counts = torch.zeros((*tokens.shape, self.seen.shape[1]), dtype=torch.int16, device=self.device)
        return counts.scatter_add(2, tokens[:, None].expand_as(sees), sees.to(torch.int16)) > 0

    def commit(self, tokens: Tensor, counts: Tensor) -> None:
        """Remember newly committed tokens int64 [R, T], of which the first counts int64 [R] stand in the text."""
        if self.seen is not None:
            valid = torch.arange(tokens.shape[1]) < counts[:, None]
            self.seen.scatter_(1, sent(torch.where(valid, tokens, tokens[:, :1]), self.device), True)

    def gather_rows(self, rows: Tensor) -> None:
        """Keep these texts, int64 [R']."""
        self.sampling, self.text = self.sampling.by_row(rows), self.text[rows]
        self.seen = None if self.seen is None else self.seen[rows]

    def join(self, other: Sampler) -> None:
        """The texts of ``other`` behind our own."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        ours, theirs = self.sampling, other.sampling
        self.sampling = Sampling(**{name: torch.cat([getattr(ours, name), getattr(theirs, name)]) for name in names})
        if self.seen is not None or other.seen is not None:  # what nobody penalises need not be remembered
            shapes = [(len(one.text), self.vocabulary) for one in (self, other)]
            nothing = [torch.zeros(shape, dtype=torch.bool, device=self.device) for shape in shapes]
            self.seen = torch.cat([new if own is None else own for own, new in zip((self.seen, other.seen), nothing, strict=True)])
        self.text = torch.cat([self.text, other.text])
        self.greedy = self.greedy and other.greedy
