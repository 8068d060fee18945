"""Profiles in fixed shapes, with every context in a cache of the size that it needs.

Attention in fixed shapes looks at the whole cache, however short the text: in one cache for all of them, each context would cost
what the longest does. So each has a measurement of its own, in a cache with room for itself and its tree; their rounds take turns,
and their times make one profile, which says how large each cache was. It prices a live run whose own cache is as large.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

from torch import Tensor

from benchmarks.gpu.results import as_far_as_time_goes
from live.graphed_pair import GraphedPair, graphed
from live.pair import Pair
from policies.errors import UserError
from traces.campaign import MIN_ROUNDS, Campaign, Shapes
from traces.costs import Profile
from traces.overhead import measured_policies
from traces.profile import profile_of

ROOM = 256
"""Slots beyond the text: for what short decodings generate, their trees and the largest bucket."""
ALIGNED = 64
"""Caches in fixed shapes have a multiple of so many slots."""

Part = tuple[Pair, Shapes]
"""A pair, whose caches have one size, and what is measured with it."""


def slots(length: int) -> int:
    """Of a cache for texts of ``length`` tokens."""
    return -(-(length + ROOM) // ALIGNED) * ALIGNED


def one_by_one(pair: Pair, grid: Shapes, graphs: bool) -> list[Part]:
    """The pair in fixed shapes for each context of the grid."""
    alone = [replace(grid, contexts=(context,)) for context in grid.contexts]
    return [(graphed(pair, slots(shapes.text_length), graphs), shapes) for shapes in alone]


def measure_parts(parts: list[Part], text: Tensor, grid: Shapes, repeats: int, seconds: float) -> Profile:
    """One profile of all parts' contexts; ``method.capacity`` says how many slots the cache of each had, where that was fixed.

    The policies' loops are measured in one part, behind the middle context.

    :param text: token ids int64 [rows, grid.text_length].   :param grid: all contexts together.
    :param repeats: rounds over all parts at most.   :param seconds: time to keep to (3 rounds are made in any case).
    :raises UserError: when a job's time runs out in the first round.
    """
    started, draw = time.monotonic(), random.Random(0)
    policies, middle = measured_policies(), grid.contexts[len(grid.contexts) // 2]
    whole = Campaign(parts[0][0], text, grid, policies=policies)
    campaigns = [
        Campaign(pair, text[:, : shapes.text_length], shapes, policies=policies if middle in shapes.contexts else {})
        for pair, shapes in parts
    ]
    order, longest, made = list(campaigns), 0.0, 0
    with as_far_as_time_goes():
        for campaign in campaigns:
            campaign.warm_up()
        while made < repeats and (made < MIN_ROUNDS or time.monotonic() - started + longest <= seconds):
            begun = time.monotonic()
            draw.shuffle(order)
            for campaign in order:
                campaign.measure()
            made, longest = made + 1, max(longest, time.monotonic() - begun)
    if not made:
        raise UserError("the time was over before every shape was measured once: give the stage more --budget")
    for campaign in campaigns:
        for key, values in campaign.samples.items():
            whole.samples[key] += values
    whole.rounds = made
    whole.rounds_of_loops = max(campaign.rounds_of_loops for campaign in campaigns if campaign.policies)
    profile = profile_of(whole)
    profile.content["method"]["capacity"] = {
        str(context): pair.capacity for pair, shapes in parts if isinstance(pair, GraphedPair) for context in shapes.contexts
    }
    return profile
