"""Entropy-acceptance curves: how often the target takes what the draft proposes, by how sure the draft was."""

from __future__ import annotations

if __name__ == "__main__":  # the command: it stands in sim.acceptance, and begins here so that --help need not load polars
    import runpy

    runpy.run_module("sim.acceptance", run_name="__main__")

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl

from traces.recording import Forest, Recording

Measure = Literal["draft_entropy", "target_entropy", "path_entropy", "top1_logprob", "path_score", "top1_probability"]
Outcome = Literal["top1", "topk"]
Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


def samples(recording: Recording, drafter: str | None = None, texts: np.ndarray | None = None) -> pl.DataFrame:
    """One row per expanded draft node on the true path (roots included) whose next token counts.

    sequence        id of the text
    position        place of the tree's root among the generated tokens
    domain          of the text
    depth           of the expanded node: 0 = the root, which proposes the first drafted token
    draft_entropy   nats, of the draft's distribution behind the node, full draft vocabulary
    target_entropy  nats, of the target's distribution at the same place, full vocabulary
    top1_logprob    the draft's log-probability of its first choice
    path_entropy    nats: HeteroSpec's cumulative meta-path entropy (arXiv 2505.13254, eq. 1): of the distributions from the
                    root to this node, each over its recorded top K, renormalised, summed
    path_score      log-probability of the path from the root to the first choice
    temperature     of the text
    token, choice   ids of the target's token at this place and of the draft's first choice
    top1            the first choice is the target's token
    topk            one of the recorded top-K children is the target's token

    A node of depth d is there only when the draft's top K held the target's tokens all the way down, so deep samples
    are a selection of easy places. The same token of a text is predicted by several rows: from the root before it, and
    from deeper nodes of earlier trees.

    :param drafter: name of the recorded drafter; by default the recording's first.
    :param texts: indices int64 of the texts to look at; all by default.
    """
    drafter = drafter or recording.drafters[0]
    forest = recording.forest(drafter)
    row, depth, hit, sequence, behind = counted_nodes(recording, drafter, texts)
    path_entropy, path_score = _along_the_path(forest, row)
    return pl.DataFrame(
        {
            "sequence": recording.sequence_ids[sequence],
            "position": forest.position[row] - recording.offset[sequence],
            "domain": domain_of(recording, sequence),
            "depth": depth,
            "draft_entropy": forest.entropy[row],
            "target_entropy": recording.entropy[behind],
            "top1_logprob": forest.child_logprob[row, 0],
            "path_entropy": path_entropy,
            "path_score": path_score + forest.child_logprob[row, 0],
            "temperature": recording.temperature[sequence],
            "token": recording.token[behind],
            "choice": forest.child_token[row, 0],
            "top1": hit[:, 0],
            "topk": hit.any(axis=1),
        }
    )


