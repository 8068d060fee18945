"""The machine that something was computed on: its processor and, for a GPU, its driver and CUDA version."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Facts for manifests and profiles, as plain JSON types; reads settings and changes none.

    :param device: torch's name of the device; a GPU adds ``gpu``, ``driver``, ``cuda`` and ``gpu_memory_gib``.
    """
    import torch

    facts: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads()}
    if torch.device(device).type != "cuda":
        return facts
    about = torch.cuda.get_device_properties(device)
    return facts | {
        "gpu": about.name,
        "gpu_memory_gib": round(about.total_memory / (1 << 30), 1),
        "driver": driver(),
        "cuda": torch.version.cuda,
    }


def processor() -> str:
    """The processor's name as Linux knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def asked_of_driver(what: str) -> str:
    """What ``nvidia-smi --query-gpu`` says of the first GPU, "unknown" where nobody answers."""
    try:
        ask = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        found = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return found[0] if found else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def driver() -> str:
    """The NVIDIA driver's version, "unknown" where nobody tells it."""
    found = asked_of_driver("driver_version")
    if found != "unknown":
        return found
    told = Path("/proc/driver/nvidia/version")
    words = told.read_text().split() if told.is_file() else []
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
