"""Measure on a GPU, stage by stage: ``python -m benchmarks.gpu.run --budget 1500 --out build/gpu``.

A stage is a list of jobs; each job's result is written when it is done, and the same command goes on where the last one
stopped. A job starts only if what it needs is left of the budget. Nothing of the GPU's settings is touched.
``--rehearse`` runs everything on the CPU at toy size in a few minutes: its numbers mean nothing, and say so.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from benchmarks.gpu.results import Clock, Results
    from benchmarks.gpu.setting import Setting

STAGES = {
    "check": "the machine; CUDA graphs against plain calls; the embedded pair against the small one",
    "sample": "the recordings of the shipped pair that are brought home",
    "profiles": "a profile of the live classes at LLaMA-3.1-8B's size, random weights",
    "cost": "what recording costs, beside model.generate",
    "fidelity": "replay against decoding on this device: float64, float32, bfloat16",
    "recording": "recordings of the shipped pair, all of them",
    "contest": "policies at true cost: the small pair's text at LLaMA-3.1-8B's price",
    "contest16": "the same with sixteen requests side by side; needs the contest's recording",
    "passes": "a target's forward at true size by tokens, context and batch, with and without CUDA graphs",
    "others": "profiles behind long contexts, of larger batches, without CUDA graphs, and of Vicuna-13B",
    "sibling": "a larger target and its EAGLE-3 head, trained here",
}
"""In the order in which they run: what is most wanted comes first."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=__doc__.split("\n")[0])
    told = "; ".join(f"{name}: {what}" for name, what in STAGES.items())
    parse.add_argument("--stage", action="append", choices=STAGES, metavar="NAME", help=f"may be repeated (default: all). {told}")
    parse.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="time to keep to (default 540)")
    parse.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for result files; what is there is not done again"
    )
    parse.add_argument("--device", help="default: cuda, or cpu in a rehearsal")
    parse.add_argument("--corpus", type=Path, metavar="DIR", help="training text for the sibling (live/reference/README.md)")
    parse.add_argument("--rehearse", action="store_true", help="everything at toy size on the CPU")
    return parse


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.budget <= 0:
        raise UserError(f"--budget is {args.budget:g}: give the seconds that may be spent")
    from benchmarks.gpu.results import Clock, Results
    from benchmarks.gpu.setting import Setting
    from live.loading import parse_device, steady_attention

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it
    clock = Clock(args.budget)
    device = args.device or ("cpu" if args.rehearse else "cuda")
    steady_attention(parse_device(device))
    setting = Setting(device, args.out, args.rehearse, args.corpus)
    setting.work.mkdir(parents=True, exist_ok=True)
    about = setting.about()
    failed = 0
    for stage in args.stage or STAGES:
        failed += run_stage(stage, setting, Results(args.out, stage, about), clock)
    print(f"results in {args.out}; tables: python -m benchmarks.gpu.report {args.out}")
    return 1 if failed else 0


def run_stage(stage: str, setting: Setting, results: Results, clock: Clock) -> int:
    """Run what is not done yet and fits into the time that is left; how many jobs failed."""
    from benchmarks.gpu.setting import free_memory

    failed = 0
    for job in importlib.import_module(f"benchmarks.gpu.{stage}").jobs(setting):
        if results.has(job.name):
            continue
        if clock.left < setting.pick(job.least, 0.0):
            say(f"{stage}: {job.name} needs {job.least:.0f} s, {clock.left:.0f} are left: next time")
            continue
        started, limit = time.monotonic(), min(clock.left, job.most)
        try:
            with no_longer_than(setting.pick(limit, 0.0)):
                result = job.run(limit)
        except OutOfTime:
            result = {"error": f"took longer than {limit:.0f} s"}
            failed += 1
        except Exception as error:  # one job's failure must not cost the minutes of the others
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
            failed += 1
        free_memory()
        took = time.monotonic() - started
        results.keep(job.name, result | {"seconds": round(took, 1)})
        say(f"{stage}: {job.name} {result.get('error', 'done')} ({took:.1f} s, {clock.left:.0f} left)")
    return failed


class OutOfTime(BaseException):
    """Raised in a job that overruns; no Exception, as decoding survives those of a draft."""


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raise OutOfTime within the block once it has taken ``seconds`` (0: never)."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main, "What is measured is safe; go on with the same command.")
