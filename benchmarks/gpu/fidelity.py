"""Replay against decoding on this device, by ``live.fidelity``: float64 is the proof, float32 (TF32 off) is explained, bfloat16 is
measured. A small recording of each precision is made first; bfloat16's tau stands beside float32's on the same prompts. Texts are
compared with plain decoding in float64 alone, where they have to be the same."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.gpu.recording import TOY_COVER, covering, record_here
from benchmarks.gpu.results import Job
from benchmarks.gpu.setting import Setting

POLICIES = ("chain(k=5)", "static", "eagle3")
CYCLES = 80
"""Of each policy, drafter and temperature: 960 of a precision."""
PROCESSES = 4
"""That compare side by side: the networks are so small that a GPU waits for the processor."""


def jobs(setting: Setting) -> list[Job]:
    least = {"float64": 60, "float32": 35, "bfloat16": 35}
    return [Job(dtype, lambda left, d=dtype: checked(setting, d), seconds, 150) for dtype, seconds in least.items()]


def checked(setting: Setting, dtype: str) -> dict[str, Any]:
    """Record, decode again, compare; what ``live.fidelity --json`` says, and the recording's summary."""
    import torch

    from live.fidelity import main

    torch.set_float32_matmul_precision("highest")  # TF32 off, which is also torch's default
    folder, report = setting.work / f"fidelity-{dtype}", setting.work / f"fidelity-{dtype}.json"
    size = ["--limit", str(setting.pick(2, 1)), "--max-new-tokens", str(setting.pick(128, 8))]
    cover = covering(setting.pick((), TOY_COVER))
    told = record_here(setting, dtype, folder, [*size, *cover])
    specs = setting.pick(POLICIES, ("eagle3(total_tokens=6, depth=3, top_k=4)",))
    policies = [word for spec in specs for word in ("--policy", spec)]
    # without the witness: assisted generation needs no GPU to be compared with
    cycles = ["--cycles", str(setting.pick(CYCLES, 20)), "--witness", "0", "--jobs", str(setting.pick(PROCESSES, 2))]
    cycles += [] if dtype == "float64" else ["--skip-generate"]
    code = main([str(folder), *policies, *cycles, "--device", setting.device, "--json", str(report)])
    found = json.loads(report.read_text())
    found.pop("recording")
    return {"holds": code == 0, "dtype": dtype, "fidelity": found, "recording": told, "tf32": torch.backends.cuda.matmul.allow_tf32}
