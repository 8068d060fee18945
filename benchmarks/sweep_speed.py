"""Time of a whole sweep: ``python -m benchmarks.sweep_speed [TRACE]``: 231 settings of EAGLE-3 over 100,000 positions.

A recording's texts are repeated to that length, opened once so that its cache is there, and swept by ``python -m sim.sweep`` in a
process of its own, from its start to the table on the screen: prices, intervals and results.parquet included.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.repeated import repeat
from policies.errors import UserError, run_command

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "traces" / "samples" / "reference"
PROFILE = ROOT / "traces" / "profiles" / "a100_llama-3.1-8b.json"
GRID = ("depth=2:12", "total_tokens=8,16,24,32,48,60,80", "top_k=4,8,10")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.sweep_speed", description=__doc__.split("\n")[0])
    parse.add_argument(
        "trace", metavar="TRACE", nargs="?", default=str(SAMPLE), help="whose texts are repeated (default: the sample)"
    )
    parse.add_argument("--positions", type=int, default=100_000, metavar="N", help="counted tokens (default 100,000)")
    parse.add_argument("--profile", default=str(PROFILE), metavar="FILE", help="what prices it (default: an analytic A100)")
    parse.add_argument("--grid", nargs="+", default=list(GRID), metavar="P=VALUES")
    parse.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default 2)")
    parse.add_argument(
        "--work", type=Path, metavar="DIR", help="where the recording is made, and deleted (default: a temporary folder)"
    )
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    from sim.gridpoints import parse_grid, points_of
    from traces.recording import open_recording

    settings = len(points_of("eagle3", parse_grid(args.grid)))
    work = Path(tempfile.mkdtemp(prefix="repeated-", dir=args.work))
    try:
        recording = open_recording(repeat(args.trace, work / "trace", args.positions))
        words = [sys.executable, "-m", "sim.sweep", str(work / "trace"), "--policy", "eagle3", "--grid", *args.grid]
        words += ["--profile", args.profile, "--other-models", "--jobs", str(args.jobs), "--out", str(work / "sweep")]
        started = time.perf_counter()
        found = subprocess.run(words, capture_output=True, text=True)
        wall = time.perf_counter() - started
        if found.returncode:
            raise UserError(f"the sweep failed: {found.stderr[-500:]}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    busy = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{settings} settings over {int(recording.length.sum()):,} positions of {len(recording.length):,} texts (repeated), "
        f"{args.jobs} jobs: {wall:.1f} s ({busy.ru_utime + busy.ru_stime:.1f} s of processor time)"
    )


if __name__ == "__main__":
    run_command(main)
