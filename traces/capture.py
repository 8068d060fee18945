"""Capture: the target's own text, its distribution at every position, and the draft forest at every position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from live.decoding_plain import plain_decode
from live.distribution import entropy_of, log_probabilities
from live.model import CachedModel
from live.network import DraftNetwork
from live.pair import Pair
from live.sampling import GREEDY, measured, penalised, process
from policies.contract import Cycle, Policy, Sampling
from policies.drafting import Growth
from policies.order import NONE
from policies.philox import uniform
from traces.cover import TRUE_PATH_DEPTH, TruePath
from traces.forest import ForestDrafter
from traces.halving import Halving
from traces.loops import loop_onset

Columns = dict[str, np.ndarray]
_BLOCK = 64
"""Positions whose processed distributions are made side by side: float64 over the whole vocabulary takes room."""


class BrokenLogits(Exception):
    """Logits that are not numbers (NaN): of what model, and at what position of the text."""

    def __init__(self, model: str, position: int):
        super().__init__(f"the logits of {model} at position {position} are not numbers (NaN)")


@dataclass(frozen=True)
class CaptureSettings:
    """What to record.

    max_new_tokens  limit per text, the first token included
    overrun         tokens drawn beyond the text's end, so that its last cycles are exact
    top_m           target log-probs kept per position
    fanout          children kept per expanded draft node, K
    cover           policies whose expansions the forest holds
    cut_loops       end a text where it falls into a verbatim loop
    positions       positions whose trees grow side by side
    """

    max_new_tokens: int
    overrun: int
    top_m: int
    fanout: int
    cover: tuple[Policy, ...]
    cut_loops: bool
    positions: int = 64


@dataclass(frozen=True)
class Text:
    """One generated text: prompt and generated token ids (with overrun), counted length, and why it ended."""

    prompt: list[int]
    tokens: list[int]
    length: int
    finish: str

    @property
    def broken(self) -> bool:
        """The logits behind the last token were not numbers, so the text cannot be recorded."""
        return self.finish == "nan"


def generate_texts(
    pair: Pair,
    prompts: Sequence[list[int]],
    settings: CaptureSettings,
    sampling: Sampling = GREEDY,
    numbers: Sequence[int] | None = None,
    batch: Halving | None = None,
) -> list[Text]:
    """Texts of some prompts, by plain batched decoding.

    :param numbers: the sequences' numbers, which key their uniform numbers; 0, 1, 2, ... by default.
    :param batch: how many are decoded side by side; all by default.
    """
    numbers = list(range(len(prompts)) if numbers is None else numbers)
    if batch is None:
        return _generate(pair, prompts, settings, sampling, numbers)

    def work(start: int, stop: int) -> list[Text]:
        return _generate(pair, prompts[start:stop], settings, sampling, numbers[start:stop])

    return [text for block in batch.blocks(len(prompts), work, lambda: None) for text in block]


def _generate(
    pair: Pair, prompts: Sequence[list[int]], settings: CaptureSettings, sampling: Sampling, numbers: Sequence[int]
) -> list[Text]:
    """Texts of one batch."""
    limit = settings.max_new_tokens + settings.overrun
    target = pair.plain(len(prompts))
    broken: set[int] = set()
    said = plain_decode(
        target, list(prompts), limit, pair.end_tokens, sampling=sampling, text=numbers, on_nan=lambda row, _: broken.add(row)
    )
    texts = []
    for row, (prompt, tokens) in enumerate(zip(prompts, said, strict=True)):
        if row in broken:
            texts.append(Text(list(prompt), tokens, len(tokens), "nan"))
            continue
        ended = tokens[-1] in pair.end_tokens
        length, finish = (len(tokens), "eos") if ended else (settings.max_new_tokens, "length")
        if length > settings.max_new_tokens:
            length, finish = settings.max_new_tokens, "length"
        onset = loop_onset(tokens[:length]) if settings.cut_loops else None
        if onset is not None:
            length, finish = onset, "loop"
        texts.append(Text(list(prompt), tokens[: length + settings.overrun], length, finish))
    return texts


class TargetCapture:
    """The target's distribution at every place of one text, from a single pass over it."""

    def __init__(self, target: CachedModel, text: Text, sampling: Sampling = GREEDY, number: int = 0):
        """:param sampling: how the text was chosen, as plain numbers. :param number: of the sequence.

        Raises BrokenLogits.
        """
        tokens = torch.tensor([text.prompt + text.tokens], device=target.device)
        target.reset(1)
        output = target.prefill(tokens, logits="all")
        first = len(text.prompt)
        self.tokens, self.features, self.first = tokens, output.captured, first
        # logits at place i choose the token at place i + 1
        self.logits = output.logits[0, first - 1 : -1]
        self.logprob = log_probabilities(self.logits)
        self.next_token = tokens[0, first:]
        self.sampling, self.number = sampling, number
        _refuse_nan("the target", self.logprob.amax(-1))

    def columns(self, top_m: int) -> Columns:
        """The positions table of this text, without its sequence number."""
        count = len(self.next_token)
        processed, margin, u = self._choices()
        top = self.logprob.topk(min(top_m, self.logprob.shape[-1]), dim=-1)
        chosen = self.logprob.gather(1, self.next_token[:, None])[:, 0].float()
        return {
            "position": np.arange(count, dtype=np.int32),
            "token": _numpy(self.next_token, torch.int32),
            "logprob": _numpy(chosen),
            "processed_logprob": _numpy(processed, torch.float32),
            "entropy": _numpy(entropy_of(self.logprob)),
            "margin": _numpy(margin, torch.float32),
            "uniform": _numpy(u, torch.float64),
            "top_tokens": _numpy(top.indices, torch.int32),
            "top_logprobs": _numpy(top.values.float()),
        }

    def _choices(self) -> tuple[Tensor, Tensor, Tensor]:
        """How each token was chosen: its processed log-probability, the margin, and the uniform number, float [n] each."""
        count, device = len(self.next_token), self.tokens.device
        position = torch.arange(count, device=device)
        if self.sampling.temperature > 0:
            u = uniform(self.sampling.seed, torch.full_like(position, self.number), position)
            parts = []
            for block in position.split(_BLOCK):
                found = process(self.logits[block], self.sampling, self._seen(block))
                parts.append(measured(found, u[block], self.next_token[block]))
            processed, margin = (torch.cat(column) for column in zip(*parts, strict=True))
            return processed, margin, u
        scores = self.logprob  # greedy: the argmax has probability 1
        if self.sampling.repetition_penalty != 1:
            scores = penalised(self.logits, self.sampling, self._seen(position))
        best = scores.topk(2, dim=-1).values
        nothing = torch.zeros(count, device=device)
        return nothing, best[:, 0] - best[:, 1], torch.full_like(nothing, torch.nan)

    def _seen(self, position: Tensor) -> Tensor | None:
        """bool [n, V]: tokens that stand before the given positions; None when nobody is penalised."""
        if self.sampling.repetition_penalty == 1:
            return None
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        first_seen = torch.full_like(self.logits[0], len(places), dtype=torch.int64)
        first_seen = first_seen.scatter_reduce(0, self.tokens[0], places, "amin")
        return first_seen < (self.first + position)[:, None]


