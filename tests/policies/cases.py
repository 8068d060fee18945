"""Settings in which the property tests run every registered policy: small trees, so that many are tried."""

from __future__ import annotations

from policies.contract import Policy
from policies.registry import all_policies, load_policy

_ODDS = tuple(
    tuple(tuple(0.9 * row - 0.4 * group + 0.4 * column - 1.6 for column in range(3)) for row in range(3)) for group in range(5)
)
_FITTED = (
    "rate_=1.2, markup_=1.1, patience_=0.8, logprob_edges_=(-1.5, -0.5), entropy_edges_=(30.0, 60.0), "
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
        f"goodput(depth=4, top_k=3, total_tokens=12, adaptive_=False, {_FITTED}, {_LEVELS})",
        f"goodput(depth=3, top_k=4, total_tokens=20, horizon=4, adaptive_=True, {_FITTED}, {_LEVELS})",
    ],
    "heterospec": [
        "heterospec(total_tokens=12, depth=3, top_k=3, alpha=3, thresholds_=(2.4, 2.6, 2.8))",
        "heterospec(total_tokens=30, depth=3, top_k=4, first_index=1, confidence=local, thresholds_=(3.3, 3.6))",
        "heterospec(total_tokens=12, depth=2, top_k=3, prune=False, thresholds_=(1.75,))",
    ],
}
"""A policy that is not listed runs with its defaults; one that must be fitted has to be listed."""


def settings() -> list[str]:
    """Specs of all registered policies."""
    return [spec for name in all_policies() for spec in SETTINGS.get(name, [name])]


def make(spec: str) -> Policy:
    found = load_policy(spec)
    found.check_fitted()
    return found
