"""Checkpoints that are there whole or not at all, and the device training runs on."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically (a temporary file beside it, then a rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, or None when there is nothing."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def replace_folder(new: Path, folder: Path) -> None:
    """Put the finished folder `new` in the place of `folder`."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def prepare_device() -> torch.device:
    """CUDA when there is one, else the CPU; on glibc, large buffers are then kept rather than given back each step."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    try:
        import ctypes

        libc = ctypes.CDLL("libc.so.6")
        for option, value in (
            (-3, 32 << 20),
            (-1, (1 << 31) - 1),
            (-2, 256 << 20),
        ):  # mmap and trim thresholds, top pad
            libc.mallopt(option, value)
    except OSError:
        pass
    return torch.device("cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 multiply units: CUDA, and CPUs with AMX or AVX-512 BF16."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type != "cpu" or any(getattr(torch.cpu, probe, bool)() for probe in probes)


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 autocast where the hardware multiplies bfloat16, else float32."""
    return torch.autocast(device.type, torch.bfloat16) if multiplies_bfloat16(device) else nullcontext()