def capture_forest(
    network: DraftNetwork,
    capture: TargetCapture,
    text: Text,
    settings: CaptureSettings,
    context_limit: int,
    trees: Halving | None = None,
) -> Columns:
    """The nodes table of one drafter on one text, without sequence and drafter: every position where a cycle may start.

    :param trees: how many positions' trees grow side by side; ``settings.positions`` by default.
    Raises BrokenLogits.
    """
    sources = committed_sources(network, capture)
    trees = trees or Halving(settings.positions, "positions", "use a smaller dtype")

    def again() -> None:  # a network that ran out of memory may stand between two states: it begins anew
        nonlocal sources
        network.reset(0)
        sources = committed_sources(network, capture)

    def work(start: int, stop: int) -> Columns:
        position = torch.arange(start, stop, device=capture.tokens.device)
        context = capture.first + position
        forest = ForestDrafter(network, sources(context), capture.tokens[0, context], context, settings.fanout)
        truth = true_continuation(capture, position)
        cover = (*settings.cover, TruePath(truth, settings.fanout))
        run_cover(forest, cover, position, context, context_limit, capture.sampling)
        _refuse_nan(f"drafter '{network.name}'", forest.entropy.amax(1), start)
        return forest_columns(forest, position, truth, capture.logprob)

    parts = list(trees.blocks(max(text.length - 1, 0), work, again))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _refuse_nan(model: str, values: Tensor, start: int = 0) -> None:
    """Raise BrokenLogits at the first NaN of values [n], one per position from ``start`` on."""
    wrong = values.isnan()
    if bool(wrong.any()):
        raise BrokenLogits(model, start + int(wrong.nonzero()[0, 0]))


def committed_sources(network: DraftNetwork, capture: TargetCapture) -> Callable[[Tensor], Tensor]:
    """Run the draft over the whole true text; where its trees start for roots at given context lengths int64 [B]."""
    network.reset(1)
    length = capture.tokens.shape[1]
    count = torch.tensor([length], device=capture.tokens.device)
    if network.needs_features:  # cell i pairs the feature of place i with the token of place i + 1
        outputs = network.advance(capture.tokens[:, 1:], capture.features[:, :-1], count - 1, everywhere=True)[0]
        return lambda context: outputs[context - 1]
    outputs = network.advance(capture.tokens, None, count, everywhere=True)[0]
    return lambda context: outputs[context]


