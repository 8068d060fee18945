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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from benchmarks.gpu.results import Clock, Job, Results
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
    parse.add_argument("--skip", action="append", default=[], metavar="JOB", help="leave out 'STAGE: JOB'; may be repeated")
    parse.add_argument("--rehearse", action="store_true", help="everything at toy size on the CPU")
    return parse


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.budget <= 0:
        raise UserError(f"--budget is {args.budget:g}: give the seconds that may be spent")
    from benchmarks.gpu.anew import Anew, go_on
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
        try:
            failed += run_stage(stage, setting, Results(args.out, stage, about), clock, args.skip)
        except Anew as end:
            say(f"the GPU is of no more use to this process ({end})")
            if clock.left < 1:
                return 1
            say(f"going on in a new one, {clock.left:.0f} s left")
            go_on(words_of(args, clock.left, args.skip + [end.skip] * bool(end.skip)))
        except Exception as error:  # its file is another machine's, say: no reason to leave out the other stages
            say(f"{stage}: {type(error).__name__}: {error}")
            failed += 1
    print(f"results in {args.out}; tables: python -m benchmarks.gpu.report {args.out}")
    return 1 if failed else 0


def words_of(args: argparse.Namespace, left: float, skip: list[str]) -> list[str]:
    """The same command, for what is left of its budget and without some jobs."""
    words = ["--out", str(args.out), "--budget", f"{left:.1f}"] + ["--rehearse"] * args.rehearse
    words += ["--device", args.device] if args.device else []
    words += ["--corpus", str(args.corpus)] if args.corpus else []
    given = {"--stage": args.stage or (), "--skip": skip}
    return words + [word for name, values in given.items() for value in values for word in (name, value)]


def run_stage(stage: str, setting: Setting, results: Results, clock: Clock, skip: list[str] | None = None) -> int:
    """Run what is not done yet and fits into the time that is left; how many jobs failed.

    :param skip: jobs to leave out, as "STAGE: JOB".
    :raises Anew: when the rest needs a new process.
    """
    failed = 0
    for job in importlib.import_module(f"benchmarks.gpu.{stage}").jobs(setting):
        if results.has(job.name) or f"{stage}: {job.name}" in (skip or ()):
            continue
        if clock.left < setting.pick(job.least, 0.0):
            say(f"{stage}: {job.name} needs {job.least:.0f} s, {clock.left:.0f} are left: next time")
            continue
        started, limit = time.monotonic(), min(clock.left, job.most)
        result = outcome(job, limit, setting.pick(limit, 0.0))
        took = time.monotonic() - started
        result = kept(results, job.name, result | {"seconds": round(took, 1)})  # before anything else is asked of the GPU
        failed += "error" in result
        say(f"{stage}: {job.name} {result.get('error', 'done')} ({took:.1f} s, {clock.left:.0f} left)")
        leave_clean(f"{stage}: {job.name}", setting)
    return failed


def outcome(job: Job, limit: float, alarm: float) -> dict[str, Any]:
    """What a job finds within ``limit`` seconds, or its error: one job's failure must not cost the minutes of the others.

    :param alarm: when to stop it, in seconds; 0: never.
    """
    from benchmarks.gpu.results import OutOfTime, no_longer_than
    from live.graphed import failed_captures

    try:
        with no_longer_than(alarm):
            result = job.run(limit)
        # decoding survives what its draft does, and what is measured then is something else
        return {"error": f"a capture failed: {failed_captures[0]}"} if failed_captures else result
    except OutOfTime:
        return {"error": f"took longer than {limit:.0f} s"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def kept(results: Results, name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Write a result, or the reason why it cannot be written; what was."""
    try:
        results.keep(name, result)
    except Exception as error:
        result = {"error": f"its result cannot be kept: {type(error).__name__}: {error}"[:2000], "seconds": result["seconds"]}
        results.keep(name, result)
    return result


def leave_clean(job: str, setting: Setting) -> None:
    """Give memory back behind a job.

    :raises Anew: when this process can do nothing more on its GPU.
    """
    from benchmarks.gpu.anew import Anew, unusable
    from benchmarks.gpu.setting import free_memory
    from live.graphed import failed_captures

    if failed_captures:  # memory cannot be given back behind one
        setting.leave_graphs_out(failed_captures[0])
        raise Anew(unusable(setting.device))
    try:
        free_memory()
        why = unusable(setting.device)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:300]
    if why:
        raise Anew(why, job)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main, "What is measured is safe; go on with the same command.")
