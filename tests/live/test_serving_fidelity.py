"""Batch-wide policies decode live as they replay: two prompts side by side in float64, every cycle, what they learned included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from live.decode import SpeculativeDecoder
from live.pair import Pair
from policies.contract import Policy
from policies.loop import Step
from policies.registry import load_policy
from policies.tetris import Tetris
from sim.looked_up import replayed_drafter
from sim.recorded import RecordedText
from sim.replay import ReplayRun
from tests.policies.synthetic import Priced
from traces.recording import Recording, open_recording

TETRIS = "tetris(k=2, extra=2)"
CASES = [
    (TETRIS, "draft"),
    ("adaptive_verification(warm_up=0, refit=3, most=4)", "draft"),
    ("d_cut(k=4)", "draft"),
    ("smartspec(most=5, smoothing=0.3)", "draft"),
    ("evict(total_tokens=20, depth=3, top_k=4)", "eagle3"),
]
MORE = [
    ("tensorrt_llm(schedule=((1, 3), (2, 2)), window=6, threshold=0.3)", "draft"),
    ("sglang_ema(tiers=((1, (1, 3), -0.25), (2, (0, 2, 4), 0.0)), warm_up=2, interval=2)", "draft"),
    ("sglang_throughput(tiers=((1, (1, 3)), (2, (1, 2, 4))), window=3, interval=2)", "draft"),
    ("cascade(most=3, samples=1, hold=4)", "draft"),
]


def differing_cycles(recording: Recording, pair: Pair, decided: Policy, drafter: str, live_policy: Policy | None = None):
    """(cycles that differ, cycles, nodes that the recording lacked), all texts two by two."""
    text, limit, cost = RecordedText(recording), recording.manifest["context_limit"], Priced()
    run = ReplayRun(recording, text, replayed_drafter(recording, drafter, text), decided, cost)
    decoder = SpeculativeDecoder(
        pair.target(), pair.draft(drafter), live_policy or decided, pair.end_tokens, cost=cost, context_limit=limit
    )
    differ = cycles = missing = 0
    carried = None
    for rows in (text.length > 1).nonzero()[:, 0].split(2):
        prompts = [recording.prompt_tokens(row).tolist() for row in rows.tolist()]
        decoder.prefill(prompts, text.length[rows].tolist(), sequence=rows, told_limit=int(text.limit.max()))
        run.start(rows, state=carried)
        while (recorded := run.step()) is not None:
            live = decoder.step()
            cycles += len(recorded.row)
            missing += int(recorded.done.draft.missing.sum())
            if not same(live, recorded):
                differ += 1
                break  # the two runs are apart now
        carried = run.state if decided.scope == "stream" else None
    return differ, cycles, missing


def same(live: Step | None, recorded: Step) -> bool:
    if live is None or len(live.row) != len(recorded.row):
        return False
    one, two = live.done, recorded.done
    pairs = [(live.cycle.sequence, recorded.cycle.sequence), (live.cycle.position, recorded.cycle.position)]
    pairs += [(live.cycle.group, recorded.cycle.group), (one.draft.widths, two.draft.widths)]
    pairs += [(one.kept.token, two.kept.token), (one.kept.parent, two.kept.parent)]
    pairs += [(one.walk.path, two.walk.path), (live.gained, recorded.gained)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("spec, drafter", [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)])
def test_two_prompts_side_by_side(tiny_recording: Path, pair64: Pair, spec: str, drafter: str):
    differ, cycles, missing = differing_cycles(open_recording(tiny_recording), pair64, load_policy(spec), drafter)
    assert (differ, missing) == (0, 0) and cycles >= 24


def test_a_live_loop_that_hands_out_other_groups_is_noticed(tiny_recording: Path, pair64: Pair):
    class Alone(Tetris):
        """Sees every row as a batch of its own."""

        def begin(self, cycle, state):
            return super().begin(replace(cycle, group=cycle.sequence), state)

        def select(self, tree, cycle, state):
            return super().select(tree, replace(cycle, group=cycle.sequence), state)

    policy = load_policy(TETRIS)
    differ, _, _ = differing_cycles(open_recording(tiny_recording), pair64, policy, "draft", Alone(policy.k, policy.extra))
    assert differ > 0
