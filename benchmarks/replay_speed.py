"""Replayed cycles per second: ``python -m benchmarks.replay_speed [TRACE]``.

Replays whole recorded texts again and again, from a warm page cache and without keeping any result. A recording smaller
than the wanted number of rows is repeated to fill them: each row is computed on its own. Policies take turns, so that
whatever else the machine does meets all of them. Besides the wall clock it counts processor time, which other programs
on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from policies.errors import run_command

SAMPLE = Path(__file__).parents[1] / "traces" / "samples" / "reference"
POLICIES = ("eagle3", str(Path(__file__).parents[1] / "policies" / "fitted" / "heterospec.json"))


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.replay_speed", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", nargs="?", default=str(SAMPLE), help="default: the shipped sample recording")
    parse.add_argument("--policy", action="append", default=[], help="may be repeated (default: eagle3, fitted heterospec)")
    parse.add_argument("--drafter")
    parse.add_argument("--rows", type=int, default=2048, help="texts; the recording's own, repeated (default 2048)")
    parse.add_argument("--part", type=int, help="most texts side by side (default: what replay uses)")
    parse.add_argument("--threads", type=int, help="default: what torch uses in this process")
    parse.add_argument("--rounds", type=int, default=5)
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    import torch

    from policies.registry import load_policy
    from sim import parts
    from sim.replay import replay
    from traces.recording import open_recording

    torch.set_num_threads(args.threads or torch.get_num_threads())
    parts.MOST_ROWS = args.part or parts.MOST_ROWS
    recording = open_recording(args.trace)
    texts = torch.from_numpy((recording.length > 1).nonzero()[0])
    sequences = texts.repeat(-(-args.rows // len(texts)))[: args.rows]
    policies = [load_policy(spec) for spec in args.policy or POLICIES]
    wall: dict[str, list[float]] = {policy.spec(): [] for policy in policies}
    processor: dict[str, list[float]] = {policy.spec(): [] for policy in policies}
    for round_number in range(args.rounds + 1):  # the first one warms up
        for policy in policies:
            started, worked = time.perf_counter(), time.process_time()
            cycles = len(replay(recording, policy, args.drafter, sequences=sequences).sequence)
            if round_number:
                wall[policy.spec()].append(cycles / (time.perf_counter() - started))
                processor[policy.spec()].append(cycles / (time.process_time() - worked))
    print(
        f"{args.rows} texts, at most {parts.MOST_ROWS} side by side, {torch.get_num_threads()} threads; "
        f"median of {args.rounds} rounds (lowest, highest)"
    )
    for spec, values in wall.items():
        busy = statistics.median(processor[spec])
        print(
            f"{spec:40} {statistics.median(values):9,.0f} cycles/s ({min(values):,.0f}, {max(values):,.0f}), "
            f"{busy:9,.0f} per second of processor time"
        )


if __name__ == "__main__":
    run_command(main)
