"""Settings in which the property tests run every registered policy: small trees, so that many are tried."""

from __future__ import annotations

from policies.contract import Policy
from policies.lookahead import GRID
from policies.registry import all_policies, load_policy

_ODDS = tuple(
    tuple(tuple(0.9 * row - 0.4 * group + 0.4 * column - 1.6 for column in range(3)) for row in range(3)) for group in range(5)
)
_AHEAD = tuple(tuple(round((0.6 + 0.3 * level) * (1 - u) ** 2, 4) for u in GRID) for level in range(3))
_EASE = (1.1, 1.0, 0.2)
_OPENING = tuple(tuple(tuple(round(ease * f, 4) for f in row) for row in _AHEAD) for ease in _EASE)
_FITTED = (
    f"markup_=1.1, patience_=0.8, ahead_={_AHEAD}, root_edges_=(0.25, 0.75), opening_={_OPENING}, "
    f"logprob_edges_=(-1.5, -0.5), entropy_edges_=(30.0, 60.0), "
    f"odds_={_ODDS}, slopes_=((-0.1, 1.5), (0.1, -0.5)), plain_ms_=2.0, verify_ms_={tuple(0.15 * n for n in range(1, 20))}"
)
_LEVELS = "level_ms_=" + str(tuple(tuple(0.2 + 0.15 * level + 0.05 * width for width in range(4)) for level in range(4)))

