"""The contest (benchmarks/gpu/contest.py) with sixteen requests side by side, priced by a profile of their own."""

from __future__ import annotations

from benchmarks.gpu.contest import TEMPERATURES, live_job, profile_job
from benchmarks.gpu.results import Job
from benchmarks.gpu.setting import Setting


def jobs(setting: Setting) -> list[Job]:
    batch = setting.pick(16, 3)
    alone_too = (1, batch)  # the last of a group decode on by themselves
    # graphs for every number of rows that a batch shrinks to are captured before anything is timed
    decoded = [live_job(setting, batch, heat, 60, 110) for heat in TEMPERATURES]
    return [profile_job(setting, f"profile, batch {batch}", alone_too), *decoded]
