"""Milliseconds measured on a grid, read between and beyond the points as a monotone function of whole numbers.

Measurements scatter, and a cost that falls when more is asked for would send a policy after noise. So each table is
first raised to its running maximum along every axis. Beyond the last point of an open axis it goes on with its last
slope: a far point is appended there once, and then everything is interpolation within one grid. All of it is
elementwise float64, so a question gets the same bits alone and among thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policies.errors import UserError

FAR = 1 << 24
"""Distance of the appended point, in tokens: beyond every context length."""
INTERPOLATIONS = ("linear", "staircase")


class Grid:
    """ms as a function of the axes' values, each int64; non-decreasing in every one of them.

    Below an axis' first point the value is that point's: nothing is cheaper than the smallest thing measured.

    :param name: what the table holds, for messages.
    :param axes: per axis its points, whole numbers in increasing order.
    :param ms: nested lists (or a tensor) of milliseconds, one level per axis in the order of ``axes``.
    :param interpolation: "linear" between the points; "staircase": the next larger point's value, as CUDA graphs cost
        what their captured size costs. The axes named in ``smooth`` are linear in either case.
    :param closed: axes that are not read beyond their points, on either side (a batch is not extrapolated).
    :param source: where the table stands, for an error's words.
    :raises UserError: when axes and values do not fit each other.
    """

    def __init__(
        self,
        name: str,
        axes: Mapping[str, Sequence[int]],
        ms: Any,
        interpolation: str = "linear",
        smooth: Sequence[str] = ("context",),
        closed: Sequence[str] = ("batch",),
        source: str = "the profile",
    ):
        self.name, self.source, self.axes = name, source, {axis: [int(point) for point in points] for axis, points in axes.items()}
        table = _checked(name, self.axes, ms)
        for dim in range(table.dim()):
            table = table.cummax(dim).values
        growing = [d for d, axis in enumerate(self.axes) if axis not in closed and table.shape[d] > 1]
        self._table = _extended(table, list(self.axes.values()), growing).contiguous()
        self._closed = tuple(axis for axis in closed if axis in self.axes)
        self._dims = []  # axes with more than one point: (place among the arguments, points, stride, steps up to)
        for dim, (axis, points) in enumerate(self.axes.items()):
            if len(points) > 1:
                reach = points + [points[-1] + FAR] if dim in growing else points
                steps = len(points) - 1 if interpolation == "staircase" and axis not in smooth else 0
                self._dims.append((dim, torch.tensor(reach), self._table.stride(dim), steps))
        self._table = self._table.reshape(-1)

    def __call__(self, *where: Tensor | int) -> Tensor:
        """ms float64 of the broadcast shape, at one int64 tensor (or int) per axis, in the order of ``axes``.

        :raises UserError: when a closed axis is asked beyond its points.
        """
        where = aligned(*where)
        for axis, asked in zip(self.axes, where, strict=True):
            if axis in self._closed:
                self._check_inside(axis, asked)
        table = self._table.to(where[0].device)
        places = []
        for dim, points, stride, steps in self._dims:
            points = points.to(table.device)
            upper = torch.searchsorted(points, where[dim].contiguous()).clamp(1, len(points) - 1)
            below = points[upper - 1]
            fraction = (where[dim] - below).double() / (points[upper] - below).double()
            fraction = fraction.clamp(0.0, 1.0)
            if steps:
                fraction = torch.where((upper <= steps) & (fraction > 0), 1.0, fraction)
            places.append(((upper - 1) * stride, stride, fraction))
        found = _interpolate(table, torch.zeros((), dtype=torch.int64, device=table.device), places)
        shape = torch.broadcast_tensors(*where)[0].shape
        return found if found.shape == shape else found.expand(shape).clone()

    def _check_inside(self, axis: str, asked: Tensor) -> None:
        points = self.axes[axis]
        if asked.numel() and not (points[0] <= int(asked.min()) and int(asked.max()) <= points[-1]):
            wrong = int(asked.max()) if int(asked.max()) > points[-1] else int(asked.min())
            reach = f"{points[0]}" if len(points) == 1 else f"{points[0]} to {points[-1]}"
            raise UserError(
                f"{self.source} holds {axis} {reach} in its table {self.name}, not {wrong}: "
                f"measure it with python -m traces.profile (--{_option(axis)})"
            )


def aligned(*where: Tensor | int) -> tuple[Tensor, ...]:
    """The arguments as int64 tensors on one device (that of the first tensor)."""
    device = next((part.device for part in where if isinstance(part, Tensor)), torch.device("cpu"))
    return tuple(torch.as_tensor(part, dtype=torch.int64, device=device) for part in where)


def _option(axis: str) -> str:
    return {"batch": "batches", "context": "contexts", "width": "widths"}.get(axis, axis)


def _checked(name: str, axes: Mapping[str, list[int]], ms: Any) -> Tensor:
    cure = "measure it again with python -m traces.profile"
    for axis, points in axes.items():
        if not points or any(b <= a for a, b in zip(points, points[1:], strict=False)):
            raise UserError(f"the profile's {name} table has a {axis} axis that does not increase: {cure}")
    try:
        table = torch.as_tensor(ms, dtype=torch.float64)
    except (TypeError, ValueError):
        raise UserError(f"the profile's {name} table is not a regular table of numbers: {cure}") from None
    shape = tuple(len(points) for points in axes.values())
    if tuple(table.shape) != shape:
        raise UserError(f"the profile's {name} table has shape {tuple(table.shape)}, its axes say {shape}: {cure}")
    if not bool((table.isfinite() & (table >= 0)).all()):
        raise UserError(f"the profile's {name} table holds values that are no milliseconds: {cure}")
    return table


def _extended(table: Tensor, points: list[list[int]], growing: list[int]) -> Tensor:
    """``table`` with a far point behind each growing axis, still monotone in all of them.

    Each slope is raised to its running maximum along the other axes: otherwise two lines that converge would cross.
    """
    shape = [size + (dim in growing) for dim, size in enumerate(table.shape)]
    extended = _repeated(table, shape)
    for dim in growing:
        step = points[dim][-1] - points[dim][-2]
        slope = (table.narrow(dim, -1, 1) - table.narrow(dim, table.shape[dim] - 2, 1)) / step
        for other in range(table.dim()):
            if other != dim:
                slope = slope.cummax(other).values
        thin = [1 if d == dim else size for d, size in enumerate(shape)]
        extended.narrow(dim, -1, 1).add_(_repeated(slope, thin) * FAR)
    return extended


def _repeated(table: Tensor, shape: list[int]) -> Tensor:
    """``table`` with its last entry along each axis repeated up to ``shape``."""
    for dim, size in enumerate(shape):
        table = table.index_select(dim, torch.arange(size).clamp(max=table.shape[dim] - 1))
    return table


def _interpolate(table: Tensor, place: Tensor, axes: list[tuple[Tensor, int, Tensor]]) -> Tensor:
    """Multilinear: along the first axis between what the remaining axes give at its two neighbouring points."""
    if not axes:
        return table[place]
    (lower, stride, fraction), *rest = axes
    low = _interpolate(table, place + lower, rest)
    high = _interpolate(table, place + lower + stride, rest)
    return low + (high - low) * fraction
