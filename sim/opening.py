"""What the simulator's commands take in: a sound recording, one of its drafters, a profile of its models, policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policies.contract import Policy, named
from policies.errors import UserError
from policies.lookup.name import read_name
from policies.lookup.rule import KIND, load_rule
from policies.registry import load_policy
from sim.finding import manifest_digest
from sim.looked_up import asked_of, check_drafter
from sim.setting import EXACT_KINDS, Setting
from sim.streaming import let_go
from traces.costs import DEFAULT_POLICY, Profile, check_profile, load_profile
from traces.recording import Recording, open_recording

_BLOCK = 1 << 18


def open_sound(folder: str | Path, drafter: str | None = None) -> tuple[Recording, str]:
    """Open a recording and choose one of its drafters (by default its first).

    :raises UserError: when it is unfinished or damaged, lacks the drafter, or holds NaN where a replay reads numbers.
    """
    recording = open_recording(folder)
    name = drafter or recording.drafters[0]
    columns = {"logprob": recording.logprob, "entropy": recording.entropy, "top_logprobs": recording.top_logprobs}
    asked = check_drafter(recording, name)
    if asked.network is not None:
        forest = recording.forest(asked.network)
        columns |= {"draft entropy": forest.entropy, "child_logprobs": forest.child_logprob}
    for column, values in columns.items():
        if _holds_nan(values, recording):
            raise UserError(
                f"{folder} holds NaN in its {column}: a replay of it would mean nothing; record it again, and look for "
                "numbers beyond the range of the models' dtype"
            )
    return recording, name


def _holds_nan(values: np.ndarray, recording: Recording) -> bool:
    """Block by block: a column may be larger than memory."""
    for start in range(0, len(values), _BLOCK):
        if np.isnan(values[start : start + _BLOCK]).any():
            return True
        let_go(recording)
    return False


def open_profile(path: str | Path, recording: Recording, drafter: str, other_models: bool | None = None) -> Profile:
    """Read a profile of the recording's models.

    :param other_models: take one of other models too, as a what-if; what is printed then says so. None: the command has no such
        option, so that no message may name it.
    :raises UserError: when it is another's, lacks the drafter, or cannot be read.
    """
    profile = load_profile(path)
    if not other_models:
        try:
            check_profile(profile, recording.manifest)
        except UserError as error:
            hint = "" if other_models is None else ", or say --other-models for a what-if"
            raise UserError(f"{error}{hint}") from None
    profile.cost(drafter)
    return profile


def open_policies(specs: Sequence[str]) -> list[Policy]:
    """The policies by their specs, fitted and each once. Those which have one spec, as two fits have, go by what was written.

    :raises UserError: when one is unknown, unfitted or given twice.
    """
    policies = [load_policy(spec) for spec in specs]
    for policy in policies:
        policy.check_fitted()
    names = [policy.spec() for policy in policies]
    for index, (written, policy) in enumerate(zip(specs, policies, strict=True)):
        if policy in policies[:index] or written in specs[:index]:
            raise UserError(f"two of the policies are {names[index]}: give each once")
        if names.count(names[index]) > 1:
            policies[index] = named(policy, written)
    return policies


def about(recording: Recording, profile: Profile | None, drafter: str | None = None) -> dict[str, Any]:
    """What results are worth remembering with: which recording (by the hash of its manifest, which holds its shards'),
    which models, which profile, and which corpus the drafter looked into, where it did."""
    facts: dict[str, Any] = {
        "recording": str(recording.folder),
        "manifest_sha256": manifest_digest(recording),
        "target": recording.manifest.get("target", {}),
        "drafters": recording.manifest["drafters"],
        "texts": len(recording.length),
        "complete": recording.complete,
    }
    if profile is not None:
        kind = profile.content.get("kind", "measured")
        facts["profile"] = {"source": profile.source.removeprefix("the profile "), "kind": kind, "machine": profile.machine}
        facts["profile"]["target"] = profile.content.get("target", {}).get("id")
        facts["profile"]["looked_up"] = DEFAULT_POLICY in profile.tables["looked_up"]
    rule = asked_of(recording, drafter).rule if drafter is not None else None
    if rule is not None and (frozen := load_rule(rule).frozen) is not None:
        facts["corpus"] = frozen.facts()
    return facts


def says(facts: dict[str, Any], setting: Setting) -> list[str]:
    """Notes that belong under every table made from these facts."""
    lines = []
    if setting.batch > 1:
        joining = "the next request joins when one has ended"
        how = joining if setting.schedule == "joining" else "groups shrink as texts end and admit nobody"
        lines.append(f"schedule {setting.schedule}, for every policy and for plain decoding: {how}")
    asked = read_name(setting.drafter, [drafter["name"] for drafter in facts["drafters"]])
    if setting.execution == "pipelined":
        kind = next((drafter.get("kind") for drafter in facts["drafters"] if drafter["name"] == asked.network), KIND)
        exact = kind in EXACT_KINDS
        how = "exact for this drafter" if exact else "an estimate: this drafter would run ahead on features of its own"
        lines.append(f"pipelined execution, the draft on hardware of its own: {how}")
    if corpus := facts.get("corpus"):
        size = f"{corpus['texts']:,} texts, {corpus['tokens']:,} tokens, sha256 {corpus['sha256'][:12]}"
        lines.append(f"the drafter looks into the frozen corpus {corpus['path']} as well ({size})")
    profile, target = facts.get("profile"), facts["target"].get("id")
    if profile is None:
        return lines
    if asked.rule is not None:
        known = "what looking takes prompt lookup: it runs no forward pass"
        price = known if profile.get("looked_up") else "nothing: this profile has no times of looking up"
        lines.append(f"the training-free drafter {asked.rule} is priced at {price}")
    if profile["kind"] == "analytic":
        lines.append(f"times are analytic (a roofline of {profile['machine']}), not measured")
    if profile["target"] and target and Path(profile["target"]).name.lower() != Path(target).name.lower():
        lines.append(f"times are those of {profile['target']}, acceptance that of {target}")
    return lines
