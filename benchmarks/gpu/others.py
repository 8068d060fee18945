"""More profiles at true size, by the campaign of benchmarks/gpu/profiles.py: each grid by itself, as a profile is rectangular and
memory is not (many requests behind short contexts, one request behind long ones)."""

from __future__ import annotations

from benchmarks.gpu.profiles import WIDE, job_of
from benchmarks.gpu.results import Job
from benchmarks.gpu.setting import Setting
from traces.campaign import Shapes

MANY = Shapes((1, 8, 16, 32, 64, 128), (1, 4, 8, 10), (128, 512, 2048), (16,), (0, 1, 4, 9), (1, 4, 9))
LONG = Shapes((1, 16, 64, 128), (1, 10), (512, 4096, 16384), (1,), (0, 4, 9), (1, 9))
SHORT = Shapes((1, 16, 64, 128), (1, 10), (512, 1536), (1, 4), (0, 4, 9), (1, 9))
"""Of Vicuna-13B, whose context ends at 2,048."""


def jobs(setting: Setting) -> list[Job]:
    wanted = (
        ("llama-3.1-8b", ", batch 16", MANY, True),
        ("llama-3.1-8b", ", long", LONG, True),
        ("llama-3.1-8b", ", no graphs", WIDE, False),
        ("vicuna-13b", "", SHORT, True),
    )
    return [job_of(setting, *one, 60) for one in wanted]
