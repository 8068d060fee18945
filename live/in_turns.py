"""A profile taken in turns with decoding, so that a prediction is of the moment in which it is compared with a measurement.

The speed of many machines drifts within minutes, and not evenly: verifying many tokens may become dearer beside a plain step. A
profile of an hour ago then mispredicts, and nobody can tell that from an error of replay or pricing. So its shapes are measured
again here, a round of them before every other text that somebody decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from policies.errors import UserError

if TYPE_CHECKING:
    from live.pair import Pair
    from traces.campaign import Shapes
    from traces.costs import Profile

SHAPES, LOOPS = 150, 6
"""Rounds at most over the networks' shapes, and over the policies' loops: means over more hardly move."""


class ProfileInTurns:
    """Measurements of a pair's costs that take turns with something else.

    :param like: a measured profile whose grid is measured; by default that of ``python -m traces.profile``.
    :param specs: policies that decode. Their loops are measured where ``like`` knows their kind; the usual kinds' in any case.
    :raises UserError: when a context does not fit into the models.
    """

    def __init__(self, pair: Pair, like: Profile | None = None, specs: Sequence[str] = ()):
        from policies.registry import load_policy
        from traces.campaign import Campaign
        from traces.overhead import POLICIES, measured_policies
        from traces.profile import running_text

        further = (like.content["overhead"].keys() if like else set()) - POLICIES.keys()
        policies = measured_policies([spec for spec in specs if load_policy(spec).name in further])
        shapes = _shapes(like)
        text = running_text(pair, 1, shapes.text_length)
        try:
            self._campaign = Campaign(pair, text, shapes, policies=policies)
        except UserError as error:
            raise UserError(f"{error} to python -m traces.profile, and its file here with --profile") from None

    def begin(self, turns: int) -> None:
        """Warm every shape up; :meth:`turn` will be called so many times."""
        from traces.campaign import MIN_ROUNDS

        self._campaign.warm_up()
        self._turns, self._turn = turns, 0
        self._rounds = min(SHAPES, turns, max(MIN_ROUNDS, -(-turns // 2)))

    def turn(self) -> None:
        """Measure a round, in every other turn or less often."""
        if _due(self._turn, self._turns, self._rounds):
            self._campaign.measure(loops=_due(self._campaign.rounds, self._rounds, LOOPS))
        self._turn += 1

    def profile(self) -> Profile:
        """What was measured so far."""
        from traces.profile import profile_of

        return profile_of(self._campaign)


def _due(step: int, steps: int, times: int) -> bool:
    """Whether something that is to be done so many times over all steps, evenly, is to be done in this one."""
    return step * times // steps != (step - 1) * times // steps


def _shapes(like: Profile | None) -> Shapes:
    """The grid to measure, for one request at a time."""
    from traces.campaign import Shapes
    from traces.profile import FULL, LEAST_CONTEXT

    if like is None or like.content.get("kind") == "analytic":
        return Shapes(**{name: tuple(points) for name, points in FULL.items()})
    content = like.content
    drafts = content["draft"].values()
    return Shapes(
        tokens=tuple(content["verify"]["tokens"]),
        widths=tuple(sorted({width for draft in drafts for width in draft["width"]})),
        contexts=tuple(context for context in content["verify"]["context"] if context >= LEAST_CONTEXT),
    )
