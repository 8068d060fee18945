"""Replays summed per text, and what bootstrapping over texts says about the figures: intervals, paired differences.

Texts are what varies from one run to the next, so texts are drawn again (with replacement, within each domain), never
cycles. Every policy is judged on the same draws: the interval of a difference is a paired one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import torch

from policies.contract import Policy
from sim.metrics import ALL
from sim.pricing import plain_ms, price
from sim.recorded import RecordedText
from sim.replay import replay
from traces.costs import CostModel
from traces.recording import Recording

DRAWS = 1000
FIGURES = {  # name: sums it divides
    "tau": ("emitted", "cycles"),
    "kept": ("kept", "cycles"),
    "levels": ("levels", "cycles"),
    "coverage": ("covered", "cycles"),
    "ms_per_token": ("ms", "emitted"),
    "speedup": ("plain_ms", "ms"),
}
"""What can be said of a policy. Per domain each is a ratio of sums over texts; overall, the mean over domains."""


def texts_at(recording: Recording, temperature: float | None) -> np.ndarray:
    """Indices int64 of the texts recorded at a temperature; of all texts for None."""
    if temperature is None:
        return np.arange(len(recording.length))
    return np.flatnonzero(np.isclose(recording.temperature, temperature, atol=1e-4))


def some_texts(recording: Recording, texts: np.ndarray, positions: int) -> np.ndarray:
    """Texts evenly spread over the given ones (indices int64) that hold about ``positions`` positions; all, if fewer."""
    total = int(recording.length[texts].sum())
    count = max(1, len(texts) * positions // max(total, 1))
    return texts if count >= len(texts) else texts[np.arange(count) * len(texts) // count]


def per_text(
    recording: Recording,
    policy: Policy,
    drafter: str | None = None,
    texts: np.ndarray | None = None,
    cost: CostModel | None = None,
) -> pl.DataFrame:
    """Replay a policy and sum up each text: one row per replayed text, in the recording's order.

    text       index of the text in the recording
    domain     its domain
    cycles, emitted, kept, levels, covered   sums over its cycles (covered: cycles that found all they wanted)
    ms         predicted milliseconds of its cycles       } only with a ``cost``
    plain_ms   predicted milliseconds of plain decoding   }

    :param texts: indices int64 of the texts to replay; all by default.
    """
    chosen = None if texts is None else torch.as_tensor(np.asarray(texts, np.int64))
    log = replay(recording, policy, drafter, sequences=chosen, cost=cost)
    text = log.sequence.numpy()
    table = pl.DataFrame(
        {
            "text": text,
            "cycles": np.ones(len(text), np.int64),
            "emitted": log.emitted.numpy(),
            "kept": log.kept.numpy(),
            "levels": log.levels.numpy(),
            "covered": (log.missing == 0).to(torch.int64).numpy(),
        }
    )
    if cost is not None:
        table = table.with_columns(ms=pl.Series(price(log, cost).numpy()))
    table = table.group_by("text", maintain_order=True).sum()
    if cost is not None:
        words = RecordedText(recording)
        steps = (words.length - 1).clamp(min=1)
        plain = (plain_ms(words.context_length, words.offset, words.length, cost) / steps).numpy()
        table = table.with_columns(plain_ms=pl.Series(plain[table["text"].to_numpy()]) * pl.col("emitted"))
    names = [recording.domains[index] for index in recording.domain_index[table["text"].to_numpy()]]
    return table.insert_column(1, pl.Series("domain", names, dtype=pl.String))


def rows(tables: dict[str, pl.DataFrame], draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """The figures of several policies with 95% intervals: one row per policy and domain, and per policy the mean.

    :param tables: what :func:`per_text` gave, by the policy's name.

    Columns: policy, domain, texts, cycles, emitted, and per figure its value with ``_low`` and ``_high``; null where it
    was not predicted, and intervals also where a domain has a single text (nothing can be drawn again).
    """
    out = []
    for name, table in tables.items():
        found = _figures(table, _draws(table, draws, seed))
        for domain, (values, spread, texts) in found.items():
            counts = table if domain == ALL else table.filter(pl.col("domain") == domain)
            row = {"policy": name, "domain": domain, "texts": texts}
            row |= {"cycles": counts["cycles"].sum(), "emitted": counts["emitted"].sum()}
            for figure, value in values.items():
                low, high = _interval(spread[figure])
                row |= {figure: value, f"{figure}_low": low, f"{figure}_high": high}
            out.append(row)
    return pl.DataFrame(out, infer_schema_length=None)


def differences(ours: pl.DataFrame, theirs: pl.DataFrame, draws: int = DRAWS, seed: int = 0) -> pl.DataFrame:
    """How one policy's figures differ from another's on the texts that both have, per domain and on the mean.

    :param ours, theirs: what :func:`per_text` gave for the two, of recordings with the same texts.

    Columns: domain, figure, ours, theirs, difference (ours - theirs), low, high (95%, paired over texts), texts.
    """
    both = np.intersect1d(ours["text"].to_numpy(), theirs["text"].to_numpy())
    ours, theirs = (table.filter(pl.col("text").is_in(both)).sort("text") for table in (ours, theirs))
    weights = _draws(ours, draws, seed)  # the same texts drawn for both
    mine, other = _figures(ours, weights), _figures(theirs, weights)
    out = []
    for domain, (values, spread, texts) in mine.items():
        for figure, value in values.items():
            if figure not in other[domain][0]:
                continue
            against = other[domain][0][figure]
            low, high = _interval(spread[figure] - other[domain][1][figure])
            row = {"domain": domain, "figure": figure, "ours": value, "theirs": against, "difference": value - against}
            out.append(row | {"low": low, "high": high, "texts": texts})
    return pl.DataFrame(out, infer_schema_length=None)


def _draws(table: pl.DataFrame, draws: int, seed: int) -> dict[str, np.ndarray]:
    """How often each text of a domain is drawn: float64 [1 + draws, texts of the domain]; the first row: once each."""
    weights = {}
    for domain in table["domain"].unique(maintain_order=True):
        weights[domain] = _drawn(int((table["domain"] == domain).sum()), draws, seed)
    return weights


@lru_cache(maxsize=64)
def _drawn(texts: int, draws: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng([seed, texts]).multinomial(texts, np.full(texts, 1 / texts), size=draws)
    return np.concatenate([np.ones((1, texts)), drawn])


def _figures(table: pl.DataFrame, weights: dict[str, np.ndarray]) -> dict[str, tuple[dict, dict, int]]:
    """By domain and for their mean: the figures, their draws (NaN with a single text in a domain), the texts."""
    found = {}
    known = {name: parts for name, parts in FIGURES.items() if all(part in table.columns for part in parts)}
    for domain, drawn in weights.items():
        mine = table.filter(pl.col("domain") == domain)
        sums = {part: drawn @ mine[part].to_numpy().astype(np.float64) for parts in known.values() for part in parts}
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = {name: sums[above] / sums[below] for name, (above, below) in known.items()}
        alone = np.nan if len(mine) < 2 else 0.0
        values = {name: float(each[0]) for name, each in ratio.items()}
        found[domain] = values, {name: each[1:] + alone for name, each in ratio.items()}, len(mine)
    parts = list(found.values())
    if parts:
        values = {name: float(np.mean([part[0][name] for part in parts])) for name in known}
        spread = {name: np.mean([part[1][name] for part in parts], axis=0) for name in known}
        found[ALL] = values, spread, sum(part[2] for part in parts)
    return found


def _interval(drawn: np.ndarray) -> tuple[float | None, float | None]:
    if not len(drawn) or not np.isfinite(drawn).all():
        return None, None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def partners(ours: Recording, theirs: Recording) -> dict[int, int]:
    """Texts of the other recording -> texts of ours with the same domain and prompt id (and temperature)."""
    index = {_identity(row): place for place, row in enumerate(ours.sequences())}
    found = {place: index.get(_identity(row)) for place, row in enumerate(theirs.sequences())}
    return {place: text for place, text in found.items() if text is not None}


def _identity(row: dict[str, Any]) -> tuple:
    return row["domain"], row["prompt_id"], round(float(row["temperature"]), 4)


def relabelled(table: pl.DataFrame, partner: dict[int, int]) -> pl.DataFrame:
    """The sums of another recording under our numbers of the texts; those without a partner are left out."""
    kept = table.filter(pl.col("text").is_in(list(partner)))
    return kept.with_columns(text=pl.Series([partner[text] for text in kept["text"]], dtype=pl.Int64))
