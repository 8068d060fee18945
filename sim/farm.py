"""Points of a sweep on several processes: joblib's on this machine, or a Dask cluster's. Same results to the bit.

Every task uses one torch thread, the serial run included: sums over threads would round by their number. A task is a family of
points (`sim.family`) on a piece of the texts; where the machine loses a worker, what it had not finished is done again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policies.contract import Policy
from policies.errors import UserError
from policies.registry import from_json
from sim.family import families
from sim.options import cost_of
from sim.setting import Setting
from sim.tally import Tally
from sim.trial import run_trials, texts_at
from traces.costs import Profile, load_profile
from traces.recording import Recording, open_recording

PIECE = 25_000
"""Positions of one task, about: a family of many settings takes seconds on them."""
ATTEMPTS = 3
"""Times in a row that workers may be lost before anything else is finished."""


class Job(NamedTuple):
    """What all points of a sweep have in common; paths must be good on every worker.

    memory  bytes that a worker holds of the recording
    """

    trace: str
    profile: str | None
    setting: Setting
    memory: int = Recording.memory


class Task(NamedTuple):
    """Policies as JSON, that are replayed on some texts (indices; None: all at the setting's temperature)."""

    contents: list[dict[str, Any]]
    texts: list[int] | None


def run_points(job: Job, policies: list[Policy], jobs: int = 1, scheduler: str | None = None) -> Iterator[tuple[Policy, Tally]]:
    """Replay and price every point; results come as they are finished, in any order.

    :param jobs: processes on this machine.   :param scheduler: address of a Dask scheduler, to use its workers instead.
    :raises UserError: when workers die again and again, or Dask is not installed or not reached.
    """
    tasks = [(number, task) for number, family in enumerate(families(policies)) for task in tasks_of(job, family)]
    pieces: dict[int, dict[int, list[Tally]]] = {number: {} for number, _ in tasks}
    count = {number: sum(other == number for other, _ in tasks) for number in pieces}
    for place, sums in _results(job, [task for _, task in tasks], jobs, scheduler):
        number = tasks[place][0]
        pieces[number][place] = [Tally.from_json(content) for content in sums]
        if len(pieces[number]) == count[number]:
            found = pieces.pop(number)
            for content, *own in zip(tasks[place][1].contents, *(found[key] for key in sorted(found)), strict=True):
                yield from_json(content), Tally.joined(own)


def tasks_of(job: Job, family: list[Policy]) -> list[Task]:
    """The family's tasks. Texts that share a serving batch, or a policy that learns across texts, stay in one piece."""
    contents = [policy.to_json() for policy in family]
    if job.setting.batch > 1 or family[0].scope not in ("cycle", "sequence"):
        return [Task(contents, None)]
    recording = _recording(job.trace, job.memory)
    chosen = texts_at(recording, job.setting.temperature)
    chosen = torch.arange(len(recording.length)) if chosen is None else chosen
    length = torch.from_numpy(recording.length.copy())[chosen]
    chosen, length = chosen[length > 1], length[length > 1]  # else a piece might hold nothing to replay
    piece = (length.cumsum(0) - length) // PIECE
    return [Task(contents, chosen[piece == number].tolist()) for number in piece.unique().tolist()] or [Task(contents, None)]


def _results(job: Job, tasks: list[Task], jobs: int, scheduler: str | None) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(place of the task, its tallies as JSON) as they are finished."""
    ahead, lost = dict(enumerate(tasks)), 0
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        run = _serial if jobs == 1 and scheduler is None else _workers(jobs, scheduler, stack)
        while ahead:
            try:
                for place, sums in run(job, dict(ahead)):
                    ahead.pop(place)
                    lost = 0
                    yield place, sums
            except Exception as error:
                if isinstance(error, UserError) or "Worker" not in type(error).__name__:
                    raise
                lost += 1
                if lost == ATTEMPTS:
                    raise UserError(
                        f"workers were lost {lost} times in a row ({type(error).__name__}): what is finished is kept, so give "
                        "the same command again, with fewer --jobs or less --memory if memory ran out"
                    ) from error


def _serial(job: Job, tasks: dict[int, Task]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    return (run_task(job, place, task) for place, task in tasks.items())


def _workers(jobs: int, scheduler: str | None, stack: ExitStack) -> Any:
    """What runs tasks on several processes."""
    from joblib import Parallel, delayed, parallel_config

    if scheduler:
        stack.enter_context(_cluster(scheduler))
        stack.enter_context(parallel_config(backend="dask"))
    else:
        stack.enter_context(parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1))

    def run(job: Job, tasks: dict[int, Task]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        calls = [delayed(run_task)(job, place, task) for place, task in tasks.items()]
        return Parallel(return_as="generator_unordered")(calls)

    return run


def _cluster(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise UserError("Dask is not installed: pip install 'specreplay[dask]', or leave out --backend dask") from None
    try:
        return Client(address, timeout="10s")
    except OSError as error:
        raise UserError(f"no Dask scheduler answers at {address} ({error}): start one, or give its address") from None


def run_task(job: Job, place: int, task: Task) -> tuple[int, list[dict[str, Any]]]:
    """One task: its place, and the policies' tallies as JSON."""
    torch.set_num_threads(1)
    policies = [from_json(content) for content in task.contents]
    profile = _profile(job.profile)
    cost = cost_of(profile, job.setting)
    texts: Tensor | None = None if task.texts is None else torch.tensor(task.texts)
    tallies = run_trials(_recording(job.trace, job.memory), policies, job.setting, cost, texts)
    return place, [sums.to_json() for sums in tallies]


@lru_cache(maxsize=2)
def _recording(folder: str, memory: int) -> Recording:
    return replace(open_recording(folder), memory=memory)


@lru_cache(maxsize=2)
def _profile(path: str | None) -> Profile | None:
    return load_profile(path) if path else None
