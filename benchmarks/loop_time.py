"""What the decoding loop takes on the host of a GPU: ``python -m benchmarks.loop_time --policy eagle3 --policy 'chain(k=3)'``.

The shipped pair decodes from CUDA graphs that do nothing: what a GPU would be sent is put together, its answers are read, but they
are those of each graph's first run. So this machine's processor alone is timed, in one thread and without a driver: ms a cycle, the
median and the quartiles over rounds in which the policies take turns. Accepted lengths mean nothing here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

from policies.errors import UserError, run_command

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    from live.decode import SpeculativeDecoder
    from live.pair import Pair
    from policies.contract import Policy
    from policies.cost import Cost

DRAFTER = "eagle3"
PROMPT = [1] * 100
"""Any tokens: nobody looks at them but rules, which find them again."""


class Nothing:
    """A graph that does nothing."""

    def replay(self) -> None:
        pass


def computed_once(compute: Callable[[], Any], *_: object) -> tuple[Nothing, Any]:
    """In place of `live.graphed.record`: the result of one run, and a graph that leaves it as it is."""
    from live.graphed import updates_allowed

    with updates_allowed():
        return Nothing(), compute()


def decoder_of(pair: Pair, policy: Policy, cost: Cost | None, drafter: str = DRAFTER, capacity: int = 1024) -> SpeculativeDecoder:
    """The pair under a policy, with such graphs instead of networks."""
    from live.decode import SpeculativeDecoder
    from live.graphed_pair import graphed

    pair = graphed(pair, capacity)
    drafts = pair.draft(drafter)
    target = pair.target(1, drafts)
    pair.networks[DRAFTER].graphs = target.graphs = True
    return SpeculativeDecoder(target, drafts, policy, (), cost)


def cycle_ms(decoder: SpeculativeDecoder, cycles: int) -> float:
    """Mean milliseconds of a cycle."""
    import torch

    with (
        torch.inference_mode(),
        mock.patch("live.graphed.record", computed_once),
        mock.patch("live.graphed_network.record", computed_once),
    ):
        decoder.prefill([PROMPT], 10 * cycles)
        decoder.step()  # before the clock starts: what is looked up for the first time
        began = time.perf_counter()
        for _ in range(cycles):
            decoder.step()
        return 1e3 * (time.perf_counter() - began) / cycles


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks.loop_time", description=__doc__.split(":")[0])
    parse.add_argument("--policy", action="append", required=True, help="a policy; several times for several")
    parse.add_argument("--drafter", default=DRAFTER, help=f"{DRAFTER} (default), a training-free rule, or RULE+{DRAFTER}")
    parse.add_argument("--profile", help="profile of the machine, for policies that want prices")
    parse.add_argument("--cycles", type=int, default=50, help="cycles of one timing (default 50)")
    parse.add_argument("--rounds", type=int, default=20, help="timings of each policy (default 20)")
    return parse


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.cycles < 1 or args.rounds < 2:
        raise UserError("a spread needs --cycles of 1 or more and --rounds of 2 or more")
    import torch

    from live.pair import load_pair
    from policies.registry import load_policy
    from traces.costs import load_profile

    torch.set_num_threads(1)
    cost = load_profile(args.profile).cost(args.drafter) if args.profile else None
    pair = load_pair("reference", [f"reference/{DRAFTER}"])
    decoders = {spec: decoder_of(pair, load_policy(spec), cost, args.drafter) for spec in args.policy}
    found: dict[str, list[float]] = {spec: [] for spec in decoders}
    for turn in range(args.rounds + 1):
        for spec, decoder in decoders.items():
            took = cycle_ms(decoder, args.cycles)
            if turn:
                found[spec].append(took)
    wide = max(len("policy"), *map(len, found))
    print(f"{'policy':{wide}}  {'ms a cycle':>10}  {'quartiles':>14}")
    for spec, times in found.items():
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"{spec:{wide}}  {middle:10.3f}  {f'{low:.3f} - {high:.3f}':>14}")
    return 0


if __name__ == "__main__":
    run_command(main)
