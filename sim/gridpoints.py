"""A grid of policy settings: ``depth=2:12 total_tokens=8,16,24 top_k=4,8,10``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from policies.errors import UserError

if TYPE_CHECKING:
    from policies.contract import Policy

MOST = 10_000
"""Points of a grid."""
_RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(\d+))?")


def parse_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """Values by parameter. ``a:b`` and ``a:b:step`` are whole numbers with both ends; else values parted by commas.

    :raises UserError: when a word cannot be read, repeats a parameter, or holds no value.
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"cannot read the grid's '{word}': write parameter=2:12 or parameter=4,8,10")
        if name in grid:
            raise UserError(f"the grid gives {name} twice: put all its values into one word")
        if found := _RANGE.fullmatch(text):
            first, last, step = int(found[1]), int(found[2]), int(found[3] or 1)
            count = (last - first) // step + 1 if step else 0
            if count > MOST:
                raise UserError(f"'{word}' holds {count:,} values: {MOST:,} are the most, take a step as in {name}=0:600:60")
            values = range(first, last + 1, step) if step else []
        else:
            values = [_value(item) for item in text.split(",") if item.strip()]
        if not values:
            raise UserError(f"the grid is empty: '{word}' holds no value; write the smaller end first, as in {name}=2:12")
        grid[name] = list(dict.fromkeys(values))
    if not grid:
        raise UserError("the grid is empty: give --grid parameter=values")
    if (points := math.prod(map(len, grid.values()))) > MOST:
        raise UserError(f"the grid has {points:,} points: {MOST:,} are the most, sweep coarser first")
    return grid


def _value(text: str) -> Any:
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def points_of(base: str, grid: dict[str, list[Any]]) -> list[Policy]:
    """A policy per point of the grid; parameters that it does not name are those of ``base`` (name, name(...), JSON).

    The largest values come first: what leaves a recording's envelope is found out at once.
    :raises UserError: when the policy is unknown, unfitted, or refuses a point.
    """
    from policies.registry import from_json, load_policy

    given = load_policy(base).to_json()
    points = []
    for values in itertools.product(*grid.values()):
        parameters = given["parameters"] | dict(zip(grid, values, strict=True))
        points.append(_called(from_json(given | {"parameters": parameters}), grid))
        points[-1].check_fitted()
    return points[::-1]


def _called(point: Policy, grid: dict[str, list[Any]]) -> Policy:
    """The point under a name that says what the grid set of what is learned otherwise, which its spec leaves out."""
    from policies.contract import named

    learned = [f"{name}={getattr(point, name)}" for name in grid if name.endswith("_")]
    return named(point, f"{point.spec().removesuffix(')')}, {', '.join(learned)})") if learned else point
