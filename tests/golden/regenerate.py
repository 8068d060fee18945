"""Golden numbers of every policy on the shipped sample recording: ``python tests/golden/regenerate.py`` rewrites them.

They are sums over all replayed cycles, whole numbers all, so that a policy, the drafting loop or the acceptance walk cannot
change unnoticed. Look at the difference before committing it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "traces" / "samples" / "reference"
NUMBERS = Path(__file__).with_name("numbers.json")
FITTED = ROOT / "policies" / "fitted"
SPECS = (
    "autoregressive",
    "chain(k=3)",
    "chain(k=8)",
    "static(tree=eagle1)",
    "static(tree=medusa)",
    "eagle3",
    "eagle3(total_tokens=16, depth=5, top_k=8)",
    "eagle3(total_tokens=8, depth=4, top_k=4)",
    str(FITTED / "heterospec.json"),
    str(FITTED / "goodput.json"),
    "threshold",
    "ddd",
    "dyspec",
    "opt_tree",
    "talon",
    "c2t(depth=4, top_k=4, width=16, units_=((1.5, -0.01, -0.1, 0.2), (0.5, 0.02, -0.3, 0.1)), output_=(2.0, 0.5, -0.7))",
    "sequoia(acceptance_=(0.5, 0.2, 0.1), tree_=((0,), (1,), (0, 0), (1, 0), (0, 0, 0)))",
    "adaedl",
    "expected_value(draft_share=0.1, weights_=(0.5, 0.6, -0.01, -0.2), next_=0.7)",
    "gammatune",
    "hf_confidence",
    "hf_heuristic",
    "kangaroo",
    "online_acceptance(warm_up=0, refit=5)",
    "specdec_pp(weights_=(0.5, 0.6, -0.01, -0.2))",
    "survival",
    "svip",
    "exp3spec",
    "hedgespec",
    "tapout",
    "ucbspec",
    "adaptive_verification(warm_up=0, refit=5)",
    "cascade(most=3, samples=2, hold=4)",
    "d_cut",
    "evict",
    "sglang_ema(warm_up=2, interval=2)",
    "sglang_throughput(window=4, interval=4)",
    "smartspec",
    "tensorrt_llm(window=6, threshold=0.3)",
    "tetris",
)
#: What time costs, for the policies that weigh it.
PROFILE = ROOT / "traces" / "profiles" / "h200_llama-3.1-8b.json"


def numbers(spec: str, drafter: str) -> dict[str, int]:
    """Sums over the cycles of one policy with one drafter; policies that decide for a batch decide for two texts at once."""
    from policies.registry import load_policy
    from sim.replay import replay
    from traces.costs import load_profile
    from traces.recording import open_recording

    policy, cost = load_policy(spec), load_profile(PROFILE).cost("eagle3")
    log = replay(open_recording(SAMPLE), policy, drafter, batch=2 if policy.batch_wide else 1, cost=cost)
    sums = {name: int(getattr(log, name).sum()) for name in ("emitted", "accepted", "kept", "drafted", "catch_up", "missing")}
    weighted = int((log.accepted * (log.position + 1)).sum())  # notices cycles that change places
    return {"cycles": len(log.sequence)} | sums | {"levels": int(log.levels.sum()), "accepted_by_position": weighted}


def every_number() -> dict[str, dict[str, int]]:
    from traces.recording import open_recording

    drafters = open_recording(SAMPLE).drafters
    return {f"{Path(spec).name} with {drafter}": numbers(spec, drafter) for drafter in drafters for spec in SPECS}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    NUMBERS.write_text(json.dumps(every_number(), indent=1) + "\n")
