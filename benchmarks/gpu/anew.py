"""Begin again in a new process image when a GPU can no longer be used by this one: nothing that was measured is lost with it.

Two things do that. A capture that CUDA ends leaves torch believing that it goes on (live/graphed.py): memory is not given back any
more, and what is asked for next belongs to no stream. And behind an illegal access or a failed assertion on the device every call
of the process fails. In both cases the same command with what is left of its budget goes on with the jobs that are not done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from live import graphed


class Anew(Exception):
    """Raised when this process should end. ``skip`` is the job, "STAGE: JOB", that a new one should not try again, or ""."""

    def __init__(self, why: str, skip: str = ""):
        super().__init__(why)
        self.skip = skip


def unusable(device: str) -> str:
    """Why this process should ask nothing more of its GPU; "" where it may go on. For a moment when memory is given back."""
    import torch

    if graphed.failed_captures:
        return f"a capture failed: {graphed.failed_captures[0]}"
    if torch.device(device).type != "cuda":
        return ""
    try:
        return "" if torch.ones(1, device=device).add(1).item() == 2 else "it adds wrongly"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def go_on(words: Sequence[str]) -> None:
    """Become ``python -m benchmarks.gpu.run`` with these arguments."""
    open_files = Path("/proc/self/fd")
    for file in open_files.iterdir() if open_files.is_dir() else ():
        with suppress(OSError):  # of the listing itself
            if int(file.name) > 2:
                os.set_inheritable(int(file.name), False)  # the driver gives memory back when its files are closed
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.run", *words])
