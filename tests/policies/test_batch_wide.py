"""Batch-wide policies decide within a group: other groups do not matter, nor does the order in which rows come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from policies.contract import Cycle
from policies.serving_batch import ServingBatches
from tests.policies.cases import make, settings
from tests.policies.records import Decision, decide, decode
from tests.policies.synthetic import Language, SyntheticDrafter, SyntheticVerifier, cycle_at
from tests.policies.test_properties import rows_of, world

SPECS = [spec for spec in settings() if make(spec).batch_wide]
few = hypothesis_settings(max_examples=3, deadline=None)
KEYS = 24


def grouped(chosen: list[int], group: dict[int, int], seed: int, active: set[int] | None = None) -> Cycle:
    position, reach = rows_of(chosen, seed)
    cycle = cycle_at(chosen, position, reach, None if active is None else [key in active for key in chosen])
    return replace(cycle, group=torch.tensor([group[key] for key in chosen]))


def bare(decisions: list[Decision]) -> list[Decision]:
    return [one._replace(state=()) for one in decisions]


@pytest.mark.parametrize("spec", SPECS)
@few
@given(seed=st.integers(0, 10**6), steps=st.integers(2, 7), shuffle=st.randoms(use_true_random=False))
def test_groups_do_not_know_of_each_other(spec, seed, steps, shuffle):
    """Bits of every row: its group alone, beside others, shuffled, under another number, beside rows that have ended."""
    policy, language = make(spec), Language(seed, steps=steps, holes=5)
    drafter = world(language)
    group = {key: shuffle.choice([3, 7, 8, 50]) for key in range(KEYS)}
    members = {name: [key for key in range(KEYS) if group[key] == name] for name in set(group.values())}
    whole = decide(policy, drafter, grouped(list(range(KEYS)), group, seed))
    for name, own in members.items():
        alone = bare(decide(policy, drafter, grouped(own, dict.fromkeys(own, 0), seed)))
        assert alone == bare([whole[key] for key in own]), f"group {name} alone"
    mixed = shuffle.sample(range(KEYS), KEYS)
    assert decide(policy, drafter, grouped(mixed, group, seed)) == [whole[key] for key in mixed], "shuffled"
    going = {key for key in range(KEYS) if shuffle.random() < 0.6}
    got = decide(policy, drafter, grouped(mixed, group, seed, going))
    rest = [key for key in mixed if key in going]
    wanted = bare(decide(policy, drafter, grouped(rest, group, seed)))
    assert bare([one for key, one in zip(mixed, got, strict=True) if key in going]) == wanted, "rows that have ended"


@pytest.mark.parametrize("spec", [spec for spec in SPECS if make(spec).scope in ("cycle", "sequence")])
def test_whole_texts_do_not_depend_on_other_groups(spec):
    """The same over many cycles, with the state that a policy carries from one to the next."""
    policy, language = make(spec), Language(5, steps=5)
    lengths = [12, 25, 7, 18, 1, 30, 9]
    texts = [language.truth(key, length) for key, length in enumerate(lengths)]
    drafter, verifier = SyntheticDrafter(language, texts), SyntheticVerifier(texts)
    together = decode(policy, drafter, verifier, lengths, list(range(7)), group=lambda key: key % 2)
    for rows in ([0, 2, 4, 6], [5, 3, 1]):
        alone = decode(policy, drafter, verifier, lengths, rows, group=lambda key: 0)
        assert alone == {key: together[key] for key in rows}


@pytest.mark.parametrize("spec", SPECS)
def test_the_group_matters(spec):
    """Else nothing above is tested."""
    policy, language = make(spec), Language(2, steps=60, quantum=0.125)
    lengths = [30] * 12
    texts = [language.truth(key, length) for key, length in enumerate(lengths)]
    seen = []
    for size in (1, 2, 4, 12):
        drafter, verifier = SyntheticDrafter(language, texts), SyntheticVerifier(texts)
        logs: dict = {}
        for first in range(0, 12, size):
            rows = list(range(first, first + size))
            logs |= decode(policy, drafter, verifier, lengths, rows, group=lambda key: 0)
        seen.append([(step.position, step.decision.kept) for key in range(12) for step in logs[key]])
    assert any(one != seen[0] for one in seen)


def test_batches_by_hand():
    cycle = replace(cycle_at([4, 1, 9, 2, 3], [0, 10, 3, 2, 90]), group=torch.tensor([7, 0, 7, 7, 0]))
    cycle = replace(cycle, active=torch.tensor([True, True, True, True, False]))
    batches = ServingBatches(cycle)
    assert batches.row.tolist() == [[1, -1, -1], [3, 0, 2]] and batches.size.tolist() == [1, 3]
    assert batches.of.tolist() == [1, 0, 1, 1, 0] and batches.context.tolist() == [15, 8]
    score = torch.tensor([[0.0, -1.0, -3.0], [0.0, -9.0, -9.5], [-5.0, -3.0, -torch.inf], [0.0, -1.0, -2.0], [9.0, 9.0, 9.0]])
    entry, value = batches.ranked(score)
    # the second batch is sequences 2, 4, 9: its columns 0 1 2 are row 3's, 3 4 5 row 0's, 6 7 8 row 2's
    assert entry[1].tolist() == [0, 3, 1, 4, 2, 5, 7, 6, -1] and entry[0, :4].tolist() == [0, 1, 2, -1]
    assert value[1, :4].tolist() == [0.0, 0.0, -1.0, -1.0]
    kept = batches.first(entry, torch.tensor([2, 4]), 3)
    assert kept.tolist() == [[True, True, False], [True, True, False], [False] * 3, [True, True, False], [False] * 3]
