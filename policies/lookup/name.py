"""How a drafter is written: a network's name, a training-free rule, or the two as one.

    eagle3                            a network of the pair, a draft forest of the recording
    suffix(depth=8)                   a training-free rule
    prompt_lookup(least=3)+eagle3     the rule where it finds something, the network elsewhere (policies/lookup/first.py)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from policies.errors import UserError
from policies.lookup.rule import is_rule


class DrafterName(NamedTuple):
    """Who drafts: a rule as it is written, a network by name, or both; None = none such."""

    rule: str | None
    network: str | None

    def __str__(self) -> str:
        return "+".join(part for part in self if part is not None)


def read_name(text: str, networks: Collection[str] = ()) -> DrafterName:
    """What ``text`` asks for.

    :param networks: names that are known; one that is written just so comes before any rule. What is neither a rule nor
        ``RULE+NETWORK`` is taken for the name of a network, known or not.
    :raises UserError: when a rule and a '+' are not followed by a network.
    """
    if text in networks:
        return DrafterName(None, text)
    rule, plus, network = _at_plus(text)
    if not is_rule(rule):
        return DrafterName(None, text)
    if not plus:
        return DrafterName(rule, None)
    if network not in networks and (not network or read_name(network, networks).rule is not None):
        raise UserError(f"drafter '{text}' has no network behind its '+': write RULE+NETWORK, such as suffix+eagle3")
    return DrafterName(rule, network)


def _at_plus(text: str) -> tuple[str, str, str]:
    """What stands before the first '+' outside of brackets and quotes, that '+' if there is one, and what stands behind it."""
    depth, quote = 0, ""
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign == "+" and not depth:
            return text[:place].strip(), sign, text[place + 1 :].strip()
        else:
            depth += (sign in "([{") - (sign in ")]}")
    return text, "", ""
