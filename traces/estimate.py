"""What a recording would take, measured on a small sample: ``python -m traces.record --dry-run``."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from live.sampling import GREEDY
from policies.contract import Sampling
from policies.errors import UserError
from policies.plural import counted
from traces.capture import CaptureSettings, Columns, TargetCapture, Text, capture_forest, generate_texts
from traces.manifest import ShardPlan
from traces.plan import Turn
from traces.prompts import Prompt
from traces.schema import nodes_schema, positions_schema, to_arrow, write_parquet
from traces.writer import merge_nodes

if TYPE_CHECKING:
    from live.pair import Pair

_COPIES = 3
"""A shard's tables are in memory as parts, merged, and as Arrow columns while it is written."""


@dataclass(frozen=True)
class Estimate:
    """What recording a plan would take if every text ran to its limit.

    texts, positions  how much there is to record
    seconds           generate, target and one entry per drafter
    bytes             on disk, by table
    memory            peak bytes of the process (and of the GPU where there is one)
    nodes             draft nodes per position, by drafter
    sampled           positions that the sample looked at
    """

    texts: int
    positions: int
    seconds: dict[str, float]
    bytes: dict[str, float]
    memory: int
    gpu_memory: int
    nodes: dict[str, float]
    sampled: int


def estimate(
    pair: Pair,
    encoded: Sequence[list[int]],
    settings: CaptureSettings,
    plan: Sequence[ShardPlan],
    sampling: Sampling = GREEDY,
) -> Estimate:
    """Record one block of positions of one text in memory and scale it up.

    :param encoded: token ids of every prompt, by sequence number.
    :param sampling: how the sample's tokens are chosen.
    :raises UserError: when the sample texts end too soon to measure anything.
    """
    numbers = [number for shard in plan for number in shard.sequences]
    sample = replace(settings, max_new_tokens=min(settings.max_new_tokens, settings.positions + 1), cut_loops=False)
    with torch.inference_mode():
        rows = [encoded[number] for number in plan[0].sequences]
        generate_texts(pair, rows[:1], replace(sample, max_new_tokens=1, overrun=1), sampling)  # first calls are slow
        started = time.perf_counter()
        texts = [text for text in generate_texts(pair, rows, sample, sampling) if not text.broken]
        if not texts:
            raise UserError("the target's logits are not numbers (NaN) in the sample: check model and --dtype")
        steps = max(len(text.tokens) for text in texts)
        per_step = (time.perf_counter() - started) / steps
        text = max(texts, key=lambda one: one.length)
        if text.length < 2:
            raise UserError("the sample texts end at once, so nothing can be measured: give other prompts")
        seconds, positions, nodes = _capture(pair, text, sample, sampling)
    new_tokens = settings.max_new_tokens + settings.overrun
    roots = max(settings.max_new_tokens - 1, 0) * len(numbers)
    places = sum(len(encoded[number]) + new_tokens for number in numbers)
    drafted = text.length - 1
    took = {
        "generate": per_step * new_tokens * len(plan),
        "target": seconds.pop("target") / (len(text.prompt) + len(text.tokens)) * places,
        **{name: spent / drafted * roots for name, spent in seconds.items()},
    }
    sizes, raw = _sizes(list(pair.networks), text, positions, nodes)
    counts = {"positions": (new_tokens * len(numbers), len(text.tokens)), "nodes": (roots, drafted)}
    largest = max(len(shard.sequences) for shard in plan) / len(numbers)
    shard_bytes = sum(raw[table] / of * all_ * largest for table, (all_, of) in counts.items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cuda = torch.device(pair.model.device).type == "cuda"
    return Estimate(
        texts=len(numbers),
        positions=settings.max_new_tokens * len(numbers),
        seconds=took,
        bytes={table: sizes[table] / of * all_ for table, (all_, of) in counts.items()},
        memory=int(peak + _COPIES * shard_bytes),
        gpu_memory=torch.cuda.max_memory_allocated() if cuda else 0,
        nodes={name: len(table["node"]) / drafted for name, table in nodes.items()},
        sampled=drafted,
    )


def foreseen(
    prompts: Sequence[Prompt], encoded: Sequence[list[int]], turns: Sequence[Turn], settings: CaptureSettings
) -> list[list[int]]:
    """Token ids by sequence number, as if every answer to a turn before ran to its limit (its tokens are made up)."""
    first = {(prompt.domain, prompt.id): ids for prompt, ids in zip(prompts, encoded, strict=True)}
    return [first[turn.prompt.domain, turn.prompt.id] + [0] * (turn.turn * settings.max_new_tokens) for turn in turns]


def print_estimate(
    pair: Pair,
    encoded: Sequence[list[int]],
    settings: CaptureSettings,
    plan: Sequence[ShardPlan],
    sampling: Sampling = GREEDY,
) -> None:
    """Say what the recording would take, and on what assumptions."""
    print(f"recording a sample of {min(settings.positions, settings.max_new_tokens)} positions ...", file=sys.stderr)
    print(render(estimate(pair, encoded, settings, plan, sampling), settings))


def render(found: Estimate, settings: CaptureSettings) -> str:
    """The estimate as lines of text."""
    total, disk = sum(found.seconds.values()), sum(found.bytes.values()) / 1e6
    parts = ", ".join(f"{name} {_duration(value)}" for name, value in found.seconds.items())
    nodes = ", ".join(f"{name} {value:.0f}" for name, value in found.nodes.items())
    memory = f"{found.memory / 1e9:.1f} GB" + (f", GPU {found.gpu_memory / 1e9:.1f} GB" if found.gpu_memory else "")
    ends = "ends of sequence and loops make" if settings.cut_loops else "ends of sequence make"
    return "\n".join(
        [
            f"{counted(found.texts, 'text')} of up to {counted(settings.max_new_tokens, 'token')}, {found.positions:,} positions",
            f"  time    about {_duration(total)} ({parts})",
            f"  disk    about {disk:,.0f} MB" if disk >= 10 else f"  disk    about {max(disk, 0.1):.1f} MB",
            f"  memory  about {memory}",
            f"  nodes   per position: {nodes}",
            f"an estimate from {found.sampled} positions of one text, on this machine as busy as it is now; it takes",
            f"every text to run to its limit ({ends} it less), and one domain's drafts to be like another's",
        ]
    )


def _capture(
    pair: Pair, text: Text, settings: CaptureSettings, sampling: Sampling
) -> tuple[dict[str, float], Columns, dict[str, Columns]]:
    """Seconds for the target and each drafter, the positions table, and the nodes table of each drafter."""
    started = time.perf_counter()
    capture = TargetCapture(pair.target(), text, sampling)
    positions = capture.columns(settings.top_m)
    seconds, nodes = {"target": time.perf_counter() - started}, {}
    for name, network in pair.networks.items():
        started = time.perf_counter()
        nodes[name] = capture_forest(network, capture, text, settings, pair.context_limit)
        seconds[name] = time.perf_counter() - started
    return seconds, positions, nodes


def _sizes(
    names: list[str], text: Text, positions: Columns, nodes: dict[str, Columns]
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the sample's tables on disk and in memory."""
    parts = []
    for index, table in enumerate(nodes.values()):
        count = len(table["node"])
        parts.append({"sequence": np.zeros(count, int), "drafter": np.full(count, index, np.int8), **table})
    merged = merge_nodes(*parts)
    positions = {"sequence": np.zeros(len(text.tokens), int), **positions}
    tables = {
        "positions": to_arrow(positions, positions_schema(positions["top_tokens"].shape[1])),
        "nodes": to_arrow(merged, nodes_schema(merged["child_tokens"].shape[1]), names),
    }
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, table in tables.items():
            path = Path(folder) / f"{name}.parquet"
            write_parquet(table, path)
            sizes[name] = path.stat().st_size
    return sizes, {name: table.nbytes for name, table in tables.items()}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
