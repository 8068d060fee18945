"""Is the simulator right about this machine? ``python -m benchmarks.validation --work DIR``: profile, bench, validate.

Measures the pair's profile, decodes a recording's texts live under settings that the profile was not built with, in three
interleaved rounds between which the profile is measured again (policies decide by the first and are priced by the second), and
compares with the prediction: the three commands that anybody would give, one after the other, with DIR holding what each wrote.
Takes minutes, and means something only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from policies.errors import UserError, check_counts, run_command

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "traces" / "samples" / "reference"
FITTED = ROOT / "policies" / "fitted"
SETTINGS = (
    "autoregressive",
    "chain(k=1)",
    "chain(k=3)",
    "chain(k=5)",
    "static(tree=medusa)",
    "eagle3",
    "eagle3(total_tokens=4, depth=2, top_k=4)",
    "eagle3(total_tokens=8, depth=3, top_k=4)",
    "eagle3(total_tokens=8, depth=4, top_k=8)",
    "eagle3(total_tokens=16, depth=5, top_k=8)",
    "eagle3(total_tokens=24, depth=4, top_k=10)",
    "eagle3(total_tokens=32, depth=6, top_k=10)",
    "eagle3(total_tokens=48, depth=5, top_k=10)",
    "eagle3(total_tokens=60, depth=10, top_k=10)",
    str(FITTED / "heterospec.json"),
    str(FITTED / "goodput.json"),
)
"""Cheap and dear ones; the last two decide while they draft, by rules that take time of their own."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.validation", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", nargs="?", default=str(SAMPLE), help="a recording (default: the shipped sample)")
    parse.add_argument("--work", type=Path, required=True, metavar="DIR", help="where profile, bench and comparison go")
    parse.add_argument("--profile", metavar="FILE", help="take this one instead of measuring")
    parse.add_argument("--policy", action="append", default=[], metavar="SPEC", help="may be repeated (default: sixteen settings)")
    parse.add_argument("--texts", type=int, default=2, metavar="N", help="per domain (default 2)")
    parse.add_argument("--rounds", type=int, default=3, metavar="N", help="(default 3)")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    check_counts(("--texts", args.texts), ("--rounds", args.rounds))  # before minutes of measuring
    from traces.recording import open_recording

    about = open_recording(args.trace).manifest
    try:
        args.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {args.work} ({error.strerror}): name another folder with --work") from None
    profile, turns, bench, found = (args.work / f"{name}.json" for name in ("profile", "in_turns", "bench", "validation"))
    if args.profile is None:
        pair = ["--target", about["target"]["id"], "--dtype", about["dtype"]]
        pair += [word for drafter in about["drafters"] for word in ("--draft", drafter["id"])]
        run("traces.profile", *pair, "--out", str(profile), "--overwrite")
    chosen = [word for spec in args.policy or SETTINGS for word in ("--policy", spec)]
    measured = ["--texts", str(args.texts), "--rounds", str(args.rounds), "--json", str(bench), "--in-turns", str(turns)]
    run("live.bench", args.trace, "--profile", args.profile or str(profile), *measured, *chosen)
    run("sim.validate", str(bench), "--json", str(found))


def run(module: str, *words: str) -> None:
    """One of the product's commands, in a process of its own."""
    print("\n$", shlex.join(["python", "-m", module, *words]), flush=True)
    if subprocess.run([sys.executable, "-m", module, *words]).returncode:
        raise UserError(f"{module} failed, as it says above: mend that, and run this again")


if __name__ == "__main__":
    run_command(main)
