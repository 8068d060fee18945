"""Real models: target and drafters on Hugging Face transformers, the decoding loop, and the shipped reference pair."""

from __future__ import annotations

from typing import Any

__all__ = ["speculate"]


def __getattr__(name: str) -> Any:
    """``live.speculate`` is loaded when it is asked for, so that a command's --help stays quick."""
    if name != "speculate":
        raise AttributeError(f"module 'live' has no attribute '{name}'")
    from live.hook import speculate

    return speculate
