"""HeteroSpec's strata on a recording: the meta-path entropy at every position, and what thresholds make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import torch

from policies.eagle3 import Eagle3
from policies.heterospec import HeteroSpec
from sim.curves import Z95, domain_of
from sim.family import Outlook, outlooks
from sim.replay import CycleLog
from sim.samples import build_samples
from traces.recording import Recording


def meta_paths(recording: Recording, policy: HeteroSpec, drafter: str | None, texts: np.ndarray) -> pl.DataFrame:
    """The policy's base tree at every position of the given texts, one row each.

    text, position, domain; entropy (cumulative meta-path top-K entropy, nats; null where the tree stayed too shallow),
    rank (of the meta-path's end, 1 = most probable), accepted (nodes of the base tree on the true path).
    """
    samples = build_samples(recording, policy, drafter, texts)
    return pl.DataFrame(
        {
            "text": samples.sequence,
            "position": samples.position,
            "domain": domain_of(recording, samples.sequence),
            "entropy": pl.Series(samples.columns["entropy"].astype(np.float64), nan_to_null=True),
            "rank": samples.columns["rank"],
            "accepted": samples.accepted,
        }
    )


def outlooks_of(recording: Recording, policy: HeteroSpec, drafter: str | None, texts: np.ndarray) -> list[Outlook]:
    """What the policy would do at every position of the given texts in each stratum, whatever its thresholds.

    Nothing of a cycle outlives it, and in a stratum the tree is EAGLE-3's to the bit, some levels deeper and pruned to fewer
    tokens (section 4.3): so one draft serves all strata (`sim.family`), and thresholds only say which of them counts where.
    """
    every = replace(policy, thresholds_=tuple(range(len(policy.gamma))))
    return list(outlooks(recording, _trees(every), drafter, sequences=torch.from_numpy(np.sort(texts))))


def _trees(policy: HeteroSpec) -> list[Eagle3]:
    """What is drafted and verified in each stratum, lowest entropy first."""
    sizes = zip(policy.extra_levels(), policy.verified_tokens(), strict=True)
    return [Eagle3(total_tokens=tokens, depth=policy.depth + extra, top_k=policy.top_k) for extra, tokens in sizes]


def replayed(seen: list[Outlook], paths: pl.DataFrame, policy: HeteroSpec) -> CycleLog:
    """The policy's cycles, as `sim.replay.replay` gives them, looked up in :func:`outlooks_of` and :func:`meta_paths`."""
    paths = paths.sort("text", "position")
    member = torch.tensor([seen[0].policies.index(tree) for tree in _trees(policy)])[torch.from_numpy(stratum_of(paths, policy))]
    parts = member.split([len(part.position) for part in seen])
    return CycleLog.joined([part.mixed(own) for part, own in zip(seen, parts, strict=True)])


def stratum_of(paths: pl.DataFrame, policy: HeteroSpec) -> np.ndarray:
    """Stratum int64 [P] of each row of :func:`meta_paths`: how many thresholds its entropy exceeds."""
    edges = np.asarray(policy.thresholds_ or (), np.float64)
    entropy = paths["entropy"].fill_null(np.inf).to_numpy()  # a tree without a meta-path counts as least sure
    return np.searchsorted(edges, entropy)


def strata(paths: pl.DataFrame, policy: HeteroSpec) -> pl.DataFrame:
    """What the policy's thresholds cut the positions into, lowest entropy first.

    stratum, above and up_to (nats; x <= edge lies below; infinite ends are null), positions (share), accepted (mean
    nodes of the base tree on the true path), extra_levels and verified (tokens, root included) of the policy.
    """
    edges, place = list(policy.thresholds_ or ()), stratum_of(paths, policy)
    count = np.bincount(place, minlength=len(edges) + 1)
    accepted = np.bincount(place, weights=paths["accepted"].to_numpy(), minlength=len(count))
    with np.errstate(invalid="ignore"):
        mean = accepted / count
    return pl.DataFrame(
        {
            "stratum": np.arange(len(count)),
            "above": [None, *edges],
            "up_to": [*edges, None],
            "positions": count / max(count.sum(), 1),
            "accepted": pl.Series(mean, nan_to_null=True),
            "extra_levels": policy.extra_levels(),
            "verified": policy.verified_tokens(),
        },
        schema_overrides={"above": pl.Float64, "up_to": pl.Float64},
    )


def accepted_by_entropy(paths: pl.DataFrame, bins: int = 20, least: int = 20) -> pl.DataFrame:
    """Mean accepted nodes against the meta-path entropy, in bins of equal count.

    Columns: entropy (mean in the bin, nats), low, high (its extremes), accepted, ci_low, ci_high (normal 95%), count.
    """
    known = paths.filter(pl.col("entropy").is_not_null()).sort("entropy")
    parts = max(1, min(bins, len(known) // least))
    place = np.arange(len(known)) * parts // max(len(known), 1)
    half = Z95 * (pl.col("accepted").std() / pl.len().sqrt()).fill_null(0.0)
    return (
        known.with_columns(bin=pl.Series(place))
        .group_by("bin", maintain_order=True)
        .agg(
            pl.col("entropy").min().alias("low"),
            pl.col("entropy").max().alias("high"),
            (pl.col("accepted").mean() - half).alias("ci_low"),
            (pl.col("accepted").mean() + half).alias("ci_high"),
            pl.len().cast(pl.Int64).alias("count"),
            pl.col("entropy").mean().alias("mean"),
            pl.col("accepted").mean(),
        )
        .rename({"mean": "entropy"})
        .drop("bin")
    )


def dragged(thresholds: Sequence[float], low: float, high: float) -> list[float]:
    """The thresholds (nats, ascending) after one was dragged: of an interval's two ends the one that lies nearer to a
    threshold is where it was taken up, the other where it was let go."""
    gaps = [(abs(edge - end), place, to) for end, to in ((low, high), (high, low)) for place, edge in enumerate(thresholds)]
    _, place, to = min(gaps)
    return sorted([*thresholds[:place], to, *thresholds[place + 1 :]])


def with_thresholds(policy: HeteroSpec, thresholds: Sequence[float]) -> HeteroSpec:
    """The policy with other thresholds (nats), put in order; equal ones are one."""
    return replace(policy, thresholds_=tuple(sorted(set(thresholds))))
