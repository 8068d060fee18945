"""The contest itself: groups of texts decoded by everyone in turns, and what the replay of the same texts predicts."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.results import Clock, as_far_as_time_goes
from live.decode import SpeculativeDecoder
from live.decoding_plain import plain_decode
from live.model import CachedModel
from live.pair import Pair
from policies.contract import Policy, Sampling
from policies.errors import UserError

if TYPE_CHECKING:
    from traces.costs import CostModel
    from traces.recording import Recording


def decode_live(
    pair: Pair,
    policies: dict[str, Policy],
    recording: Recording,
    cost: CostModel,
    texts: list[int],
    batch: int,
    most: tuple[int, int],
    seconds: float,
    ordinary: Pair | None = None,
) -> dict[str, Any]:
    """Decode groups of ``batch`` texts with everyone in turns; one entry per contender, group and round.

    :param pair: in fixed shapes.   :param ordinary: the same pair as it is, where that is to take part, too.
    :param texts: at one temperature, in the order in which they form groups.   :param most: groups and rounds, at most.
    """
    clock = Clock(seconds)
    groups = [texts[start : start + batch] for start in range(0, len(texts) - batch + 1, batch)][: most[0]]
    if not groups:
        raise UserError(f"{len(texts)} texts make no batch of {batch}: record more for the contest")
    runs = contenders(pair, policies, recording, cost, batch)
    if ordinary:
        runs |= {f"{name}, no graphs": run for name, run in contenders(ordinary, policies, recording, cost, batch).items()}
    for run in runs.values():  # captures graphs, and warms every shape, before anything is timed
        for group in groups:
            run(group)
    entries, rounds = in_turns(runs, groups, most[1], clock)
    if not entries:
        raise UserError(f"nobody was timed within {seconds:.0f} s, captures took them: give the stage more --budget")
    timed = [group for number, group in enumerate(groups) if number in {entry["group"] for entry in entries}]
    predicted: dict[str, Any] = {}
    with as_far_as_time_goes():
        for name, policy in policies.items():
            predicted[name] = prediction(recording, policy, cost, timed, batch)
    return {
        "batch": batch,
        "rounds": rounds,
        "groups": [[int(recording.sequence_ids[text]) for text in group] for group in groups],
        "specs": {name: policy.spec() for name, policy in policies.items()},
        "measured": entries,
        "predicted": predicted,
    }


def in_turns(runs: dict[str, Any], groups: list[list[int]], most: int, clock: Clock) -> tuple[list[dict[str, Any]], int]:
    """One entry per contender, group and round, in an order drawn anew for each group, and how many rounds were whole.

    A round begins only if there is time for one as long as the longest. Where the time runs out all the same, groups that everyone
    has decoded count, and the one in hand does not.
    """
    entries: list[dict[str, Any]] = []
    draw, names, rounds, longest = random.Random(0), list(runs), 0, 0.0
    with as_far_as_time_goes():
        while rounds < most and (not rounds or clock.left > 1.2 * longest):
            begun = clock.left
            for number, group in enumerate(groups):
                draw.shuffle(names)
                entries += [{"contender": name, "group": number, "round": rounds} | runs[name](group) for name in names]
            rounds, longest = rounds + 1, max(longest, begun - clock.left)
    return entries, rounds


def across_domains(recording: Recording, texts: list[int]) -> list[int]:
    """The texts, one of each domain after the other."""
    order = {
        text: sum(recording.domain_index[text] == recording.domain_index[other] for other in texts if other < text)
        for text in texts
    }
    return sorted(texts, key=lambda text: (order[text], int(recording.domain_index[text])))


def contenders(pair: Pair, policies: dict[str, Policy], recording: Recording, cost: CostModel, batch: int) -> dict[str, Any]:
    """Everyone by name: decodes a group of texts; tokens after the first ones, cycles, milliseconds without prefill.

    All policies share one target: several caches would not fit side by side.
    """
    target, limit = pair.target(batch), recording.manifest["context_limit"]

    def speculative(policy: Policy) -> Any:
        decoder = SpeculativeDecoder(target, pair.draft("eagle3"), policy, pair.end_tokens, cost, limit)

        def run(group: list[int]) -> dict[str, Any]:
            done = decoder.generate(
                *asked(recording, group), sampling=sampled(recording, group), text=numbers(recording, group)
            )
            if done.draft_error:
                raise RuntimeError(done.draft_error)
            tokens = sum(map(len, done.tokens)) - len(group)
            return {"tokens": tokens, "cycles": sum(done.cycles), "steps": max(done.cycles), "ms": round(done.decode_ms, 4)}

        return run

    def plain(target: CachedModel) -> Any:
        def run(group: list[int]) -> dict[str, Any]:
            prompts, limits = asked(recording, group)
            clock: list[float] = []
            target.reset(len(group))
            with torch.inference_mode():
                said = plain_decode(
                    target, prompts, limits, pair.end_tokens, lambda *_: clock.append(time.perf_counter()),
                    sampled(recording, group), [int(recording.uniform_keys[text]) for text in group],
                )  # fmt: skip
            first = clock[len(group) - 1]  # by then prefill has given every row its first token
            count = sum(map(len, said)) - len(group)
            return {"tokens": count, "cycles": count, "steps": max(map(len, said)) - 1, "ms": round(1e3 * (clock[-1] - first), 4)}

        return run

    return {name: speculative(policy) for name, policy in policies.items()} | {"plain": plain(pair.plain(batch))}


def asked(recording: Recording, group: list[int]) -> tuple[list[list[int]], list[int]]:
    """Prompts and token limits of a group."""
    return [recording.prompt_tokens(text).tolist() for text in group], [int(recording.length[text]) for text in group]


def sampled(recording: Recording, group: list[int]) -> Sampling:
    """How the group's texts were sampled: all alike."""
    return Sampling(**recording.sampling(group[0]))


def numbers(recording: Recording, group: list[int]) -> torch.Tensor:
    return torch.tensor([int(recording.uniform_keys[text]) for text in group])


def prediction(recording: Recording, policy: Policy, cost: CostModel, groups: list[list[int]], batch: int) -> dict[str, float]:
    """Replay of the groups under the policy: tau, coverage, and milliseconds per token of all requests together."""
    from sim.setting import Setting as Circumstances
    from sim.trial import run_trial

    setting = Circumstances("eagle3", batch=batch, schedule="fixed")  # as the groups are decoded: nobody joins
    sums = dict.fromkeys(("emitted", "cycles", "machine_ms", "covered", "kept", "levels"), 0.0)
    for group in groups:
        tally = run_trial(recording, policy, setting, cost, torch.tensor(group))
        for name in sums:
            sums[name] += float(tally.sums[name].sum())
    per_cycle = {name: round(sums[name] / sums["cycles"], 4) for name in ("covered", "kept", "levels")}
    coverage = per_cycle.pop("covered")
    tau, ms = sums["emitted"] / sums["cycles"], sums["machine_ms"] / sums["emitted"]
    return {"tau": round(tau, 4), "ms_per_token": round(ms, 5), "coverage": coverage, **per_cycle}


def capacity_for(recording: Recording) -> int:
    """Cache slots for the longest recorded text with a tree, rounded up."""
    longest = max(len(recording.prompt_tokens(text)) + int(recording.length[text]) for text in range(len(recording.length)))
    return -(-(longest + 256) // 128) * 128
