"""Plain text tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column left-aligned and the others right-aligned; a header line and a rule below it.

    A header may hold one newline: it then takes two lines.
    """
    heads = [title.split("\n") for title in header]
    height = max(len(lines) for lines in heads)
    tops = [[""] * (height - len(lines)) + lines for lines in heads]
    widths = [max(len(cell) for cell in (*tops[i], *(row[i] for row in rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(len(first)), *others]).rstrip()

    lines = [line([top[i] for top in tops]) for i in range(height)]
    lines.append("  ".join("-" * width for width in widths))
    return "\n".join([*lines, *(line(row) for row in rows)])


def number(value: float | None, digits: int = 2, suffix: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{suffix}"
