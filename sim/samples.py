"""Samples for fitting: a policy's base tree drafted at every recorded position, and what the truth says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from policies.contract import Cycle, Policy
from policies.cost import Cost
from policies.drafting import Draft, Drafter, draft
from policies.verification import node_status, pack
from sim.looked_up import replayed_drafter
from sim.recorded import ListeningDrafter, RecordedText, RecordedVerifier
from traces.recording import Recording

CHUNK = 2048
"""Positions drafted side by side: some 60 MB for EAGLE-3's 710-node tree."""


@dataclass(frozen=True)
class Nodes:
    """Drafted nodes that the truth tests (their parent lies on the true path), in (sample, node) order; n of them.

    For a policy that ``fits_on_whole_trees``: the accepted nodes and a share of all others, tested or not.

    sample    int64   [n] index of the position in :class:`Samples`
    depth     int64   [n] 1 = child of the root
    rank      int64   [n] place among its siblings, 0 = most probable
    logprob   float32 [n] draft log q (nats) given the parent
    score     float32 [n] path log-probability (nats)
    entropy   float32 [n] entropy (nats) of the distribution that proposed it (its parent's), full vocabulary
    accepted  bool    [n] it lies on the true path too
    """

    sample: np.ndarray
    depth: np.ndarray
    rank: np.ndarray
    logprob: np.ndarray
    score: np.ndarray
    entropy: np.ndarray
    accepted: np.ndarray


@dataclass(frozen=True)
class Samples:
    """One row per position where a cycle may start, in (sequence, position) order; P of them.

    sequence  int64 [P]  index of the sequence in the recording
    position  int64 [P]  place of the root among the generated tokens
    domain    int64 [P]  index of its domain
    accepted  int64 [P]  nodes on the true path among those the base policy keeps
    missing   int64 [P]  expansions that the base policy wanted and the recording does not hold
    context   int64 [P]  tokens before the root
    columns   what the policy's ``measure`` returned, [P] each
    nodes     the tested nodes of the trees, when asked for
    cost      what time costs, when known
    """

    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    accepted: np.ndarray
    missing: np.ndarray
    context: np.ndarray
    columns: dict[str, np.ndarray]
    nodes: Nodes | None = None
    cost: Cost | None = None


def build_samples(
    recording: Recording,
    policy: Policy,
    drafter: str | None = None,
    sequences: np.ndarray | None = None,
    *,
    nodes: bool = False,
    cost: Cost | None = None,
    chunk: int = CHUNK,
    on_positions: Callable[[int], Any] = lambda count: None,
) -> Samples:
    """Draft ``policy.fit_base()`` at every position of the given sequences (indices; all by default).

    :param nodes: also list the tested nodes (some 30 to 50 per position for EAGLE-3's tree).
    :param chunk: positions at a time; bounds the memory and changes nothing else.
    :param on_positions: told how many positions are done, for progress bars.
    """
    text = RecordedText(recording)
    world = replayed_drafter(recording, drafter, text), RecordedVerifier(text)
    base = policy.fit_base()
    if sequences is None:
        sequences = np.arange(len(text.length))
    chosen = torch.as_tensor(np.asarray(sequences, dtype=np.int64))
    starts = (text.length[chosen] - 1).clamp(min=0)
    sequence = chosen.repeat_interleave(starts)
    position = torch.arange(len(sequence)) - (starts.cumsum(0) - starts).repeat_interleave(starts)
    parts: list[dict[str, np.ndarray]] = []
    tables: list[dict[str, np.ndarray]] = []
    with torch.inference_mode():
        for first in range(0, max(len(sequence), 1), chunk):  # an empty chunk still gives the columns their names
            here = slice(first, first + chunk)
            none, alone = torch.zeros_like(sequence[here]), torch.arange(len(sequence[here]))
            cycle = text.cycle(sequence[here], position[here], none, alone, recording.manifest["context_limit"], cost)
            cycle = replace(cycle, room=text.length[sequence[here]] - 1 - position[here])  # behind it no truth counts
            part, table = _one_chunk(policy, base, *world, cycle, nodes)
            if table:
                tables.append(table | {"sample": table["sample"] + first})
            parts.append(part)
            on_positions(len(sequence[here]))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    joined_nodes = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]} if tables else None
    return Samples(
        sequence=sequence.numpy(),
        position=position.numpy(),
        domain=np.asarray(recording.domain_index)[sequence.numpy()],
        accepted=joined.pop("accepted"),
        missing=joined.pop("missing"),
        context=text.context_length[text.offset[sequence] + position].numpy(),
        columns=joined,
        nodes=Nodes(**joined_nodes) if joined_nodes else None,
        cost=cost,
    )


def _one_chunk(
    policy: Policy, base: Policy, drafter: Drafter, verifier: RecordedVerifier, cycle: Cycle, nodes: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Per position: what was accepted and measured; per tested node (when asked for): the table."""
    if not len(cycle.sequence):
        return {"accepted": np.zeros(0, np.int64), "missing": np.zeros(0, np.int64)}, {}
    if nodes:
        drafter = ListeningDrafter(drafter)
    drafted = draft(base, drafter, cycle, base.begin(cycle, base.init(len(cycle.sequence), cycle.sequence)))
    walk = verifier.accept(cycle, pack(drafted.tree, drafted.kept))
    columns = {"accepted": walk.accepted, "missing": drafted.missing} | policy.measure(drafted.tree, cycle)
    table = _tested_nodes(drafted, drafter, verifier, cycle, policy.fits_on_whole_trees) if nodes else {}
    return {name: column.numpy() for name, column in columns.items()}, table


def _tested_nodes(
    drafted: Draft, listening: ListeningDrafter, verifier: RecordedVerifier, cycle: Cycle, every: int = 0
) -> dict[str, np.ndarray]:
    """The tested nodes (``every`` 0), or the accepted ones and every so many-th other that the truth can deny."""
    tree = drafted.tree
    whole = pack(tree, tree.exists)
    walk = verifier.accept(cycle, whole)
    status = node_status(tree, whole, walk)
    listed = status >= 0
    if every:  # where the truth ends (no bonus token), what lies behind it is unknown
        turn = (torch.arange(tree.width) + cycle.position[:, None]) % every == 0
        listed = (status == 1) | (turn & tree.drafted() & (walk.bonus >= 0)[:, None])
    sample, node = listed.nonzero(as_tuple=True)
    columns = {name: getattr(tree, name)[sample, node] for name in ("depth", "rank", "logprob", "score")}
    columns |= {"sample": sample, "entropy": listening.entropy(tree)[sample, tree.parent[sample, node]]}
    columns["accepted"] = status[sample, node] == 1
    return {field.name: columns[field.name].numpy() for field in fields(Nodes)}