def counted_nodes(
    recording: Recording, drafter: str, texts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Expanded nodes of the true path whose next token counts, n of them: (row in the forest, depth, hit bool [n, K]: which
    child is the target's token, index of the sequence, flat position of that token). ``texts``: as for :func:`samples`."""
    forest = recording.forest(drafter)
    if texts is None:
        row = np.flatnonzero(forest.on_path_row >= 0)
    else:  # rows stand in the order of positions: a large recording is read where it is looked at
        texts, begin = np.sort(texts), np.searchsorted(forest.position, recording.offset)
        spans = [slice(*span) for span in zip(begin[texts], begin[texts + 1], strict=True)]
        parts = [span.start + np.flatnonzero(forest.on_path_row[span] >= 0) for span in spans]
        row = np.concatenate([np.zeros(0, np.int64), *parts])
    position = forest.position[row]
    sequence = np.searchsorted(recording.offset, position, side="right") - 1
    depth = forest.depth[row].astype(np.int64)
    behind = position + depth + 1
    counts = behind < recording.offset[sequence] + recording.length[sequence]
    row, depth, sequence, behind = (a[counts] for a in (row, depth, sequence, behind))
    return row, depth, forest.child_token[row] == recording.token[behind][:, None], sequence, behind


def _along_the_path(forest: Forest, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums from the root to each of the nodes of the true path: top-K entropies, and log-probabilities.

    :param row: ascending; it holds the parents too.
    """
    logprob = forest.child_logprob[row].astype(np.float64)
    share = np.exp(logprob - np.logaddexp.reduce(logprob, axis=1, keepdims=True))
    entropy = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0).sum(axis=1)
    score = forest.logprob[row].astype(np.float64)
    depth, above = forest.depth[row], np.searchsorted(row, forest.parent[row])
    for level in range(1, int(depth.max(initial=0)) + 1):  # parents first
        here = np.flatnonzero(depth == level)
        entropy[here] += entropy[above[here]]
        score[here] += score[above[here]]
    return entropy, score


def domain_of(recording: Recording, sequence: np.ndarray) -> pl.Series:
    """Domain names of sequences, given by their indices int64 [n]."""
    return pl.Series(recording.domains, dtype=pl.String).gather(recording.domain_index[sequence])


def curve(
    table: pl.DataFrame,
    x: Measure = "draft_entropy",
    by: Literal["depth", "domain", "temperature"] | None = None,
    bins: int | Sequence[float] = 20,
    outcome: Outcome = "top1",
    least: int = 50,
) -> pl.DataFrame:
    """Acceptance against ``x``, one row per non-empty bin, with Wilson 95% intervals.

    :param table: what :func:`samples` returned.
    :param by: draw one curve per depth, domain or temperature; the column comes first in the result.
    :param bins: how many bins of equal count (each curve has its own), or ascending inner edges; x <= edge lies below.
        Equal values of x share a bin, so bins can be fewer.
    :param outcome: count the draft's first choice ("top1") or any of its top K ("topk").
    :param least: samples a bin of equal count needs; a curve with too few has fewer bins.

    Columns: x (mean in the bin), low and high (its extremes), count, acceptance (share), ci_low, ci_high. The intervals
    take samples as independent; neighbouring places of one text are not, so true intervals are somewhat wider.
    """
    keys = [None] if by is None else table[by].unique().sort().to_list()
    parts = []
    for key in keys:
        part = table if by is None else table.filter(pl.col(by) == key)
        binned = _binned(part[x].to_numpy().astype(np.float64), part[outcome].to_numpy(), bins, least)
        parts.append(binned if by is None else binned.select(pl.lit(key, dtype=table.schema[by]).alias(by), pl.all()))
    return pl.concat(parts) if parts else _binned(np.zeros(0), np.zeros(0, bool), 1, least)


def _binned(x: np.ndarray, hit: np.ndarray, bins: int | Sequence[float], least: int) -> pl.DataFrame:
    edges = np.asarray(bins, np.float64) if not isinstance(bins, int) else _equal_count_edges(x, min(bins, len(x) // least))
    place = np.searchsorted(edges, x, side="left")
    count = np.bincount(place, minlength=len(edges) + 1)
    accepted = np.bincount(place, weights=hit, minlength=len(count))
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, place, x)
    np.maximum.at(high, place, x)
    total = np.bincount(place, weights=x, minlength=len(count))
    some = count > 0
    count, accepted = count[some], accepted[some]
    ci_low, ci_high = wilson(accepted, count)
    return pl.DataFrame(
        {
            "x": total[some] / count,
            "low": low[some],
            "high": high[some],
            "count": count,
            "acceptance": accepted / count,
            "ci_low": ci_low,
            "ci_high": ci_high,
        }
    )


def _equal_count_edges(x: np.ndarray, bins: int) -> np.ndarray:
    """Ascending inner edges, each a value of ``x``."""
    if bins < 2:
        return np.zeros(0)
    last = np.arange(1, bins) * len(x) // bins - 1  # the last sample of each bin but the final one
    return np.unique(np.partition(x, last)[last])


def histogram(table: pl.DataFrame, x: Measure, bins: int = 60) -> pl.DataFrame:
    """Samples by ``x`` in bins of equal width: left, right, count."""
    count, edges = np.histogram(table[x].to_numpy(), bins=bins)
    return pl.DataFrame({"left": edges[:-1], "right": edges[1:], "count": count})


def inside(
    table: pl.DataFrame, x: Measure, low: float, high: float, by: Literal["depth", "domain"], outcome: Outcome
) -> pl.DataFrame:
    """Acceptance of the samples with low <= x <= high, by depth or domain.

    Columns: by, acceptance, ci_low, ci_high (Wilson 95%), count, samples (share of the group's samples that is inside).
    """
    chosen = pl.col(x).is_between(low, high)
    numbers = [
        (pl.col(outcome) & chosen).sum().alias("accepted"),
        chosen.sum().cast(pl.Int64).alias("count"),
        chosen.mean().alias("samples"),
    ]
    found = table.group_by(by).agg(numbers).sort(by).filter(pl.col("count") > 0)
    low_, high_ = wilson(found["accepted"].to_numpy(), found["count"].to_numpy())
    share = (pl.col("accepted") / pl.col("count")).alias("acceptance")
    return found.select(by, share, pl.Series("ci_low", low_), pl.Series("ci_high", high_), "count", "samples")


def wilson(accepted: np.ndarray, count: np.ndarray, z: float = Z95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a share: (low, high), within [0, 1]."""
    accepted, count = np.asarray(accepted, np.float64), np.asarray(count, np.float64)
    centre = (accepted + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * np.sqrt(accepted * (count - accepted) / count + z * z / 4)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
