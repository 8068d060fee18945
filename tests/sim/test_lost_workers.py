"""Workers that are killed in mid-sweep: nothing is lost, and the result is the same to the bit."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from policies.errors import UserError
from policies.registry import load_policy
from sim import farm
from sim.farm import ATTEMPTS, Job, run_points
from sim.setting import Setting
from tests.sim.many_texts import write_many

DEADLY = '''
import os
import signal
from pathlib import Path

from policies.eagle3 import Eagle3
from policies.registry import policy


@policy("deadly", paper="https://example.org")
class Deadly(Eagle3):
    """Kills the process that first drafts with it, once for each flag."""

    flag: str = ""

    def expand(self, tree, cycle, state):
        if self.flag and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().expand(tree, cycle, state)
'''


class TerminatedWorkerError(Exception):
    """Called as the one that joblib raises."""


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    trace = write_many(tmp_path_factory.mktemp("farm") / "trace")
    return Job(str(trace), None, Setting("made-up"))


def points(specs: list[str]) -> list:
    return [load_policy(spec) for spec in specs]


def said(found) -> dict[str, str]:
    return {policy.spec(): json.dumps(sums.to_json()) for policy, sums in found}


GRID = [f"eagle3(top_k=3, depth={depth}, total_tokens={total})" for depth in (1, 2, 3) for total in (4, 8)]


def test_only_what_was_not_finished_is_done_again(job, monkeypatch):
    monkeypatch.setattr(farm, "PIECE", 30)  # several tasks of one family
    serial, runs = said(run_points(job, points(GRID))), []

    def workers(jobs, scheduler, stack):
        def run(job, tasks):
            runs.append(sorted(tasks))
            for count, (place, task) in enumerate(tasks.items()):
                if count == 2 and len(runs) == 1:
                    raise TerminatedWorkerError
                yield farm.run_task(job, place, task)

        return run

    monkeypatch.setattr(farm, "_workers", workers)
    assert said(run_points(job, points(GRID), jobs=2)) == serial
    assert len(runs) == 2 and runs[1] == runs[0][2:] and len(runs[0]) > 3


def test_workers_that_die_again_and_again(job, monkeypatch):
    runs = []

    def workers(jobs, scheduler, stack):
        def run(job, tasks):
            runs.append(1)
            raise TerminatedWorkerError
            yield

        return run

    monkeypatch.setattr(farm, "_workers", workers)
    with pytest.raises(UserError, match="workers were lost 3 times in a row"):
        list(run_points(job, points(GRID), jobs=2))
    assert len(runs) == ATTEMPTS


@pytest.fixture
def deadly(tmp_path: Path) -> list[str]:
    """Two points, each of which kills a worker, between some harmless ones."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    kill = [f"{tmp_path / 'deadly.py'}:Deadly(top_k=3, depth={depth}, flag='{tmp_path / f'flag{depth}'}')" for depth in (2, 3)]
    return [*GRID[:1], kill[0], "chain(k=2)", kill[1], "chain(k=1)"]


def flags(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("flag*"))


@pytest.mark.long
def test_a_killed_process(job, deadly, tmp_path: Path):
    found = said(run_points(job, points(deadly), jobs=2))
    assert flags(tmp_path) == ["flag2", "flag3"], "nobody was killed"
    assert found == said(run_points(job, points(deadly)))


@pytest.mark.long
def test_a_killed_dask_worker(job, deadly, tmp_path: Path):
    import distributed

    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1")
    try:
        found = said(run_points(job, points(deadly), scheduler=cluster.scheduler_address))
    finally:
        with suppress(TimeoutError):  # workers that are slow to end are killed
            cluster.close()
    assert flags(tmp_path) == ["flag2", "flag3"], "nobody was killed"
    assert found == said(run_points(job, points(deadly)))
