"""Ctrl-C in the middle of something that is better finished: the first one asks to stop, the second one stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def asked_to_stop(say: Callable[[], Any]) -> Iterator[Callable[[], bool]]:
    """Within this block the first Ctrl-C raises nothing; what is yielded tells whether it came.

    :param say: called when it comes, to tell the user what is being waited for.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield lambda: False  # interrupts are not ours to handle
        return
    asked: list[bool] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        say()

    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
