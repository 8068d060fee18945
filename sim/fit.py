"""Fit a policy on a recording: `python -m sim.fit TRACE --policy heterospec --out heterospec.json`.

Sequences are split into a training and a held-out part; the policy learns from every position of the training part, and
what it learned is described on the held-out part. A policy that weighs time is fitted under a cost model (`--profile`): its
parameters are then chosen by predicted time on the training part. The JSON is what every `--policy` accepts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    import numpy as np

    from policies.contract import Policy
    from policies.cost import Cost
    from sim.calibration import Calibration
    from sim.samples import Samples
    from traces.recording import Recording


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog="python -m sim.fit", description=__doc__.splitlines()[0])
    about.add_argument("trace", metavar="TRACE", help="a recording's folder")
    about.add_argument("--policy", required=True, help="what to fit: name, name(parameter=value, ...) or file.py:Class")
    about.add_argument("--out", required=True, type=Path, help="the JSON file to write")
    about.add_argument("--profile", metavar="FILE", help="what time costs, for policies that weigh it (from traces.profile)")
    about.add_argument("--train-share", type=float, default=0.5, help="share of every domain's sequences to learn from")
    about.add_argument("--seed", type=int, default=0, help="which sequences are learned from")
    about.add_argument("--drafter", help="whose drafts to fit for, as in sim.replay; the recording's first drafter by default")
    return about


def fit(
    recording: Recording,
    policy: Policy,
    *,
    train_share: float = 0.5,
    seed: int = 0,
    drafter: str | None = None,
    cost: Cost | None = None,
    texts: np.ndarray | None = None,
) -> tuple[Policy, dict[str, Any], Samples]:
    """A fitted copy of ``policy``, how it was fitted (plain JSON types), and the held-out samples.

    :param cost: what time costs; needed by policies that weigh it.
    :param texts: indices int64 of the sequences to split into a training and a held-out part; all by default.
    """
    import numpy as np

    from policies.contract import Policy
    from sim.finding import manifest_digest
    from sim.looked_up import check_drafter
    from sim.samples import build_samples
    from sim.split import split_texts

    if type(policy).fit is Policy.fit:
        policy.fit(None)  # says that there is nothing to fit
    if policy.fits_on_cost and cost is None:
        raise UserError(f"policy '{policy.name}' weighs time against tokens: give --profile FILE, from traces.profile")
    drafter = drafter or recording.drafters[0]
    check_drafter(recording, drafter)
    texts = np.arange(len(recording.length)) if texts is None else texts
    split = split_texts(recording, texts, train_share, seed)
    positions = int((recording.length[split.train] - 1).clip(min=0).sum())
    total = int((recording.length[texts] - 1).clip(min=0).sum())
    if not positions:
        raise UserError("the training part holds no position: record more sequences, or raise --train-share")
    progress = _Progress(total)
    options = {"nodes": policy.fits_on_nodes, "cost": cost, "on_positions": progress.advance}
    train = build_samples(recording, policy, drafter, split.train, **options)
    fitted = policy.fit(train)
    held_out = build_samples(recording, policy, drafter, split.held_out, **options)
    progress.finish()
    how = {
        "recording": str(recording.folder),
        "manifest_sha256": manifest_digest(recording),
        "drafter": drafter,
        "train_share": train_share,
        "seed": seed,
        "train_sequences": [int(recording.sequence_ids[index]) for index in split.train],
        "positions": len(train.sequence),
        "missing_expansions": int(train.missing.sum()),
    }
    if policy.fits_on_cost:
        from sim.tuning import tune

        fitted, how["ms_per_token"] = tune(fitted, recording, drafter, split.train, cost, progress.tried)
        progress.finish()
        if how["ms_per_token"] == float("inf"):
            raise UserError(
                f"{recording.folder} lacks draft nodes that {policy.spec()} wants, so that its time is unknown: draft them with "
                f"python -m traces.record --fill {recording.folder} --policy '{policy.spec()}', or choose smaller parameters"
            )
    return fitted, how, held_out


def calibrations(fitted: Policy, held_out: Samples) -> dict[str, Calibration]:
    """How well the policy's estimate of acceptance does on held-out nodes, beside the draft's own probabilities."""
    import numpy as np

    from sim.calibration import calibration

    if held_out.nodes is None or not len(held_out.nodes.accepted):
        return {}
    expected = fitted.expected_acceptance(held_out)
    if expected is None:
        return {}
    accepted = held_out.nodes.accepted
    draft = np.exp(held_out.nodes.logprob.astype(np.float64))
    return {"fitted": calibration(expected, accepted), "draft probability": calibration(draft, accepted)}


class _Progress:
    """Per cent on a terminal, nothing elsewhere."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def advance(self, count: int) -> None:
        self.done += count
        if sys.stderr.isatty() and self.total:
            print(f"\rdrafting at every position: {self.done / self.total:4.0%}", end="", file=sys.stderr, flush=True)

    def tried(self, count: int) -> None:
        if sys.stderr.isatty():
            print(f"\rsettings replayed: {count}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def main() -> None:
    given = parser().parse_args()
    from sim.outputs import check_writable, write_json

    check_writable(given.out)
    from policies.registry import load_policy
    from sim.calibration import calibration_lines
    from sim.finding import profile_for
    from traces.recording import open_recording

    policy = load_policy(given.policy)
    recording = open_recording(given.trace)
    drafter = given.drafter or recording.drafters[0]
    cost = profile_for(given.profile, recording, drafter).cost(drafter, policy.name) if given.profile else None
    fitted, how, held_out = fit(recording, policy, train_share=given.train_share, seed=given.seed, drafter=drafter, cost=cost)
    how["profile"] = given.profile
    trust = calibrations(fitted, held_out)
    reliability = {"calibration": {name: one.to_json() for name, one in trust.items()}} if trust else {}
    write_json(given.out, fitted.to_json() | {"fit": how} | reliability)
    learned = {name: getattr(fitted, name) for name in fitted.required_fit()}
    print(f"fitted {fitted.spec()} on {how['positions']} positions of {len(how['train_sequences'])} sequences")
    for name, value in learned.items():
        shown = str(value)
        print(f"  {name} = {shown if len(shown) <= 100 else shown[:96] + ' ...'}")
    if "ms_per_token" in how:
        print(f"  predicted {how['ms_per_token']:.3f} ms per token on the training part")
    if how["missing_expansions"]:
        lacking = how["missing_expansions"]
        print(f"  warning: the recording lacks {lacking} expansions of the base tree (they count as leaves)")
    told = fitted.describe_fit(held_out) + (calibration_lines(trust) if trust else []) if len(held_out.sequence) else []
    if told:
        print("\n  ".join([f"on the {len(held_out.sequence)} positions held out:", *told]))
    print(f"written to {given.out}")


if __name__ == "__main__":
    run_command(main)
