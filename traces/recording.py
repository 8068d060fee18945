"""Open a recording as numpy arrays: the truth, position by position, and each drafter's forest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from policies.errors import UserError
from traces import cache, flatten
from traces import manifest as mf
from traces.manifest import Damage, Manifest, ShardPlan


@dataclass(frozen=True)
class Forest:
    """The draft trees of one drafter at every position; E expanded nodes, K children each. Rows of one tree are
    consecutive, parents first. All arrays are read-only and may be memory-mapped; -1 means none.
    """

    drafter: str
    root: np.ndarray
    """[P] int64: row of the root's expansion at each flat position."""
    position: np.ndarray
    """[E] int64: flat position of the tree's root."""
    parent: np.ndarray
    """[E] int64: row of the parent."""
    rank: np.ndarray
    """[E] int16: place among the parent's children."""
    depth: np.ndarray
    """[E] int16: 0 for a root."""
    token: np.ndarray
    """[E] int32."""
    logprob: np.ndarray
    """[E] float32: draft log q of the token given its parent; 0 for a root."""
    entropy: np.ndarray
    """[E] float32, nats: of the node's next-token distribution over the full draft vocabulary."""
    child_token: np.ndarray
    """[E, K] int32, by falling log-probability."""
    child_logprob: np.ndarray
    """[E, K] float32; -inf where there is no child."""
    child_row: np.ndarray
    """[E, K] int32 (int64 from 2^31 rows): row of the child's own expansion, -1 where it was not expanded."""
    on_path_row: np.ndarray
    """[E] int32 or int64: row in `on_path_logprob` of a node on the true path."""
    on_path_logprob: np.ndarray
    """[T, K] float32: the target's raw log-probability of the children of the nodes on the true path."""

    @cached_property
    def target_logprob(self) -> np.ndarray:
        """[E, K] float32: the target's raw log-probability of each child, NaN off the true path. Made on first use,
        in memory (4K bytes per node); `on_path_logprob` holds the same without the gaps."""
        dense = np.full(self.child_logprob.shape, np.nan, dtype=np.float32)
        on_path = self.on_path_row >= 0
        dense[on_path] = self.on_path_logprob[self.on_path_row[on_path]]
        return dense


