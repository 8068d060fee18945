"""Options that the simulator's commands share; loads nothing heavy, for --help."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from policies.errors import UserError
from sim.setting import EXECUTIONS, RAGGED, SCHEDULES, Setting

if TYPE_CHECKING:
    from traces.costs import CostModel, Profile
    from traces.recording import Recording


def add_setting(parse: argparse.ArgumentParser) -> None:
    """--drafter, --temperature and everything about prices."""
    parse.add_argument(
        "--drafter", help="recorded drafter (default: the first), a training-free one: 'suffix(depth=8)', or both: suffix+eagle3"
    )
    parse.add_argument("--temperature", type=float, metavar="T", help="only the texts sampled at it (default: all)")
    parse.add_argument("--profile", metavar="FILE", help="what time costs: from traces.profile or traces.analytic")
    parse.add_argument("--other-models", action="store_true", help="take a profile of other models too, as a what-if")
    parse.add_argument("--batch", type=int, default=1, metavar="N", help="requests that decode together (default 1)")
    parse.add_argument(
        "--ragged", choices=RAGGED, default="max", help="what unequal requests pay for: the largest, or the sum of tokens"
    )
    parse.add_argument("--context-offset", type=int, default=0, metavar="N", help="price texts behind N more tokens")
    parse.add_argument("--execution", choices=EXECUTIONS, default="serial", help="pipelined: drafting overlaps verification")
    parse.add_argument(
        "--memory", type=int, metavar="MIB", help="hold no more of the recording at a time; changes no result (default 1024)"
    )


def add_schedule(parse: argparse.ArgumentParser) -> None:
    """--schedule: how all policies of a table are priced, where it is not left to them."""
    parse.add_argument(
        "--schedule", choices=SCHEDULES, help="of a batch (default: fixed if a policy decides for the whole batch, else joining)"
    )


def add_statistics(parse: argparse.ArgumentParser) -> None:
    """--resamples and --seed of the bootstrap."""
    parse.add_argument("--resamples", type=int, default=2000, metavar="N", help="bootstrap draws (default 2000)")
    parse.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")


def add_outputs(parse: argparse.ArgumentParser) -> None:
    """--json and --parquet."""
    parse.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parse.add_argument("--parquet", type=Path, metavar="FILE", help="write the rows of the table there")


def setting_of(args: argparse.Namespace, drafter: str) -> Setting:
    """The setting that the options ask for."""
    return Setting(drafter, args.batch, args.ragged, args.context_offset, args.execution, args.temperature)


def opened(args: argparse.Namespace, trace: str) -> tuple[Recording, Setting, Profile | None]:
    """The recording, how it is to be replayed, and the profile if one is given.

    :raises UserError: when one of them cannot be used.
    """
    setting_of(args, "")  # says what is wrong with the numbers before anything is opened
    if args.memory is not None and args.memory < 1:
        raise UserError(f"--memory must be 1 MiB or more, not {args.memory}")
    from sim.opening import open_profile, open_sound

    recording, drafter = open_sound(trace, args.drafter)
    if args.memory:
        recording = replace(recording, memory=args.memory << 20)
    profile = open_profile(args.profile, recording, drafter, args.other_models) if args.profile else None
    return recording, setting_of(args, drafter), profile


def cost_of(profile: Profile | None, setting: Setting) -> CostModel | None:
    """What policies are told about time, as live decoding tells them; each is priced with its own decisions (`sim.trial`)."""
    return None if profile is None else profile.cost(setting.drafter)
