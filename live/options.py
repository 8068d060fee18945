"""Command line options that several live commands share. Imports nothing heavy, so that --help stays quick."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from policies.errors import UserError

if TYPE_CHECKING:
    from policies.contract import Sampling


def add_sampling_options(parse: argparse.ArgumentParser, groups: bool = False) -> None:
    """--temperature, --top-p, --top-k, --repetition-penalty and --seed.

    :param groups: --temperature may be repeated.
    """
    if groups:
        several = "; may be repeated: every prompt is recorded at each"
        parse.add_argument("--temperature", type=float, action="append", default=[], help=f"0 is greedy (default){several}")
    else:
        parse.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parse.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this share (default 1: off)")
    parse.add_argument("--top-k", type=int, default=0, help="sample from so many of the likeliest tokens (default 0: off)")
    parse.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (default 1: off)")
    parse.add_argument("--seed", type=int, default=0, help="of the uniform numbers that choose sampled tokens (default 0)")


def sampling_of(args: argparse.Namespace, temperature: float) -> Sampling:
    """The settings that were asked for, at one temperature; what has no effect on greedy text is left at its default.

    Raises UserError when a value makes no sense.
    """
    checks = {
        "--temperature": (0 <= temperature < math.inf, temperature, "0 or more"),
        "--top-p": (0 < args.top_p <= 1, args.top_p, "above 0 and at most 1"),
        "--top-k": (args.top_k >= 0, args.top_k, "0 (off) or more"),
        "--repetition-penalty": (0 < args.repetition_penalty < math.inf, args.repetition_penalty, "above 0"),
        "--seed": (0 <= args.seed < 1 << 63, args.seed, "a number from 0 to 2^63 - 1"),
    }
    for name, (fine, value, wanted) in checks.items():
        if not fine:
            raise UserError(f"{name} must be {wanted}, not {value}")
    from policies.contract import Sampling

    if temperature == 0:
        return Sampling(repetition_penalty=args.repetition_penalty)
    return Sampling(temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
