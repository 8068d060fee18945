"""A policy's parameters as things to turn: read from its class, written back as what a command line takes."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from typing import Any

from policies.contract import Policy
from policies.errors import UserError
from policies.registry import load_policy
from traces.costs import Profile


@dataclass(frozen=True)
class Parameter:
    """One parameter of a policy.

    kind     "whole" number, "real" number, "switch" (yes or no), "word", or "literal": anything else, as Python writes it
    learned  it is fitted, not chosen
    """

    name: str
    value: Any
    kind: str
    learned: bool


def parameters(policy: Policy) -> list[Parameter]:
    """All of a policy's parameters, in the order of its class."""
    found = []
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        kind = {bool: "switch", int: "whole", float: "real", str: "word"}.get(type(value), "literal")
        found.append(Parameter(field.name, value, kind, field.name.endswith("_")))
    return found


def batches(profile: Profile | None, texts: int) -> list[int]:
    """Batch sizes to choose from: those that the profile measured, 1 always; none larger than the number of texts."""
    known = [1, 2, 4, 8, 16, 32] if profile is None else profile.content["verify"].get("batch", [1])
    return sorted({1, *(batch for batch in known if batch <= texts)})


def head_of(spec: str) -> str:
    """A spec without its parameters: name, FILE.json or FILE.py:Class."""
    spec = spec.strip()
    return spec.partition("(")[0].strip() if spec.endswith(")") else spec


def with_parameter(spec: str, name: str, value: Any) -> str:
    """The spec with one parameter changed; what equals the policy's own value is not written."""
    base, now = load_policy(head_of(spec)), load_policy(spec)
    values = {each.name: each.value for each in parameters(now)} | {name: value}
    own = {each.name: each.value for each in parameters(base)}
    changed = [f"{each}={value!r}" for each, value in values.items() if value != own[each]]
    return f"{head_of(spec)}({', '.join(changed)})" if changed else head_of(spec)


def literal(text: str) -> Any:
    """What a person typed for a parameter: a number, a list, a word. Raises UserError for what cannot be read."""
    text = text.strip()
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    if text.replace("_", "").isalnum() and not text[0].isdigit():
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UserError(f"cannot read '{text}': values are numbers, words or lists such as (0.3, 0.6, 1.0)") from None


def spec_of(content: dict[str, Any]) -> str:
    """A spec for what `Policy.to_json` described: its name and the parameters that differ from the defaults."""
    name, values = content["policy"], content.get("parameters", {})
    defaults = {each.name: each.value for each in parameters(load_policy(name))}
    tidy = {key: _tuples(value) for key, value in values.items()}
    changed = [f"{key}={value!r}" for key, value in tidy.items() if key not in defaults or value != defaults[key]]
    return f"{name}({', '.join(changed)})" if changed else name


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value
