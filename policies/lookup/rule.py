"""What a training-free drafter is: a rule that turns the past into proposals; and how rules are found by name.

    suffix                                  name
    prompt_lookup(ngram=4)                  name with parameters
    suffix(corpus='earlier.safetensors')    that looks into a frozen corpus as well
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from policies.errors import UserError
from policies.lookup.corpus import Corpus, read_corpus
from policies.lookup.matching import Matches, frozen_matches, longest_first, own_matches
from policies.lookup.past import Past
from policies.registry import build, hint, split_spec

KIND = "training-free"
_registered: dict[str, type[Rule]] = {}


class Candidates(NamedTuple):
    """What may follow W nodes per row, in no order.

    token        int64   [B, W, C]  -1 where there is none
    probability  float64 [B, W, C]  given the node; 0 where there is none
    place        int64   [B, W, C]  where the child stands in what was found, -1 = not there
    """

    token: Tensor
    probability: Tensor
    place: Tensor


class Rule:
    """Base of all training-free drafters: a frozen dataclass whose fields are its parameters."""

    name: ClassVar[str]
    paper: ClassVar[str]
    noun: ClassVar[str] = "drafter"
    source: ClassVar[str] = ""
    top: int = 0
    """How many of the target's best tokens at each committed place the rule reads."""
    corpus: str | None = None
    """Path of a frozen corpus to look into beside the own text."""

    @cached_property
    def frozen(self) -> Corpus | None:
        """The frozen corpus, read once. :raises UserError: when it cannot be."""
        return None if self.corpus is None else read_corpus(self.corpus)

    def frozen_matches(self, context: Tensor, last: Tensor, longest: int, count: int, depth: int) -> Matches | None:
        """The longest matches in the frozen corpus, where there is one; see :func:`own_matches` for the parameters."""
        if self.frozen is None:
            return None
        return frozen_matches(self.frozen.on(context.device), context, last, longest, count, depth)

    def longest_matches(
        self, context: Tensor, last: Tensor, longest: int, count: int, depth: int, latest: bool = True
    ) -> Matches:
        """The longest matches in the own text and the frozen corpus, longest first; of equal ones the own text's come first."""
        own = own_matches(context, last, longest, count, depth, latest)
        frozen = self.frozen_matches(context, last, longest, count, depth)
        return own if frozen is None else longest_first(own, frozen, count)

    def look(self, past: Past) -> Any:
        """Look at the past, once per cycle. What was found is handed to :meth:`propose`, but for a `LoneTrie`
        (policies/lookup/lone_trie.py), which answers by itself."""
        raise NotImplementedError

    def propose(self, found: Any, place: Tensor, token: Tensor) -> Candidates:
        """What may follow the nodes at ``place`` int64 [B, W] (0 = the root, -1 = not in what was found) with these tokens."""
        raise NotImplementedError


def rule(name: str, paper: str) -> Callable[[type], type]:
    """Class decorator: make the class a frozen dataclass and register it under ``name`` with its paper's link."""

    def register(cls: type) -> type:
        cls.name, cls.paper = name, paper
        cls = dataclasses.dataclass(frozen=True)(cls)
        _registered[name] = cls
        return cls

    return register


def all_rules() -> dict[str, type[Rule]]:
    """Every training-free drafter of this folder, by name."""
    import policies.lookup

    for module in pkgutil.iter_modules(policies.lookup.__path__):
        importlib.import_module(f"policies.lookup.{module.name}")
    return dict(sorted(_registered.items()))


def is_rule(spec: str) -> bool:
    """Whether a drafter's name, which is no ``RULE+NETWORK`` (policies/lookup/name.py), is a rule's, with or without parameters."""
    return spec.partition("(")[0].strip() in all_rules()


def load_rule(spec: str) -> Rule:
    """The training-free drafter that ``spec`` names, its corpus read.

    :raises UserError: when there is none such, a parameter is wrong, or the corpus cannot be read.
    """
    head, parameters = split_spec(spec.strip(), "drafter")
    known = all_rules()
    if head not in known:
        raise UserError(f"unknown training-free drafter '{head}': {hint(head, known)}")
    made = build(known[head], parameters)
    _ = made.frozen  # what is wrong with it shows here, before models load
    return made


def at_least(rule: Rule, least: int, *names: str) -> None:
    """Parameter check in ``__post_init__``: raise a :class:`UserError` where one of the named is below ``least``."""
    for name in names:
        if getattr(rule, name) < least:
            raise UserError(f"drafter '{rule.name}': {name} must be {least} or more, not {getattr(rule, name)}")