@dataclass(frozen=True)
class Recording:
    """S generated texts, P positions (all tokens of all texts, one after the other).

    Arrays are read-only and may be memory-mapped. Shards stand in the order of the plan.
    """

    folder: Path
    manifest: Manifest
    complete: bool
    """False while shards are missing: the recorder has not finished, or damaged shards were skipped."""
    damaged: list[Damage]
    """Files that were skipped (only with `skip_damaged`)."""
    plans: list[ShardPlan] = field(repr=False)
    """The shards that are held."""
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    memory: int = 1 << 30
    """Bytes of it that a replay holds at a time; changes no result (`sim.streaming`)."""

    @property
    def drafters(self) -> list[str]:
        """Names of the recorded drafters."""
        return mf.drafter_names(self.manifest)

    @property
    def domains(self) -> list[str]:
        """Domain names; `domain_index` points here."""
        return flatten.domain_names(self.manifest)

    @property
    def sequence_ids(self) -> np.ndarray:
        """[S] int64."""
        return self.arrays["sequence_ids"]

    @cached_property
    def uniform_keys(self) -> np.ndarray:
        """[S] int64: the ids that the texts were recorded under, which key their uniform numbers; a merge may have renumbered."""
        shift = {number: plan.shift for plan in self.plans for number in plan.sequences}
        return np.array([number - shift[number] for number in self.sequence_ids.tolist()], dtype=np.int64)

    @property
    def domain_index(self) -> np.ndarray:
        """[S] int64, into `domains`."""
        return self.arrays["domain_index"]

    @property
    def finish(self) -> np.ndarray:
        """[S] int8, into `traces.schema.FINISHES`."""
        return self.arrays["finish"]

    @property
    def length(self) -> np.ndarray:
        """[S] int64: counted tokens; the recording goes on for some tokens more."""
        return self.arrays["length"]

    @property
    def temperature(self) -> np.ndarray:
        """[S] float32."""
        return self.arrays["temperature"]

    @property
    def offset(self) -> np.ndarray:
        """[S + 1] int64: positions of sequence s are offset[s] to offset[s + 1]."""
        return self.arrays["offset"]

    @property
    def token(self) -> np.ndarray:
        """[P] int32: the target's text."""
        return self.arrays["token"]

    @property
    def logprob(self) -> np.ndarray:
        """[P] float32: raw log-probability of the token under the distribution that gave it."""
        return self.arrays["logprob"]

    @property
    def processed_logprob(self) -> np.ndarray:
        """[P] float32: the same after temperature, top-k and top-p."""
        return self.arrays["processed_logprob"]

    @property
    def entropy(self) -> np.ndarray:
        """[P] float32, nats: of the raw distribution that gave the token, full vocabulary."""
        return self.arrays["entropy"]

    @property
    def margin(self) -> np.ndarray:
        """[P] float32: gap between the two best raw log-probabilities; at T > 0 the distance of `uniform` to the edge."""
        return self.arrays["margin"]

    @property
    def uniform(self) -> np.ndarray:
        """[P] float64: the number that chose the token; NaN at temperature 0."""
        return self.arrays["uniform"]

    @property
    def top_tokens(self) -> np.ndarray:
        """[P, M] int32: the target's likeliest tokens."""
        return self.arrays["top_tokens"]

    @property
    def top_logprobs(self) -> np.ndarray:
        """[P, M] float32: their raw log-probabilities."""
        return self.arrays["top_logprobs"]

    @property
    def context_length(self) -> np.ndarray:
        """[P] int64: tokens before this one (prompt and text)."""
        return self.arrays["context_length"]

    def prompt_tokens(self, sequence: int) -> np.ndarray:
        """[n] int32: prompt of the sequence at index `sequence` (0..S-1). Raises UserError when it was kept out."""
        if not mf.keeps_prompts(self.manifest):
            raise UserError(f"{self.folder} was recorded with --no-text and holds no prompts: this needs a recording with text")
        first, last = self.arrays["prompt_offset"][sequence : sequence + 2]
        return self.arrays["prompt_token"][first:last]

    def sampling(self, sequence: int) -> dict[str, Any]:
        """How the text at index `sequence` was chosen: temperature, top_k, top_p, repetition_penalty, seed."""
        return mf.sampling_entry(self.manifest, float(self.temperature[sequence]))

    def sequences(self) -> list[dict[str, Any]]:
        """Rows of the sequences table (with texts), in the order of the arrays. Read from Parquet on each call."""
        tables = [pq.read_table(self.folder / mf.shard_file("sequences", plan.index)) for plan in self.plans]
        return pa.concat_tables(tables).to_pylist()

    def deepest(self, drafter: str) -> int | None:
        """Depth of the deepest nodes that a recorded drafter drafts; None: as deep as asked."""
        return next((entry.get("levels") for entry in self.manifest["drafters"] if entry["name"] == drafter), None)

    def forest(self, drafter: str) -> Forest:
        """The forest of one drafter. Raises UserError when it was not recorded."""
        if drafter not in self.drafters:
            known = ", ".join(self.drafters) or "none"
            raise UserError(f"{self.folder} holds no drafter {drafter!r}: choose one of its own ({known})")
        prefix = f"forest{self.drafters.index(drafter)}_"
        columns = {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}
        return Forest(drafter, **columns)


def open_recording(
    folder: str | Path,
    verify: bool = False,
    skip_damaged: bool = False,
    on_shard: Callable[[int, int], None] = lambda done, of: None,
) -> Recording:
    """Open a recording.

    :param verify: compare every shard with its checksum, always. Without it, that is done only when the cache is built
        or when a shard's size or modification time has changed since.
    :param skip_damaged: leave out damaged shards (they are listed in `damaged`) instead of refusing.
    :param on_shard: told, while the cache is built, how many shards are done, of how many.
    Raises UserError when the folder holds no recording or one of a newer version, when nothing in it is finished, and
    when a shard is missing, truncated or edited. An unfinished recording opens with what is finished, and says so in
    `complete`.
    """
    folder = Path(folder)
    manifest = mf.settle(folder, mf.read_manifest(folder))
    plans = mf.finished(manifest)
    damages = mf.find_damage(folder, manifest, by_content=False, columns=False)
    if verify or damages or not cache.has(folder, cache.key_of(folder, manifest, plans)):
        damages = mf.find_damage(folder, manifest)
    if damages and not skip_damaged:
        first = damages[0]
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise UserError(
            f"{folder / first.file} is {first.reason}{more}: restore it, or record it again with traces.record --resume"
        )
    broken = {damage.index for damage in damages}
    plans = [plan for plan in plans if plan.index not in broken]
    if not plans:
        raise UserError(f"{folder} holds no finished shard: record some with traces.record --resume")
    key = cache.key_of(folder, manifest, plans)
    arrays = cache.load(folder, key, lambda store: flatten.build(store, folder, manifest, plans, on_shard))
    complete = manifest["status"] == "complete" and not damages
    return Recording(folder, manifest, complete, damages, plans, arrays)