SETTINGS: dict[str, list[str]] = {
    "chain": ["chain(k=3)", "chain(k=0)"],
    "static": ["static", "static(tree=((0,), (1,), (3,), (0, 0), (0, 2), (3, 0), (3, 0, 1)))"],
    "eagle3": [
        "eagle3(total_tokens=9, depth=3, top_k=3)",
        "eagle3(total_tokens=60, depth=4, top_k=10)",
        "eagle3(total_tokens=1, depth=2)",
    ],
    "threshold": ["threshold(mass=0.6, probability=0.2, depth=4, top_k=3)", "threshold(mass=0.0, probability=0.0, depth=2)"],
    "goodput": [
        f"goodput(depth=4, top_k=3, total_tokens=12, {_FITTED}, {_LEVELS})",
        f"goodput(depth=3, top_k=4, total_tokens=20, {_FITTED}, {_LEVELS})",
    ],
    "heterospec": [
        "heterospec(total_tokens=12, depth=3, top_k=3, alpha=3, thresholds_=(2.4, 2.6, 2.8))",
        "heterospec(total_tokens=30, depth=3, top_k=4, first_index=1, confidence=local, thresholds_=(3.3, 3.6))",
        "heterospec(total_tokens=12, depth=2, top_k=3, prune=False, thresholds_=(1.75,))",
    ],
    "opt_tree": ["opt_tree(nodes=8, depth=4, width=3)", "opt_tree(nodes=30, threshold=0.05, depth=5, width=5)"],
    "ddd": ["ddd(total_tokens=12, depth=5, top_k=3, checks=(1, 2, 4))", "ddd(depth=4, checks=(2,), threshold=0.5)"],
    "talon": [
        "talon(total_tokens=12, top_k=3, mu=0.3, width=3, branching=4, depth=4)",
        "talon(total_tokens=40, top_k=6, width=5, branching=3, depth=6)",
        "talon(total_tokens=1)",
    ],
    "dyspec": [
        "dyspec(nodes=12, width=3, top_k=4, depth=4)",
        "dyspec(nodes=9, threshold=0.1, width=9, top_k=9, depth=9)",
        "dyspec(nodes=64, threshold=0.03, depth=3)",
    ],
    "c2t": [
        "c2t(depth=4, top_k=3, width=9, units_=((1.5, -0.01, -0.1, 0.2), (0.5, 0.02, -0.3, 0.1)), output_=(2.0, 0.5, -0.7))",
        "c2t(beta=0.2, depth=3, top_k=6, units_=((4.0, 0.01, -0.5, 0.0),), output_=(1.0, -2.0))",
    ],
    "sequoia": [
        "sequoia(acceptance_=(0.5, 0.2, 0.1), tree_=((0,), (1,), (0, 0), (1, 0), (0, 0, 0)))",
        "sequoia(acceptance_=(0.0,), tree_=())",
    ],
    "kangaroo": ["kangaroo", "kangaroo(threshold=0.9, most=3)"],
    "svip": ["svip(threshold=2.5, most=5)", "svip(threshold=0)"],
    "adaedl": ["adaedl(gamma=0.01, start=0.3, step=0.5, most=5)", "adaedl(gamma=0.01, goal=0.2, step=0.5, most=3)"],
    "survival": ["survival", "survival(threshold=0.6, most=4)"],
    "hf_heuristic": ["hf_heuristic(start=2, most=6)", "hf_heuristic(start=4, threshold=0, most=6)"],
    "hf_confidence": ["hf_confidence(most=4)", "hf_confidence(threshold=0.9, few=2, miss_weight=1, most=5)"],
    "gammatune": ["gammatune", "gammatune(start=1, smoothing=0.7, widen=1, most=4)"],
    "specdec_pp": ["specdec_pp(weights_=(0.5, 0.6, -0.01, -0.2))", "specdec_pp(threshold=0.7, most=4, weights_=(1, 0.3, 0, 0))"],
    "expected_value": [
        "expected_value(draft_share=0.2, weights_=(0.5, 0.6, -0.01, -0.2), next_=0.7)",
        "expected_value(draft_share=0.05, verify_share=0.3, most=5, weights_=(1, 0.3, 0, 0), next_=0.6)",
        "expected_value(draft_share=1.0, weights_=(1, 0.3, 0, 0), next_=0.6)",
    ],
    "online_acceptance": ["online_acceptance(warm_up=0, refit=3, most=5)", "online_acceptance(warm_up=1, refit=4, threshold=0.5)"],
    "ucbspec": ["ucbspec", "ucbspec(exploration=0.1, arms=((4, 2, 2), (9, 3, 3), (2, 1, 1)))"],
    "exp3spec": ["exp3spec", "exp3spec(seed=3, arms=((4, 2, 2), 5, (9, 3, 3)))"],
    "hedgespec": ["hedgespec", "hedgespec(seed=3, arms=((4, 2, 3), (9, 3, 3), (6, 3, 3)))"],
    "tapout": ["tapout(most=5)", "tapout(arms=('survival', 'kangaroo'), exploration=0.2)"],
    "tensorrt_llm": ["tensorrt_llm", "tensorrt_llm(schedule=((1, 2), (3, 4), (5, 0), (9, 1)), window=3, threshold=0.4)"],
    "sglang_ema": ["sglang_ema(tiers=((1, (1, 3), -0.25), (3, (0, 2, 4), 0.0)), start=2, warm_up=2, interval=2, smoothing=0.4)"],
    "sglang_throughput": ["sglang_throughput(tiers=((1, (1, 3)), (3, (1, 2, 4))), window=3, interval=2, margin=0.05)"],
    "smartspec": ["smartspec", "smartspec(most=4, start=0.9, smoothing=0.5)"],
    "cascade": ["cascade(most=3, samples=2, hold=4)"],
    "d_cut": ["d_cut(k=3)", "d_cut(k=5, shares=(0.0, 0.3, 0.6, 1.0))"],
    "adaptive_verification": ["adaptive_verification(warm_up=0, refit=3, most=5)", "adaptive_verification(warm_up=1, refit=4)"],
    "evict": ["evict(total_tokens=9, depth=3, top_k=3)", "evict(total_tokens=40, depth=4, top_k=6)"],
    "tetris": ["tetris", "tetris(k=1, extra=4, turn_on=1)", "tetris(k=2, extra=1, turn_on=3)"],
}
"""A policy that is not listed runs with its defaults; one that must be fitted has to be listed."""


def settings() -> list[str]:
    """Specs of all registered policies."""
    return [spec for name in all_policies() for spec in SETTINGS.get(name, [name])]


COSTLY = {"smartspec", "sglang_throughput", "cascade", "d_cut", "adaptive_verification", "evict"}
"""Policies that decide nothing without a cost model."""


def make(spec: str) -> Policy:
    found = load_policy(spec)
    found.check_fitted()
    return found
