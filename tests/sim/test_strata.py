"""HeteroSpec under any thresholds, looked up in one draft per position, is the replay of that policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from policies.heterospec import HeteroSpec
from sim import strata
from sim.replay import replay
from sim.setting import Setting
from sim.trial import run_trial, tally_of
from tests.policies.synthetic import Language
from tests.sim.many_texts import PLAN, content
from tests.sim.synthetic_recording import write
from tests.sim.test_family import same
from traces.costs import Profile
from traces.recording import Recording

BASE = HeteroSpec(total_tokens=12, depth=2, top_k=3, alpha=3, thresholds_=())
SHARES = [(), (0.5,), (0.3, 0.6), (0.2, 0.4, 0.7), (0.1, 0.3, 0.5, 0.8)]
"""Where thresholds cut the positions."""


@pytest.fixture(scope="module", params=[14, 60], ids=["short context", "long context"])
def recording(request, tmp_path_factory) -> Recording:
    """Where the context is short, the last trees of a text never reach the base depth."""
    made = write(tmp_path_factory.mktemp("strata") / "trace", Language(3, steps=5), PLAN)
    return replace(made, manifest=made.manifest | {"context_limit": request.param})


def under(shares: tuple[float, ...], paths) -> HeteroSpec:
    known = paths["entropy"].drop_nulls().to_numpy()
    return replace(BASE, thresholds_=tuple(float(np.quantile(known, share)) for share in shares))


def test_every_cycle(recording: Recording):
    texts = np.array([5, 0, 3, 1])
    paths, seen = strata.meta_paths(recording, BASE, None, texts), strata.outlooks_of(recording, BASE, None, texts)
    logs = []
    for shares in SHARES:
        policy = under(shares, paths)
        logs.append(strata.replayed(seen, paths, policy))
        same(replay(recording, policy, sequences=torch.from_numpy(texts).sort().values), logs[-1])
    assert len({int(log.kept.sum()) for log in logs}) == len(SHARES), "thresholds must matter, or the test proves nothing"
    assert len(set(logs[-1].levels.tolist())) > 2


def test_short_contexts_end_trees_early(recording: Recording):
    paths = strata.meta_paths(recording, BASE, None, np.arange(6))
    assert (paths["entropy"].null_count() > 0) == (recording.manifest["context_limit"] == 14)


def test_sums_and_prices(recording: Recording):
    texts, setting, cost = np.arange(6), Setting("made-up"), Profile(content()).cost("made-up")
    paths, seen = strata.meta_paths(recording, BASE, None, texts), strata.outlooks_of(recording, BASE, None, texts)
    policy, sequences = under((0.3, 0.6), paths), torch.from_numpy(texts)
    found = tally_of(strata.replayed(seen, paths, policy), recording, policy, setting, cost, sequences)
    assert found.to_json() == run_trial(recording, policy, setting, cost, sequences).to_json()
