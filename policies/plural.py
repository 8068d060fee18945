"""A number with its noun, for what commands print."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 text``, ``2 texts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
