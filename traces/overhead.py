"""What a cycle takes beyond its networks: drafting loop, draft tree, policy and decoding loop, in real decoding.

It differs by policy: one that estimates chances node by node takes milliseconds where a fixed chain takes none, and on a fast
pair that decides who wins. So every kind of policy is measured by itself, with its decisions. And it differs by who drafts: a level
that a rule looked up takes less of the loop's time than a network's, but to look takes some even where nothing is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from live.decode import SpeculativeDecoder
from live.looking_up_first import Drafts
from live.model import CachedModel
from policies.lookup.rule import Rule
from policies.registry import load_policy, split_spec
from traces.measure import Stopwatch, prompts_of

FITTED = Path(__file__).parent.parent / "policies" / "fitted"
POLICIES = {
    "autoregressive": ("autoregressive",),
    "eagle3": ("eagle3(depth=2)", "eagle3(depth=8)"),
    "chain": ("chain(k=2)", "chain(k=8)"),
    "static": ("static",),
    "sequoia": tuple(f"sequoia(acceptance_=[0.5], tree_={tree})" for tree in ("[[0], [1], [2]]", "[[0], [1], [0, 0], [0, 0, 0]]")),
    "heterospec": (str(FITTED / "heterospec.json"),),
    "goodput": tuple(f"{FITTED / 'goodput.json'}({own})" for own in ("patience_=0", "depth=1", "depth=2", "depth=8, patience_=9")),
}
"""Measured policies by name: the fixed ones at two depths, for their cost per level; a tree of Sequoia's at
one level and at three; goodput from nothing drafted (no patience) to many levels; the others at the levels they choose."""
FINDS, FINDS_NOTHING = "prompt_lookup(ngram=3, latest=True)", "prompt_lookup(ngram=99, least=99)"
"""Rules with which loops are measured as well, each policy's in the last of its settings: one that nearly always finds the last
tokens again, and one that never does."""
SEEN = 3
"""Cycles of one number of levels that make a mean."""


def measured_policies(others: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Specs to decode with, by the policy's name: the usual ones, and ``others``, which take the place of those of their name.

    :raises UserError: when one is unknown or not fitted.
    """
    usual = {
        name: specs for name, specs in POLICIES.items() if all(Path(file).is_file() for file in map(_file, specs) if file)
    }
    found: dict[str, tuple[str, ...]] = {}
    for spec in dict.fromkeys(others):
        policy = load_policy(spec)
        policy.check_fitted()
        found[policy.name] = (*found.get(policy.name, ()), spec)
    return usual | found


def _file(spec: str) -> str:
    """The JSON file that a spec reads; '' where it names a policy."""
    head = split_spec(spec)[0]
    return head if head.endswith(".json") else ""


def overheads(
    target: CachedModel, drafts: Drafts, limit: int, text: Tensor, context: int, spec: str, cycles: int = 5
) -> Iterator[tuple[int, float]]:
    """(draft levels, overhead in ms) of some cycles of decoding with a policy. What a rule takes to draft is overhead, too.

    :param limit: tokens that fit in the context of both networks.
    :param text: int64 [R, L]; its first ``context`` tokens are the prompts.
    """
    decoder = SpeculativeDecoder(target, drafts, load_policy(spec), context_limit=limit)
    watch = Stopwatch(target.device)
    if not isinstance(drafts, Rule):
        decoder.drafter.expand = watch.wrap("draft", decoder.drafter.expand)
    decoder.verifier.accept = watch.wrap("verify", decoder.verifier.accept)
    decoder.prefill(prompts_of(text, context), 1 << 20)
    for cycle in range(cycles):
        watch.take()
        step, total = watch.time(decoder.step)
        if step is None:
            return
        if cycle:  # the first one has nothing to catch up on
            yield step.done.draft.widths.shape[1], total - sum(watch.take().values())