def true_continuation(capture: TargetCapture, position: Tensor) -> Tensor:
    """The true tokens behind each root, int64 [B, TRUE_PATH_DEPTH], -1 behind the recorded end."""
    behind = position[:, None] + torch.arange(1, TRUE_PATH_DEPTH + 1, device=position.device)
    inside = behind < len(capture.next_token)
    return capture.next_token[behind.masked_fill(~inside, 0)].masked_fill(~inside, NONE)


def run_cover(
    forest: ForestDrafter,
    cover: Sequence[Policy],
    position: Tensor,
    context: Tensor,
    context_limit: int,
    sampling: Sampling = GREEDY,
) -> None:
    """Let the policies draft at every position, side by side; the forest keeps the union of what they expand."""
    nothing = torch.zeros(len(position), device=position.device)
    cycle = Cycle(
        active=torch.ones_like(position, dtype=torch.bool),
        sequence=torch.zeros_like(position),
        number=torch.zeros_like(position),
        position=position,
        context_length=context,
        room=context_limit - 1 - context,
        reach=context_limit - 1 - context,
        root_told=lambda: (nothing, nothing),
        group=torch.arange(len(position), device=position.device),
        sampling=sampling.by_row(position),
    ).up_to(forest.deepest)
    root = forest.token[:, 0]
    growths = [Growth(policy, root, cycle, policy.begin(cycle, policy.init(len(position), position))) for policy in cover]
    while asked := [(growth, wish) for growth in growths if (wish := growth.wish()) is not None]:
        growths, wishes = [growth for growth, _ in asked], [wish for _, wish in asked]
        answers = forest.expand([growth.tree for growth in growths], wishes)
        for growth, wish, children in zip(growths, wishes, answers, strict=True):
            growth.take(wish, children)


def forest_columns(
    forest: ForestDrafter, position: Tensor, truth: Tensor, target_logprob: Tensor, number: Tensor | None = None, first: int = 0
) -> Columns:
    """Flatten the forest of B positions into nodes table columns; the children of true-path nodes get the target's log-probs.

    :param target_logprob: [n, V], row j belongs to the distribution that gave token j.
    :param number: int64 [B, S] node index of each row within its tree; by default rows are counted.
    :param first: leave out the rows before this one.
    """
    exists = forest.exists
    number = exists.cumsum(1) - 1 if number is None else number
    on_path = _on_true_path(forest, truth)
    row = (position[:, None] + forest.depth + 1).clamp(max=len(target_logprob) - 1)
    inside = on_path & (position[:, None] + forest.depth + 1 < len(target_logprob))
    target = torch.full(forest.child_logprob.shape, torch.nan, device=position.device)
    places = inside.nonzero(as_tuple=True)
    wanted = forest.child_token[places].clamp(min=0)
    target[places] = target_logprob[row[places]].gather(1, wanted).float()
    parent = number.gather(1, forest.parent.clamp(min=0)).masked_fill(forest.parent < 0, NONE)
    columns = {
        "position": (position[:, None].expand_as(exists), torch.int32),
        "node": (number, torch.int32),
        "parent": (parent, torch.int32),
        "rank": (forest.rank, torch.int16),
        "depth": (forest.depth, torch.int16),
        "token": (forest.token, torch.int32),
        "logprob": (forest.logprob, torch.float32),
        "entropy": (forest.entropy, torch.float32),
        "child_tokens": (forest.child_token, torch.int32),
        "child_logprobs": (forest.child_logprob, torch.float32),
        "target_logprobs": (target, torch.float32),
    }
    wanted_rows = exists & (torch.arange(exists.shape[1], device=exists.device) >= first)
    return {name: _numpy(value[wanted_rows], dtype) for name, (value, dtype) in columns.items()}


def _on_true_path(forest: ForestDrafter, truth: Tensor) -> Tensor:
    """bool [B, S]: rows whose node lies on the true path."""
    wanted = truth.gather(1, (forest.depth - 1).clamp(min=0, max=truth.shape[1] - 1))
    own = (forest.depth == 0) | ((forest.token == wanted) & (forest.depth <= truth.shape[1]) & forest.exists)
    on_path = own
    for _ in range(int(forest.depth.max())):  # a node is on the path when it and all its ancestors are
        on_path = own & (on_path.gather(1, forest.parent.clamp(min=0)) | (forest.depth == 0))
    return on_path


def _numpy(value: Tensor, dtype: torch.dtype | None = None) -> np.ndarray:
    return (value if dtype is None else value.to(dtype)).cpu().numpy()
