"""One cycle laid open: what a policy drafted, kept and got accepted, as tables that a person can look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from policies.contract import Policy
from policies.cost import Cost
from policies.drafting import Draft
from policies.loop import Step
from policies.order import rank_of
from policies.verification import node_status
from sim.looked_up import replayed_drafter
from sim.recorded import ListeningDrafter, RecordedText
from sim.replay import ReplayRun
from traces.recording import Recording


@dataclass(frozen=True)
class Shown:
    """One cycle of one text.

    position  place of the root among the generated tokens
    step      the cycle, a single row
    entropy   float32 [N] nats, of the draft's distribution behind each node; NaN where it was not expanded
    """

    position: int
    step: Step
    entropy: np.ndarray

    @property
    def accepted(self) -> int:
        return int(self.step.done.walk.accepted[0])

    @property
    def emitted(self) -> int:
        return int(self.step.gained[0])

    @property
    def kept(self) -> int:
        return int(self.step.done.kept.count[0])

    @property
    def levels(self) -> int:
        """Levels that were drafted or looked up."""
        return int(_levels(self.step.done.draft)[0])

    @property
    def missing(self) -> int:
        return int(self.step.done.draft.missing[0])


def cycles(
    recording: Recording, policy: Policy, drafter: str | None, text: int, cost: Cost | None = None, limit: int = 10**9
) -> list[Shown]:
    """Every cycle (at most ``limit``) of one text, by the loop of `sim.replay`. ``text`` is its index in the recording.

    What a policy of scope "stream" would have learned from earlier texts is not there: it starts afresh.
    """
    run, listening = _run(recording, policy, drafter, cost)
    shown: list[Shown] = []
    with torch.inference_mode():
        run.start(torch.tensor([text]))
        while recording.length[text] > 1 and len(shown) < limit and (step := run.step()) is not None:
            shown.append(_shown(step, listening))
    return shown


def cycle_at(
    recording: Recording, policy: Policy, drafter: str | None, text: int, position: int, cost: Cost | None = None
) -> Shown:
    """The cycle that a fresh policy would make at a position, whether or not one of its cycles begins there."""
    run, listening = _run(recording, policy, drafter, cost)
    with torch.inference_mode():
        run.start(torch.tensor([text]))
        run.position = torch.tensor([position])
        return _shown(run.step(), listening)


def _run(recording: Recording, policy: Policy, drafter: str | None, cost: Cost | None) -> tuple[ReplayRun, ListeningDrafter]:
    policy.check_fitted()
    words = RecordedText(recording)
    listening = ListeningDrafter(replayed_drafter(recording, drafter, words))
    return ReplayRun(recording, words, listening, policy, cost), listening


def _shown(step: Step, listening: ListeningDrafter) -> Shown:
    return Shown(int(step.cycle.position[0]), step, listening.entropy(step.done.draft.tree)[0].numpy())


def some_texts(recording: Recording, texts: np.ndarray, positions: int) -> np.ndarray:
    """Some of the given texts (ascending indices int64), evenly spread, that hold about ``positions`` positions; all, if they
    hold fewer.

    Every domain gives its share, and two at least where it has them: one text alone has no interval.
    """
    total = int(recording.length[texts].sum())
    if total <= positions:
        return texts
    domain = recording.domain_index[texts]
    chosen = []
    for each in np.unique(domain):
        mine = texts[domain == each]
        count = min(len(mine), max(2, len(mine) * positions // total))
        chosen.append(mine[np.arange(count) * len(mine) // count])
    return np.sort(np.concatenate(chosen))


def accepted_everywhere(
    recording: Recording, policy: Policy, drafter: str | None, texts: np.ndarray, cost: Cost | None = None, chunk: int = 2048
) -> pl.DataFrame:
    """What a fresh policy's cycle would get at every position of the given texts, one row each.

    text, position, accepted, kept, levels; terminal_rank: where the last accepted node stands among the kept ones, by
    path probability (1 = best; 0 where none was accepted).
    """
    policy.check_fitted()
    words = RecordedText(recording)
    run = ReplayRun(recording, words, replayed_drafter(recording, drafter, words), policy, cost)
    starts = torch.from_numpy(np.maximum(recording.length[texts] - 1, 0))
    text = torch.from_numpy(np.asarray(texts, np.int64)).repeat_interleave(starts)
    position = torch.arange(len(text)) - (starts.cumsum(0) - starts).repeat_interleave(starts)
    parts = []
    with torch.inference_mode():
        for first in range(0, len(text), chunk):
            here = slice(first, first + chunk)
            run.start(text[here], group=torch.arange(len(text[here])))
            run.position = position[here]
            step = run.step()
            found = {"text": text[here], "position": position[here], "accepted": step.done.walk.accepted}
            found |= {"kept": step.done.kept.count, "levels": _levels(step.done.draft)}
            found |= {"terminal_rank": terminal_rank(step)}
            parts.append(pl.DataFrame({name: value.numpy() for name, value in found.items()}))
    names = ("text", "position", "accepted", "kept", "levels", "terminal_rank")
    return pl.concat(parts) if parts else pl.DataFrame(schema=dict.fromkeys(names, pl.Int64))


def terminal_rank(step: Step) -> Tensor:
    """Terminal confidence rank (HeteroSpec, arXiv 2505.13254, section 3) int64 [B]: where, among the drafted nodes that were sent
    to verification, ranked by path probability (1 = best), the last accepted one stands; 0 where none was."""
    done = step.done
    last = torch.nn.functional.pad(done.walk.path, (1, 0)).clamp(min=0).amax(1)  # places grow along the path
    node = done.kept.node.gather(1, last[:, None])[:, 0]
    tree = done.draft.tree
    score = tree.score.masked_fill(~(done.draft.kept & tree.drafted()), -torch.inf)
    return (rank_of(score, node) + 1).masked_fill(last == 0, 0)


def tree_table(recording: Recording, shown: Shown, text: int) -> pl.DataFrame:
    """The draft tree of one cycle, one row per node, the root first.

    node, parent, depth, rank, token; probability (of the token given its parent), path_probability, score (its logarithm,
    nats), entropy (nats, of the distribution behind the node; null where it was not expanded); kept; accepted; true (on
    the true path, kept or not); tested (verification looked at it).
    """
    tree, kept = shown.step.done.draft.tree, shown.step.done.draft.kept[0]
    count = int(tree.size[0])
    column = {name: getattr(tree, name)[0, :count].numpy() for name in ("parent", "depth", "rank", "token", "logprob", "score")}
    status = node_status(tree, shown.step.done.kept, shown.step.done.walk)[0, :count].numpy()
    return pl.DataFrame(
        {
            "node": np.arange(count),
            "parent": column["parent"],
            "depth": column["depth"],
            "rank": column["rank"],
            "token": column["token"],
            "probability": np.exp(column["logprob"]),
            "path_probability": np.exp(column["score"]),
            "score": column["score"],
            "entropy": pl.Series(shown.entropy[:count], nan_to_null=True),
            "kept": kept[:count].numpy(),
            "accepted": (status == 1) | (np.arange(count) == 0),
            "tested": status >= 0,
            "true": true_path(recording, text, shown.position, column["parent"], column["depth"], column["token"]),
        }
    )


def true_path(
    recording: Recording, text: int, position: int, parent: np.ndarray, depth: np.ndarray, token: np.ndarray
) -> np.ndarray:
    """bool [N]: the node and all its ancestors are the target's own tokens."""
    words = recording.token[recording.offset[text] : recording.offset[text + 1]]
    behind = position + depth
    on_path = (behind < len(words)) & (words[np.minimum(behind, len(words) - 1)] == token)
    on_path[0] = True
    for level in range(1, int(depth.max()) + 1):  # a child stands on the path only if its parent does
        here = depth == level
        on_path[here] &= on_path[parent[here]]
    return on_path


