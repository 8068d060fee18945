"""A small made-up recording, and a machine's profile for it: what the dashboard's tests look at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from traces.store import RecordingWriter, ShardPlan
from traces.writer import merge_nodes

VOCABULARY, PERIOD = 40, 61


class World:
    """Next-token distributions by (place, token); the draft's is the target's, blurred."""

    def __init__(self, seed: int, sharpness: float):
        rng = np.random.default_rng(seed)
        shape = (PERIOD, VOCABULARY, VOCABULARY)
        scale = sharpness * rng.random((PERIOD, VOCABULARY, 1))
        logits = rng.normal(size=shape)
        self.target = _log_softmax(logits * scale * 1.5)
        self.draft = _log_softmax((logits + 0.4 * rng.normal(size=shape)) * scale)

    def text(self, first: int, length: int, start: int) -> np.ndarray:
        tokens = [first]
        for j in range(length - 1):
            tokens.append(int(self.target[(start + j) % PERIOD, tokens[-1]].argmax()))
        return np.array(tokens)

    def forest(self, tokens: np.ndarray, start: int, top_k: int, beam: int, depth: int) -> dict[str, np.ndarray]:
        """One tree over the text ``tokens`` (root first): a beam, the top-1 chain and the true path."""
        node = {"token": [int(tokens[0])], "parent": [-1], "rank": [-1], "depth": [0], "score": [np.float32(0)]}
        true, chain, level = {0}, {0}, [0]
        rows = []
        for d in range(depth):
            here = self.draft[(start + d) % PERIOD, np.array(node["token"])[level]]
            children = np.argsort(-here, axis=1, kind="stable")[:, :top_k]
            logprob = np.take_along_axis(here, children, 1).astype(np.float32)
            target = self.target[(start + d) % PERIOD, np.array(node["token"])[level][:, None], children]
            inside = np.array([n in true for n in level]) & (d + 1 < len(tokens))
            rows.append((-(np.exp(here) * here).sum(1), children, logprob, np.where(inside[:, None], target, np.nan)))
            score = np.array(node["score"], np.float32)[level][:, None] + logprob
            wanted = set(np.argsort(-score, axis=None, kind="stable")[:beam].tolist())
            hit = inside[:, None] & (children == (tokens[d + 1] if d + 1 < len(tokens) else -1))
            leads = np.array([n in chain for n in level])[:, None] & (np.arange(children.shape[1]) == 0)
            wanted |= set(np.flatnonzero(hit | leads).tolist())
            if d + 1 == depth:
                break
            parents, level = level, []
            for slot in sorted(wanted):
                row, rank = divmod(slot, children.shape[1])
                level.append(len(node["token"]))
                true |= {level[-1]} if hit[row, rank] else set()
                chain |= {level[-1]} if leads[row, rank] else set()
                found = (int(children[row, rank]), parents[row], rank, d + 1, score[row, rank])
                for name, value in zip(node, found, strict=True):
                    node[name].append(value)
        columns = {name: np.array(node[name]) for name in ("parent", "rank", "depth")}
        names = ("entropy", "child_tokens", "child_logprobs", "target_logprobs")
        columns |= {name: np.concatenate(part) for name, part in zip(names, zip(*rows, strict=True), strict=True)}
        return columns | {"node": np.arange(len(node["token"]))}


def write_recording(
    folder: Path,
    domains: dict[str, float],
    texts: int = 3,
    length: int = 12,
    top_k: int = 4,
    beam: int = 4,
    depth: int = 5,
    temperatures: tuple[float, ...] = (0.0,),
) -> Path:
    """Record ``texts`` texts per domain (its value: how sharp its distributions are), said to be sampled at each of the
    temperatures in turn."""
    plan = [ShardPlan(i, tuple(range(i * texts, (i + 1) * texts)), name) for i, name in enumerate(domains)]
    fields = {
        "target": {"id": "made-up", "weights_sha256": "ab" * 32},
        "drafters": [{"name": "eagle3", "kind": "eagle3", "weights_sha256": "cd" * 32}],
        "device": "cpu (2 threads)",
        "dtype": "float32",
        "machine": {"processor": "an *abacus*", "threads": 2},
        "context_limit": 512,
        "domains": list(domains),
        "sampling": [{"temperature": temperature} for temperature in temperatures],
    }
    writer = RecordingWriter.create(folder, fields, plan)
    for shard in plan:
        world = World(shard.index, domains[shard.domain])
        parts = [_text(world, sequence, shard.domain, length, top_k, beam, depth) for sequence in shard.sequences]
        rows, positions, nodes = zip(*parts, strict=True)
        for row in rows:
            row["temperature"] = temperatures[row["sequence"] % len(temperatures)]
        writer.write_shard(shard.index, rows, _joined(positions), merge_nodes(*sum(nodes, [])))
    writer.finish()
    return folder


def _text(world: World, sequence: int, domain: str, length: int, top_k: int, beam: int, depth: int):
    start, count = 7 * sequence, length + depth + 1
    tokens = world.text(sequence % VOCABULARY, count, start)
    before = np.concatenate([tokens[:1], tokens[:-1]])
    lp = world.target[(start + np.arange(count) - 1) % PERIOD, before]
    top = np.argsort(-lp, axis=1, kind="stable")[:, :6]
    row = {"sequence": sequence, "domain": domain, "prompt_id": f"p{sequence}", "prompt_tokens": [1, 2, 3]}
    row |= {"tokens": tokens, "length": length, "finish": ("length", "loop", "eos")[sequence % 3], "temperature": 0.0}
    positions = {
        "sequence": np.full(count, sequence),
        "position": np.arange(count),
        "token": tokens,
        "logprob": np.take_along_axis(lp, tokens[:, None], 1)[:, 0],
        "processed_logprob": np.zeros(count),
        "entropy": -(np.exp(lp) * lp).sum(1),
        "margin": np.ones(count),
        "uniform": np.full(count, np.nan),
        "top_tokens": top,
        "top_logprobs": np.take_along_axis(lp, top, 1),
    }
    nodes = []
    for position in range(length - 1):
        tree = world.forest(tokens[position:], start + position, top_k, beam, depth)
        size = len(tree["node"])
        where = {"sequence": np.full(size, sequence), "position": np.full(size, position)}
        nodes.append(tree | where | {"drafter": np.zeros(size, np.int8)})
    return row, positions, nodes


def _joined(parts) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def write_profile(path: Path, target_hash: str = "ab" * 32, batch: int = 1) -> Path:
    """A machine on which a verified token costs 0.1 ms on top of 4 ms, a draft level 1 ms, and a plain step 5 ms; for batches
    up to ``batch``, and the same for each."""
    sizes = {"batch": list(range(1, batch + 1))}

    def table(*rows: list[float] | float, **axes: list[int]) -> dict:
        """Milliseconds by two axes, or by one: the same for every batch."""
        return axes | sizes | {"ms": [[[ms] * batch for ms in row] if isinstance(row, list) else [row] * batch for row in rows]}

    content = {
        "format": "specreplay-profile",
        "version": 1,
        "kind": "measured",
        "interpolation": "linear",
        "machine": {"processor": "an abacus"},
        "target": {"id": "made-up", "weights_sha256": target_hash},
        "drafters": [],
        "verify": table([4.1, 4.1], [14.1, 14.1], tokens=[1, 101], context=[1, 500]),
        "commit": table(0.0, 0.0, tokens=[1, 20]),
        "plain": table(5.0, 5.0, context=[1, 500]),
        "draft": {"eagle3": table([1.0, 1.0], [1.0, 1.0], width=[1, 100], context=[1, 500])},
        "catch_up": {"eagle3": table([1.0, 1.0], [1.0, 1.0], tokens=[0, 20], context=[1, 500])},
        "overhead": {"eagle3": table(0.0, 0.0, levels=[0, 10])},
    }
    path.write_text(json.dumps(content))
    return path
