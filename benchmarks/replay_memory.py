"""Peak memory of a replay by the recording's size: ``python -m benchmarks.replay_memory [TRACE]``.

Repeats a recording's texts to 10, 50 and 200 thousand positions, and runs the product's own commands on each, in processes of
their own: opening for the first time (which makes the cache), a replay, and a sweep of a family. Printed is the largest resident
set that the system saw, mapped files included. Bound by ``--memory``, it should not grow with the recording. What does grow is
small: some hundred bytes of sums per text and, for intervals, 8 bytes per text and bootstrap draw (100 here, 2000 by default).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from policies.errors import UserError, run_command

SAMPLE = Path(__file__).parents[1] / "traces" / "samples" / "reference"
POSITIONS = (10_000, 50_000, 200_000)
MAKE = "import sys; from benchmarks.repeated import repeat; repeat(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
"""In a process of its own: the system counts what the parent holds when a child starts as the child's."""
GRID = ("depth=2,5,8", "total_tokens=8,24,60")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.replay_memory", description=__doc__.split("\n")[0])
    parse.add_argument(
        "trace", metavar="TRACE", nargs="?", default=str(SAMPLE), help="whose texts are repeated (default: the sample)"
    )
    parse.add_argument("--positions", type=int, nargs="+", default=list(POSITIONS), metavar="N", help="counted tokens")
    parse.add_argument("--memory", type=int, default=64, metavar="MIB", help="what a replay may hold of the recording (default 64)")
    parse.add_argument(
        "--work", type=Path, metavar="DIR", help="where the recordings are made, and deleted (default: a temporary folder)"
    )
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    print(f"--memory {args.memory}; peak resident set in MiB, mapped files included")
    print(f"{'positions':>10} {'on disk':>9} {'opened':>8} {'eagle3':>8} {'online':>8} {'sweep':>8}")
    work = Path(tempfile.mkdtemp(prefix="repeated-", dir=args.work))
    try:
        for positions in args.positions:
            folder = work / str(positions)
            peak(["-c", MAKE, args.trace, str(folder), str(positions)])
            opening = "import sys; from traces.recording import open_recording; open_recording(sys.argv[1])"
            opened = peak(["-c", opening, str(folder)])
            mapped = sum(path.stat().st_size for path in (folder / ".cache").rglob("*.npy"))
            limit = ["--memory", str(args.memory), "--resamples", "100"]
            replayed = [peak(["-m", "sim.replay", str(folder), "--policy", spec, *limit]) for spec in ("eagle3", "ucbspec")]
            sweep = [
                "-m",
                "sim.sweep",
                str(folder),
                "--policy",
                "eagle3",
                "--grid",
                *GRID,
                "--out",
                str(work / f"{positions}-sweep"),
            ]
            peaks = [opened, *replayed, peak([*sweep, *limit])]
            print(f"{positions:10,} {mapped / 2**20:9,.0f} " + " ".join(f"{each:8,.0f}" for each in peaks), flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def peak(words: list[str]) -> float:
    """Runs Python with these words; the largest resident set that it had, in MiB."""
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen([sys.executable, *words], stdout=told, stderr=told)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise UserError(f"python {' '.join(words[:3])} failed: {told.read().decode()[-500:]}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    run_command(main)