def token_table(recording: Recording, shown: list[Shown], text: int) -> pl.DataFrame:
    """Every counted token of a text, one row each, by the cycle that emitted it.

    position, token, cycle (0 for the first token, which prefill gives), source: "prefill", "drafted" (accepted from the
    draft) or "target" (the target's own, at the end of each cycle); probability and entropy (nats) under the target.
    """
    length, first = int(recording.length[text]), int(recording.offset[text])
    cycle, source = np.zeros(length, np.int64), np.full(length, "prefill", dtype=object)
    for number, each in enumerate(shown, 1):
        begin, end = each.position + 1, min(each.position + each.emitted, length - 1)
        cycle[begin : end + 1] = number
        source[begin : end + 1] = "drafted"
        if each.emitted > each.accepted:
            source[end] = "target"
    here = slice(first, first + length)
    return pl.DataFrame(
        {
            "position": np.arange(length),
            "token": recording.token[here].astype(np.int64),
            "cycle": cycle,
            "source": source.astype(str),
            "probability": np.exp(recording.logprob[here].astype(np.float64)),
            "entropy": recording.entropy[here].astype(np.float64),
        }
    )


def _levels(draft: Draft) -> Tensor:
    """Levels int64 [B] that were drafted or looked up."""
    return (draft.widths > 0).sum(1) + draft.looked_up
