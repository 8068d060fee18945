"""The league: ``python -m benchmarks.league TRACE --profile P --out FOLDER`` places every registered policy.

Each policy takes part with its defaults and, where it can be fitted, as fitted on training texts: those of ``--train``, another
recording, or a part of TRACE itself. All are scored on the same other texts, at each temperature that was recorded, against plain
decoding, the best static setting (chosen on the training texts), the static setting that verifies as many nodes, and what a
clairvoyant could reach. Finished replays and fits are kept in FOLDER; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    import numpy as np

    from benchmarks.standing import Group
    from sim.setting import Setting
    from traces.costs import Profile
    from traces.recording import Recording


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.league", description=__doc__.splitlines()[0])
    parse.add_argument("trace", metavar="TRACE", help="the recording to score on")
    parse.add_argument("--train", metavar="TRACE", help="a recording of other prompts to fit on; by default a part of TRACE")
    parse.add_argument("--train-share", type=float, default=0.5, help="without --train: share of every domain's texts to fit on")
    parse.add_argument("--split-seed", type=int, default=0, help="without --train: which texts those are")
    parse.add_argument("--policy", action="append", default=[], help="one more policy to place; may be repeated")
    parse.add_argument("--only", action="append", default=[], metavar="NAME", help="leave out all registered policies but these")
    parse.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where finished work is kept")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write everything there (default: FOLDER/league.json)")
    parse.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there (default: FOLDER/league.md)")
    parse.add_argument("--rounds", type=int, default=2, metavar="N", help="decision times: rounds over the texts; 0: none")
    parse.add_argument("--clocked", type=int, default=5, metavar="N", help="texts to take decision times on (default 5)")
    from sim.options import add_setting, add_statistics

    add_setting(parse)
    add_statistics(parse)
    return parse


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    if not args.profile:
        raise UserError("a league needs to know what time costs: give --profile FILE, from traces.profile or traces.analytic")
    if args.rounds < 0:
        raise UserError(f"--rounds must be 0 or more, not {args.rounds}")
    _check_names(args)
    from benchmarks.league_tables import render
    from policies.registry import all_policies
    from sim.opening import about, says
    from sim.options import opened
    from sim.outputs import check_writable, write_json, write_text

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {args.out} ({error.strerror}): name another folder with --out") from None
    page, data = args.markdown or args.out / "league.md", args.json or args.out / "league.json"
    check_writable(page, data)
    recording, setting, profile = opened(args, args.trace)
    setting = setting.scheduled(all_policies().values())  # not by --only: one league prices everybody alike, whoever is left out
    facts = about(recording, profile, setting.drafter)
    content: dict[str, Any] = {"command": shlex.join(["python", "-m", "benchmarks.league", *given]), "about": facts}
    content["groups"] = [_play(args, recording, group, profile) for group in _settings(recording, setting)]
    content["says"] = says(facts, setting)
    write_json(data, content)
    write_text(page, render(content))
    print(render(content), end="")


def _check_names(args: argparse.Namespace) -> None:
    """Refuse a misspelt policy at once, not after everybody else has been fitted, nor by quietly placing one less."""
    from policies.registry import all_policies, load_policy

    for spec in args.policy:
        load_policy(spec).check_fitted()
    if unknown := [name for name in args.only if name not in all_policies()]:
        raise UserError(f"--only {unknown[0]} names no registered policy: see `python -m policies`")


def _settings(recording: Recording, setting: Setting) -> list[Setting]:
    """One per temperature, unless one was asked for."""
    from dataclasses import replace

    import numpy as np

    if setting.temperature is not None:
        return [setting]
    return [replace(setting, temperature=float(value)) for value in np.unique(recording.temperature)]


def _play(args: argparse.Namespace, recording: Recording, setting: Setting, profile: Profile) -> dict[str, Any]:
    """One temperature: fit, replay, place."""
    from tqdm import tqdm

    from benchmarks.entrants import Entrant, each_once, fitted, registered
    from policies.registry import load_policy

    group, failed = _group(args, recording, setting, profile), {}
    here = args.out / f"temperature-{setting.temperature:g}"
    with tqdm(desc=f"fitting at T = {setting.temperature:g}", unit="policy", file=sys.stderr, disable=None) as bar:

        def on_fit(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        entrants = [*registered(), *fitted(group.training, here / "fitted", on_fit, failed, set(args.only))]
    entrants = [one for one in entrants if not args.only or one.policy.name in args.only]
    entrants += [Entrant(load_policy(spec), "given") for spec in args.policy]
    return _placed(args, group, each_once(entrants), failed, here)


def _prompts(recording: Recording, texts: np.ndarray) -> set[bytes]:
    """What these texts (indices) were answers to; nothing of a recording that does not keep prompts."""
    from traces.manifest import keeps_prompts

    if not keeps_prompts(recording.manifest):
        return set()
    return {recording.prompt_tokens(int(text)).tobytes() for text in texts}


def _group(args: argparse.Namespace, recording: Recording, setting: Setting, profile: Profile) -> Group:
    import numpy as np

    from benchmarks.entrants import Training
    from benchmarks.standing import Group
    from sim.opening import open_sound
    from sim.split import split_texts
    from sim.trial import texts_at

    texts = texts_at(recording, setting.temperature).numpy()
    if args.train:
        other, _ = open_sound(args.train, setting.drafter)
        at = np.isclose(other.temperature, setting.temperature, atol=1e-4)
        learned = np.flatnonzero(at) if at.any() else np.arange(len(other.length))  # a fit at another temperature is one too
        scored = texts
        if shared := len(_prompts(recording, scored) & _prompts(other, learned)):
            raise UserError(
                f"{shared} of the prompts to score are also learned from: record other prompts for --train, or leave it out to "
                "fit on a part of the texts"
            )
    else:
        other = recording
        learned, scored = split_texts(recording, texts, args.train_share, args.split_seed)
    for what, chosen, source in (("learn from", learned, other), ("score on", scored, recording)):
        if not bool((source.length[chosen] > 1).any()):
            raise UserError(f"no text of two tokens or more is left to {what}: record more texts, or change --train-share")
    return Group(recording, scored, setting, profile, Training(other, learned, setting.drafter, profile))


def _placed(args: argparse.Namespace, group: Group, entrants: list, failed: dict[str, str], here: Path) -> dict[str, Any]:
    from tqdm import tqdm

    from benchmarks.standing import place

    with tqdm(desc=f"replaying at T = {group.setting.temperature:g}", unit="policy", file=sys.stderr, disable=None) as bar:

        def on_policy(name: str, of: int) -> None:
            bar.total = of
            bar.set_postfix_str(name)
            bar.update()

        placed = place(group, entrants, here, failed, args.resamples, args.seed, on_policy)
    if args.rounds:
        placed.add_decision_times(args.clocked, args.rounds)
    return placed.to_json()


if __name__ == "__main__":
    run_command(main)
