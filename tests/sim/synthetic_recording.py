"""A recording of the synthetic language: EAGLE-3's expansions at every position, made by the brute-force builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.policies import brute
from tests.policies.synthetic import Language
from traces.manifest import ShardPlan
from traces.recording import Recording, open_recording
from traces.writer import RecordingWriter

FANOUT = 5


def key_of(sequence: int) -> int:
    """The language's row key of a recorded sequence."""
    return sequence + 100


def write(
    folder: Path,
    language: Language,
    plan: list[ShardPlan],
    length: int = 14,
    overrun: int = 4,
    depth: int = 3,
    top_k: int = 3,
    temperature: float = 0.0,
) -> Recording:
    """Record ``length + overrun`` tokens per sequence; the forest holds what EAGLE-3's tree of this size expands."""
    drafters = [{"name": "made-up", "kind": "lm", "id": "made-up"}]
    fields = {"target": {"id": "made-up"}, "drafters": drafters, "context_limit": 64}
    fields["sampling"] = [{"temperature": temperature, "top_p": 0.9 if temperature else 1.0, "seed": 7}]
    writer = RecordingWriter.create(folder, fields, plan)
    for shard in plan:
        rows, positions, nodes = [], [], []
        for sequence in shard.sequences:
            text = language.truth(key_of(sequence), length + overrun)
            facts = {"sequence": sequence, "domain": shard.domain, "prompt_id": str(sequence), "temperature": temperature}
            rows.append(facts | {"prompt_tokens": [1], "tokens": text, "length": length, "finish": "length"})
            positions += [_position(sequence, place, token) for place, token in enumerate(text)]
            for place in range(length - 1):
                nodes += _nodes(language, sequence, place, text, depth, top_k)
        writer.write_shard(shard.index, rows, _columns(positions), _columns(nodes))
    writer.finish()
    return open_recording(folder)


def _nodes(language: Language, sequence: int, place: int, text: list[int], depth: int, top_k: int) -> list[dict]:
    key = key_of(sequence)

    def children_of(at: int, token: int, branching: int):
        return language.children_of(key, place + at, token, branching)

    tree, _ = brute.beam(brute.Node(text[place]), children_of, top_k, depth, 10**6)
    inner = [node for node in tree if node.children]
    number = {id(node): index for index, node in enumerate(inner)}
    rows = []
    for node in inner:
        children = children_of(node.depth, node.token, FANOUT)
        on_path = list(node.path()) == text[place + 1 : place + 1 + node.depth]
        target = np.full(FANOUT, -1.0 if on_path else np.nan, dtype=np.float32)
        rows.append(
            {
                "sequence": sequence,
                "position": place,
                "drafter": 0,
                "node": number[id(node)],
                "parent": number[id(node.parent)] if node.parent else -1,
                "rank": node.rank,
                "depth": node.depth,
                "entropy": np.float32(0.01 * node.token),
                "child_tokens": [token for token, _ in children],
                "child_logprobs": [logprob for _, logprob in children],
                "target_logprobs": list(target),
            }
        )
    return rows


def _position(sequence: int, place: int, token: int) -> dict:
    return {
        "sequence": sequence,
        "position": place,
        "token": token,
        "logprob": np.float32(-0.5),
        "processed_logprob": np.float32(0.0),
        "entropy": np.float32(1.0),
        "margin": np.float32(1.0),
        "uniform": np.nan,
        "top_tokens": [token, (token + 1) % 24],
        "top_logprobs": [np.float32(-0.5), np.float32(-2.0)],
    }


def _columns(rows: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
