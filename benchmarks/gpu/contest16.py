"""The contest (benchmarks/gpu/contest.py) with sixteen requests side by side, priced by a profile of their own."""

from __future__ import annotations

from benchmarks.gpu.contest import TEMPERATURES, live_job, profile_job
from benchmarks.gpu.results import Job
from benchmarks.gpu.setting import Setting


def jobs(setting: Setting) -> list[Job]:
    batch = setting.pick(16, 3)
    return [profile_job(setting, f"profile, batch {batch}", (batch,)), *(live_job(setting, batch, heat) for heat in TEMPERATURES)]
