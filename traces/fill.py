"""Fill a recording: draft exactly what a policy wants and the recording lacks (``traces.record --fill TRACE --policy P``)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from live.fidelity import check_same_models
from live.network import DraftNetwork
from live.pair import Pair, load_pair
from policies.contract import Policy, Sampling
from policies.errors import UserError
from policies.order import NONE
from policies.registry import load_policy
from traces.capture import Columns, TargetCapture, Text, committed_sources, forest_columns, run_cover, true_continuation
from traces.forest import ForestDrafter
from traces.halving import Halving
from traces.manifest import finished, keeps_prompts, sampling_entry
from traces.recording import open_recording
from traces.writer import RecordingWriter, merge_nodes


def fill(folder: Path, specs: list[str], device: str = "cpu", positions: int = 64) -> None:
    """Add the expansions that the given policies want at any position, for every recorded drafter, shard by shard.

    Where memory runs out, fewer positions are drafted side by side. An interrupted fill leaves whole shards behind and goes on
    when it is run again.
    """
    policies = [load_policy(spec) for spec in specs]
    for policy in policies:
        policy.check_fitted()
    writer = RecordingWriter.reopen(folder)
    about = writer.manifest
    if not keeps_prompts(about):
        raise UserError(f"{folder} was recorded with --no-text and holds no prompts to draft behind: record it anew with --cover")
    pair = load_pair(about["target"]["id"], [drafter["id"] for drafter in about["drafters"]], about["dtype"], device)
    check_same_models(pair, about)
    texts = {row["sequence"]: row for row in open_recording(folder).sequences()}
    cure = "give it a larger device; what is filled stays, run it again"
    added = 0
    with torch.inference_mode(), tqdm(total=len(texts), desc="filling", unit="text", file=sys.stderr) as bar:
        for plan in finished(about):
            trees = Halving(positions, "positions", cure, tqdm.write)  # each shard begins with the full size: it may be run again
            nodes = writer.read_nodes(plan.index)
            parts = [nodes]
            for number in plan.sequences:
                if number in texts:
                    parts += _missing(pair, texts[number], nodes, policies, about, trees)
                    bar.update()
            if len(parts) > 1:
                added += sum(len(part["node"]) for part in parts[1:])
                writer.rewrite_nodes(plan.index, merge_nodes(*parts))
    cover = about["envelope"]["cover"]
    cover = cover + [policy.to_json() for policy in policies if policy.to_json() not in cover]
    writer.update_manifest(envelope=about["envelope"] | {"cover": cover})
    print(f"filled {folder}: {added} expansions added")


def _missing(
    pair: Pair, row: dict[str, Any], nodes: Columns, policies: list[Policy], about: dict[str, Any], trees: Halving
) -> list[Columns]:
    """Node tables of what one text lacks, one per drafter and block of positions."""
    text = Text(list(row["prompt_tokens"]), list(row["tokens"]), row["length"], row["finish"])
    sampling = Sampling(**sampling_entry(about, row["temperature"]))
    capture = TargetCapture(pair.target(), text, sampling, row["sequence"])
    parts = []
    for index, network in enumerate(pair.networks.values()):
        mine = (nodes["sequence"] == row["sequence"]) & (nodes["drafter"] == index)
        lacking = _Lacking(network, capture, {name: values[mine] for name, values in nodes.items()}, policies, about, sampling)
        fixed = {"sequence": row["sequence"], "drafter": np.int8(index)}
        for columns in trees.blocks(max(text.length - 1, 0), lacking, lacking.begin):
            count = len(columns["node"])
            if count:
                parts.append({name: np.full(count, value) for name, value in fixed.items()} | columns)
    return parts


class _Lacking:
    """What one text lacks of one drafter, at a block of positions."""

    def __init__(
        self,
        network: DraftNetwork,
        capture: TargetCapture,
        recorded: Columns,
        policies: list[Policy],
        about: dict[str, Any],
        sampling: Sampling,
    ):
        self.network, self.capture, self.recorded, self.policies = network, capture, recorded, policies
        self.limit, self.sampling = about["context_limit"], sampling
        self.begin()

    def begin(self) -> None:
        """Run the draft over the text; anew where memory ran out, which may leave it between two states."""
        self.sources = None  # lets go of the pass before
        self.network.reset(0)
        self.sources = committed_sources(self.network, self.capture)

    def __call__(self, start: int, stop: int) -> Columns:
        capture = self.capture
        position = torch.arange(start, stop, device=capture.tokens.device)
        context = capture.first + position
        fanout = self.recorded["child_tokens"].shape[1]
        forest = ForestDrafter(self.network, self.sources(context), capture.tokens[0, context], context, fanout)
        rows, number, following = recorded_rows(self.recorded, start, len(position))
        forest.preload({name: value.to(position.device) for name, value in rows.items()})
        known = forest.token.shape[1]
        run_cover(forest, self.policies, position, context, self.limit, self.sampling)
        number = torch.cat([number, following[:, None] - 1 + forest.exists[:, known:].cumsum(1)], dim=1)
        return forest_columns(forest, position, true_continuation(capture, position), capture.logprob, number, known)


def recorded_rows(nodes: Columns, start: int, trees: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The recorded forests of positions start .. start + trees - 1 as padded rows, depth by depth.

    Returns the rows that :meth:`ForestDrafter.preload` takes, their node numbers int64 [B, S], and the next free number [B].
    """
    inside = (nodes["position"] >= start) & (nodes["position"] < start + trees)
    table = {name: torch.from_numpy(values[inside]) for name, values in nodes.items()}
    tree, node, depth = table["position"].long() - start, table["node"].long(), table["depth"].long()
    key = (tree * (int(depth.max()) + 1) + depth) * (int(node.max()) + 1) + node
    order = torch.argsort(key)
    tree, node, depth = tree[order], node[order], depth[order]
    counts = torch.zeros((trees, int(depth.max()) + 1), dtype=torch.int64)
    counts.index_put_((tree, depth), torch.ones_like(tree), accumulate=True)
    widths = counts.max(0).values
    base = torch.nn.functional.pad(widths.cumsum(0), (1, 0))[:-1]
    before = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))[:-1].reshape(counts.shape)
    place = base[depth] + torch.arange(len(tree)) - before[tree, depth]
    size = int(widths.sum())
    flat = tree * size + place

    def spread(values: Tensor, empty: float | int) -> Tensor:
        whole = torch.full((trees * size, *values.shape[1:]), empty, dtype=values.dtype)
        whole[flat] = values
        return whole.reshape(trees, size, *values.shape[1:])

    number = spread(node, NONE)
    row_of_node = torch.full((trees, int(node.max()) + 1), NONE)
    row_of_node[tree, node] = place
    parent = table["parent"].long()[order]
    parent_row = row_of_node[tree, parent.clamp(min=0)].masked_fill(parent < 0, NONE)
    child_token, child_logprob = table["child_tokens"].long()[order], table["child_logprobs"][order]
    rank = table["rank"].long()[order]
    index_of = torch.full((trees, size), 0)
    index_of[tree, place] = torch.arange(len(tree))
    source = index_of[tree, parent_row.clamp(min=0)]
    is_root = parent < 0
    token = child_token[source, rank.clamp(min=0)].masked_fill(is_root, 0)  # a root's own token is not looked at
    logprob = child_logprob[source, rank.clamp(min=0)].masked_fill(is_root, 0.0)
    rows = {
        "parent": spread(parent_row, NONE),
        "rank": spread(rank, NONE),
        "depth": spread(depth, NONE),
        "token": spread(token, NONE),
        "logprob": spread(logprob, 0.0),
        "entropy": spread(table["entropy"][order], 0.0),
        "child_token": spread(child_token, NONE),
        "child_logprob": spread(child_logprob, -torch.inf),
    }
    return rows, number, (number.max(1).values + 1)
