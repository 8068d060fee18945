"""Masked attention with grouped heads, on a CPU: keys and values are read where they lie.

Where several query heads share a key/value head and there is a mask, Hugging Face first copies the whole cache, once per query
head: GPU kernels want it so. The CPU's kernel does not, gives the same numbers, and the copies cost more than attention itself:
8 heads over 4 with four queries: 49 / 224 / 2998 us with copies, 29 / 117 / 1121 without, over 200 / 1000 / 8000 cells.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_SWITCH = "TRANSFORMERS_SDPA_FORCE_GQA"  # Hugging Face's own, looked at in each attention call; older releases do not know it


@contextlib.contextmanager
def grouped_heads(wanted: bool) -> Iterator[None]:
    """Within, attention does without the copies if ``wanted``; who has set Hugging Face's switch already keeps his choice."""
    if not wanted or _SWITCH in os.environ:
        yield
        return
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        del os.environ[_SWITCH]
