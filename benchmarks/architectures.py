"""Fidelity over architectures, drafters and temperatures: ``python -m benchmarks.architectures``.

A tiny random pair of each architecture is recorded in float64, greedy and sampled, and every cycle of two policies is decoded
again with the real networks: the table says how many cycles were identical, of how many.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from policies.errors import UserError, run_command

DRAFTERS = ("eagle3", "draft", "prompt_lookup", "suffix", "racer")
TEMPERATURES = (0.0, 1.0)
PROMPTS = ("the cat sat", "once upon a time a dog ran home")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__.split("\n")[0])
    parse.add_argument("--family", action="append", default=[], help="may be repeated (default: all, see tests/live/families.py)")
    parse.add_argument("--max-new-tokens", type=int, default=24)
    return parse


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    from tests.live.families import QUICK, SLOW

    families = args.family or [*SLOW, *QUICK]
    if unknown := [family for family in families if family not in (*QUICK, *SLOW)]:
        raise UserError(f"unknown family '{unknown[0]}': choose out of {', '.join([*SLOW, *QUICK])}")
    print("identical / all cycles, float64, greedy and at temperature 1")
    print(f"{'':14}" + "".join(f"{drafter:>24}" for drafter in DRAFTERS))
    failed = 0
    for family in families:
        counts = check(family, args.max_new_tokens)
        cells = ""
        for drafter in DRAFTERS:
            told = ["/".join(map(str, counts[drafter, temperature])) for temperature in TEMPERATURES]
            cells += f"{'  '.join(told):>24}"
        print(f"{family:14}{cells}", flush=True)
        failed += sum(cycles - identical for identical, cycles in counts.values())
    print("every cycle is identical" if not failed else f"{failed} CYCLES DIFFER")
    return 1 if failed else 0


def check(family: str, tokens: int) -> dict[tuple[str, float], tuple[int, int]]:
    """(identical, all) cycles of one architecture by drafter and temperature, over all policies of the tests."""
    from live.fidelity import check_policy
    from live.pair import load_pair
    from policies.registry import load_policy
    from tests.live.families import POLICIES, write_pair
    from traces.record import main as record
    from traces.recording import open_recording

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target, eagle3, draft = write_pair(family, folder)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
        models = ["--target", target, "--draft", eagle3, "--draft", draft, "--dtype", "float64"]
        size = ["--max-new-tokens", str(tokens), "--batch", "2", "--top-m", "8", "--positions", "16", "--seed", "5"]
        groups = [word for temperature in TEMPERATURES for word in ("--temperature", str(temperature))]
        cover = [word for spec in POLICIES for word in ("--cover", spec)]
        with contextlib.redirect_stdout(io.StringIO()):
            record([*models, "--prompts", f"story={prompts}", *size, *groups, *cover, "--out", str(folder / "trace")])
        recording = open_recording(folder / "trace", verify=True)
        pair = load_pair(target, [eagle3, draft], "float64")
        counts = {}
        for drafter in DRAFTERS:
            for temperature in TEMPERATURES:
                reports = [check_policy(recording, pair, load_policy(spec), drafter, 10_000, temperature) for spec in POLICIES]
                counts[drafter, temperature] = sum(one.identical for one in reports), sum(one.cycles for one in reports)
    return counts


if __name__ == "__main__":
    run_command(main)
