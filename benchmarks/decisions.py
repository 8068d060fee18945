"""What deciding takes: ``python -m benchmarks.decisions TRACE --policy A --policy B``.

Milliseconds per cycle that a policy spends in its own code (begin, expand, select, observe), for a request that decodes alone.
Recorded texts are replayed one by one, in one thread, with a clock around those calls. Policies take turns text by text, so
that whatever else the machine does meets all of them; the figure is the median over texts and rounds, in processor time, which
other programs disturb less than the wall clock.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from policies.errors import check_counts, run_command

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    from policies.contract import Policy
    from policies.cost import Cost
    from traces.recording import Recording

CALLS = ("begin", "expand", "select", "observe")


class Decisions(NamedTuple):
    """Milliseconds per cycle in one policy's own code: the median, and the quartiles around it."""

    ms: float
    low: float
    high: float


def decision_times(
    recording: Recording,
    policies: Sequence[Policy],
    drafter: str,
    cost: Cost | None,
    texts: Sequence[int],
    rounds: int = 3,
    on_text: Callable[[], Any] = lambda: None,
) -> list[Decisions]:
    """The decision time of each policy, in order.

    :param texts: indices of the texts to decode; those of one token are left out.
    :param rounds: how often each is decoded by every policy; one more round warms up.
    :param on_text: called whenever all policies have decoded a text, for progress.
    """
    import torch

    from sim.looked_up import replayed_drafter
    from sim.recorded import RecordedText
    from sim.replay import ReplayRun

    text = RecordedText(recording)
    clocks = [_Clock(policy) for policy in policies]
    runs = [ReplayRun(recording, text, replayed_drafter(recording, drafter, text), clock.policy, cost) for clock in clocks]
    seen: list[list[float]] = [[] for _ in policies]
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for index in (index for index in texts if recording.length[index] > 1):
                for clock, run, mine in zip(clocks, runs, seen, strict=True):
                    clock.seconds, cycles = 0.0, 0
                    run.start(torch.tensor([index]))
                    while run.step() is not None:
                        cycles += 1
                    if turn:
                        mine.append(1e3 * clock.seconds / cycles)
                on_text()
    return [_summary(mine) for mine in seen]


class _Clock:
    """A copy of a policy whose own calls are timed, and the seconds they took."""

    def __init__(self, policy: Policy):
        from policies.contract import Policy

        self.seconds, self.policy = 0.0, copy.copy(policy)
        for name in CALLS:
            if getattr(type(policy), name) is not getattr(Policy, name):  # in the copy's own dictionary: policies are frozen
                vars(self.policy)[name] = self._timed(getattr(policy, name))

    def _timed(self, call: Callable) -> Callable:
        def measured(*args: Any) -> Any:
            started = time.thread_time()
            result = call(*args)
            self.seconds += time.thread_time() - started
            return result

        return measured


def _summary(values: list[float]) -> Decisions:
    if len(values) < 2:
        return Decisions(*(values or [float("nan")]) * 3)
    low, middle, high = statistics.quantiles(values, n=4)
    return Decisions(middle, low, high)


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", help="a recording's folder")
    parse.add_argument("--policy", action="append", required=True, help="name, name(...), JSON or file.py:Class; repeat it")
    parse.add_argument("--drafter", help="the recorded drafter (default: the first)")
    parse.add_argument("--profile", metavar="FILE", help="what time costs, for policies that weigh it")
    parse.add_argument("--texts", type=int, default=8, metavar="N", help="texts to decode (default 8)")
    parse.add_argument("--rounds", type=int, default=3, metavar="N", help="times each is decoded (default 3)")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    check_counts(("--texts", args.texts), ("--rounds", args.rounds))
    import torch

    from policies.registry import load_policy
    from sim.opening import open_profile, open_sound
    from sim.table import text_table

    torch.set_num_threads(1)
    recording, drafter = open_sound(args.trace, args.drafter)
    policies = [load_policy(spec) for spec in args.policy]
    for policy in policies:
        policy.check_fitted()
    cost = open_profile(args.profile, recording, drafter).cost(drafter) if args.profile else None
    step = max(len(recording.length) // args.texts, 1)
    found = decision_times(recording, policies, drafter, cost, range(0, len(recording.length), step)[: args.texts], args.rounds)
    rows = [[spec, f"{one.ms:.3f}", f"{one.low:.3f} .. {one.high:.3f}"] for spec, one in zip(args.policy, found, strict=True)]
    print(text_table(["policy", "ms per cycle", "quartiles"], rows))


if __name__ == "__main__":
    run_command(main)
