"""Errors a user can mend: one sentence that says what is wrong and what to do, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave us. The message is one sentence that names the cure."""


class BrokenDraft(UserError):
    """The draft's probabilities are not numbers. Live decoding goes on without the draft."""


def check_counts(*options: tuple[str, int]) -> None:
    """Refuse command line options (name, value) below 1."""
    for name, value in options:
        if value < 1:
            raise UserError(f"{name} must be 1 or more, not {value}")


def run_command(main: Callable[[], int | None], on_interrupt: str = "") -> None:
    """Run a command line entry point and exit with its status.

    :param main: the command; its return value (None = 0) is the exit status.
    :param on_interrupt: what to tell the user after Ctrl-C (for example how to resume).
    Exits 2 after a :class:`UserError`, 130 after an interrupt.
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"\ninterrupted. {on_interrupt}".rstrip(), file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output (head, less) went away
        sys.stderr.close()
        status = 141
    sys.exit(status or 0)
