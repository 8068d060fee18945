"""Points of a sweep on several processes: joblib's on this machine, or a Dask cluster's. Same results to the bit.

Every task uses one torch thread, the serial run included: sums over threads would round by their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from policies.contract import Policy
from policies.errors import UserError
from policies.registry import from_json
from sim.family import families
from sim.setting import Setting
from sim.tally import Tally
from sim.trial import run_trials
from traces.costs import Profile, load_profile
from traces.recording import Recording, open_recording


class Job(NamedTuple):
    """What all points of a sweep have in common; paths must be good on every worker."""

    trace: str
    profile: str | None
    setting: Setting


def run_points(job: Job, policies: list[Policy], jobs: int = 1, scheduler: str | None = None) -> Iterator[tuple[Policy, Tally]]:
    """Replay and price every point; results come as they are finished, in any order.

    :param jobs: processes on this machine.   :param scheduler: address of a Dask scheduler, to use its workers instead.
    :raises UserError: when workers die, or Dask is not installed or not reached.
    """
    tasks = families(policies)  # points that share one drafting are replayed together
    with ExitStack() as stack:
        before = torch.get_num_threads()
        stack.callback(torch.set_num_threads, before)
        if jobs == 1 and scheduler is None:
            results = (run_family(job, [policy.to_json() for policy in family]) for family in tasks)
        else:
            results = _parallel(job, tasks, jobs, scheduler, stack)
        try:
            for finished in results:
                for content, sums in finished:
                    yield from_json(content), Tally.from_json(sums)
        except Exception as error:
            if isinstance(error, UserError) or "Worker" not in type(error).__name__:
                raise
            raise UserError(
                f"workers were lost ({type(error).__name__}): what is finished is kept, so give the same command again, with "
                "fewer --jobs if memory ran out"
            ) from error


def _parallel(job: Job, tasks: list[list[Policy]], jobs: int, scheduler: str | None, stack: ExitStack) -> Iterator[Any]:
    from joblib import Parallel, delayed, parallel_config

    if scheduler:
        stack.enter_context(_cluster(scheduler))
        stack.enter_context(parallel_config(backend="dask"))
    else:
        stack.enter_context(parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1))
    calls = [delayed(run_family)(job, [policy.to_json() for policy in family]) for family in tasks]
    return Parallel(return_as="generator_unordered")(calls)


def _cluster(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise UserError("Dask is not installed: pip install 'specreplay[dask]', or leave out --backend dask") from None
    try:
        return Client(address, timeout="10s")
    except OSError as error:
        raise UserError(f"no Dask scheduler answers at {address} ({error}): start one, or give its address") from None


def run_family(job: Job, contents: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """One task: policies as JSON in, (policy, tally) as JSON out."""
    torch.set_num_threads(1)
    policies = [from_json(content) for content in contents]
    profile = _profile(job.profile)
    cost = profile and profile.cost(job.setting.drafter, policies[0].name)
    tallies = run_trials(_recording(job.trace), policies, job.setting, cost)
    return [(content, sums.to_json()) for content, sums in zip(contents, tallies, strict=True)]


@lru_cache(maxsize=2)
def _recording(folder: str) -> Recording:
    return open_recording(folder)


@lru_cache(maxsize=2)
def _profile(path: str | None) -> Profile | None:
    return load_profile(path) if path else None
