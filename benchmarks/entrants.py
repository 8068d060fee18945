"""Who takes part in a league: every registered policy, as published and as fitted, and the controls beside them.

Nothing is listed here: a policy that a file of policies/ registers takes part by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from policies.contract import Policy
from policies.errors import UserError
from policies.registry import all_policies, from_json
from sim.finding import digest_of, manifest_digest
from sim.fit import fit
from sim.outputs import write_json
from traces.costs import Profile
from traces.cover import TRUE_PATH_DEPTH
from traces.recording import Recording


@dataclass(frozen=True)
class Entrant:
    """A policy that takes part.

    form  "default": as published; "capped": as near to it as a recording covers; "fitted": learned from the training texts, or
          chosen by predicted time on them; "given": asked for by name
    """

    policy: Policy
    form: str


@dataclass(frozen=True)
class Training:
    """The texts that may be learned from, and what time costs while learning.

    texts    indices int64 into the recording's sequences
    profile  None: policies that weigh time cannot be fitted
    """

    recording: Recording
    texts: np.ndarray
    drafter: str
    profile: Profile | None

    def fit(self, policy: Policy) -> tuple[Policy, dict[str, Any]]:
        """The policy, fitted on all these texts, and how (plain JSON types)."""
        cost = None if self.profile is None else self.profile.cost(self.drafter, policy.name)
        fitted, how, _ = fit(self.recording, policy, train_share=1.0, drafter=self.drafter, cost=cost, texts=self.texts)
        return fitted, how

    def facts(self) -> dict[str, Any]:
        """What a fit depends on."""
        return {
            "recording": manifest_digest(self.recording),
            "texts": self.texts.tolist(),
            "drafter": self.drafter,
            "profile": self.profile and digest_of(self.profile),
        }


def registered() -> Iterator[Entrant]:
    """Every registered policy that runs as it is, with its default parameters; controls among them."""
    for cls in all_policies().values():
        if not cls.required_fit():
            yield Entrant(cls(), "capped" if cls.published else "default")


def fitted(
    training: Training, folder: Path, on_fit: Callable[[str], Any], failed: dict[str, str], only: set[str] = frozenset()
) -> Iterator[Entrant]:
    """Every registered policy that can be fitted, fitted; what cannot be fitted here goes to ``failed``, with the reason.

    :param folder: where fits are kept, so that another run need not make them again.
    :param only: names; none is all.
    """
    for name, cls in all_policies().items():
        if cls.fit is not Policy.fit and (not only or name in only):
            on_fit(name)
            try:
                yield Entrant(_fitted(cls(), training, folder / f"{name}.json"), "fitted")
            except UserError as error:
                failed[f"{name} (fitted)"] = str(error)


def _fitted(policy: Policy, training: Training, path: Path) -> Policy:
    known = {"training": training.facts(), "defaults": json.loads(json.dumps(policy.to_json()))}
    if path.exists():
        content = json.loads(path.read_text())
        if {name: content.get(name) for name in known} == known:
            return from_json(content)
    found, how = training.fit(policy)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found.to_json() | {"fit": how} | known)
    return found


def shorter(policy: Policy) -> Policy | None:
    """A chain without a limit that a recording covers, cut to one that it does; None for all others."""
    names = [field.name for field in fields(policy)]
    if "most" not in names or policy.most <= TRUE_PATH_DEPTH:
        return None
    return replace(policy, most=TRUE_PATH_DEPTH)


def each_once(entrants: Iterable[Entrant]) -> list[Entrant]:
    """Without those whose policy, parameters and all, is there already: a fit may leave a policy as it was."""
    found: dict[str, Entrant] = {}
    for entrant in entrants:
        found.setdefault(json.dumps(entrant.policy.to_json(), sort_keys=True), entrant)
    return list(found.values())
