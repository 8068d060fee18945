"""Two recordings side by side: ``python -m sim.compare FIRST SECOND --policy eagle3``.

Two drafts, two temperatures, two quantisations of one target: the same policies are replayed on both, texts of the same prompt
(domain and prompt_id) are paired, and each figure's difference, second less first, gets an interval from a paired bootstrap over
those texts. The same recording may be given twice, with another drafter for the second.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command
from sim.options import add_outputs, add_schedule, add_setting, add_statistics, cost_of, opened

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    import numpy as np

    from sim.tally import Tally
    from traces.recording import Recording

SHOWN = ("tau", "ms_per_token", "speedup")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m sim.compare", description=__doc__.split("\n")[0])
    parse.add_argument("first", metavar="FIRST", help="a recording's folder")
    parse.add_argument("second", metavar="SECOND", help="another, or the same")
    parse.add_argument("--policy", action="append", required=True, help="name, name(...), JSON or file.py:Class; repeat it")
    parse.add_argument("--second-drafter", metavar="NAME", help="drafter of the second recording (default: as for the first)")
    parse.add_argument("--second-profile", metavar="FILE", help="profile for the second recording (default: as for the first)")
    parse.add_argument("--second-temperature", type=float, metavar="T", help="texts of the second (default: as for the first)")
    add_setting(parse)
    add_schedule(parse)
    add_statistics(parse)
    add_outputs(parse)
    return parse


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    from sim.outputs import check_writable, write_results

    check_writable(args.json, args.parquet)
    sides = [opened(args, args.first), opened(_second(args), args.second)]
    check_same_tokenizer(*(side[0] for side in sides))
    pairs = paired_texts(*(side[0] for side in sides), sides[0][1].temperature, sides[1][1].temperature)
    from sim.bootstrap import Resamples
    from sim.opening import about, open_policies, says
    from sim.trial import run_trial

    rows, policies = [], open_policies(args.policy)
    sides = [(recording, setting.scheduled(policies, args.schedule), profile) for recording, setting, profile in sides]
    for policy in policies:
        tallies = [run_trial(recording, policy, setting, cost_of(profile, setting)) for recording, setting, profile in sides]
        tallies = aligned(tallies, pairs)
        rows += differences(policy.spec(), *tallies, Resamples(tallies[0], args.resamples, args.seed))
    facts = [about(recording, profile, setting.drafter) for recording, setting, profile in sides]
    content = {
        "command": shlex.join(["python", "-m", "sim.compare", *given]),
        "about": facts,
        "settings": [setting.to_json() for _, setting, _ in sides],
        "bootstrap": {"resamples": args.resamples, "seed": args.seed},
        "pairs": len(pairs),
        "same_text": same_text(sides[0][0], sides[1][0], pairs),
        "rows": rows,
    }
    write_results(args, content, rows)
    warnings = dict.fromkeys(line for fact, side in zip(facts, sides, strict=True) for line in says(fact, side[1]))
    print("\n".join([*render(content), *warnings]))


def _second(args: argparse.Namespace) -> argparse.Namespace:
    """The options of the second recording."""
    own = {"drafter": args.second_drafter or args.drafter, "profile": args.second_profile or args.profile}
    own["temperature"] = args.temperature if args.second_temperature is None else args.second_temperature
    return argparse.Namespace(**vars(args) | own)


def check_same_tokenizer(first: Recording, second: Recording) -> None:
    """Tokens per cycle compare only where tokens are the same.

    :raises UserError: when the recordings' tokenizers differ; one without a hash passes.
    """
    hashes = [recording.manifest.get("target", {}).get("tokenizer_sha256") for recording in (first, second)]
    if all(hashes) and hashes[0] != hashes[1]:
        names = [recording.manifest["target"].get("id", "?") for recording in (first, second)]
        raise UserError(
            f"{first.folder} ({names[0]}, tokenizer {hashes[0][:12]}) and {second.folder} ({names[1]}, tokenizer "
            f"{hashes[1][:12]}) have different tokenizers, so their tokens do not compare: compare recordings of one tokenizer"
        )


def paired_texts(first: Recording, second: Recording, first_at: float | None, second_at: float | None) -> np.ndarray:
    """Indices int64 [n, 2] of texts of the same prompt that both have a second token, in the first's order.

    Of several texts of one prompt the first goes with the first, and so on. :raises UserError: when there is no pair.
    """
    import numpy as np

    places: list[dict[tuple[str, str, int], int]] = []
    for recording, temperature in ((first, first_at), (second, second_at)):
        seen: dict[tuple[str, str], int] = {}
        mine = {}
        for index, row in enumerate(recording.sequences()):
            if recording.length[index] > 1 and (temperature is None or np.isclose(row["temperature"], temperature)):
                prompt = (row["domain"], row["prompt_id"])
                seen[prompt] = seen.get(prompt, -1) + 1
                mine[(*prompt, seen[prompt])] = index
        places.append(mine)
    pairs = [(index, places[1][key]) for key, index in places[0].items() if key in places[1]]
    if not pairs:
        raise UserError(
            f"{first.folder} and {second.folder} share no prompt (domain and prompt_id): record the same prompts with both"
        )
    return np.array(pairs, dtype=np.int64)


def aligned(tallies: list[Tally], pairs: np.ndarray) -> list[Tally]:
    """Both tallies cut to the pairs, text by text."""
    import numpy as np

    from sim.tally import Tally

    rows = [
        np.searchsorted(sums.sequence, pairs[:, side])  # a tally's texts stand in request order
        for side, sums in enumerate(tallies)
    ]
    domain, domains = tallies[0].domain[rows[0]], tallies[0].domains
    cut = []
    for sums, row in zip(tallies, rows, strict=True):
        columns = {name: values[row] for name, values in sums.sums.items()}
        cut.append(Tally(np.arange(len(pairs)), domain, columns, sums.reached[row], domains))
    return cut


def differences(
    policy: str, first: Tally, second: Tally, resamples: Any, only: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """One row per domain, and the mean over domains last: each figure of both sides and its difference.

    :param only: the figures asked for; by default all that both sides have.
    """
    figures = [figure for figure in first.figures if figure in second.figures and (only is None or figure in only)]
    rows = []
    for domain in [*first.present(), None]:
        row: dict[str, Any] = {"policy": policy, "domain": "mean" if domain is None else first.domains[domain]}
        row["texts"] = len(first.domain) if domain is None else int((first.domain == domain).sum())
        for figure in figures:
            apart = resamples.difference(second, first, figure, domain)
            row[f"{figure}_first"] = resamples.value(first, figure, domain)
            row[f"{figure}_second"] = resamples.value(second, figure, domain)
            row[f"{figure}_difference"] = apart.estimate.value
            row[f"{figure}_low"], row[f"{figure}_high"] = apart.estimate.low, apart.estimate.high
            row[f"{figure}_share"] = apart.share
        rows.append(row)
    return rows


def same_text(first: Recording, second: Recording, pairs: np.ndarray) -> float:
    """Share of the pairs whose counted tokens are the same."""
    import numpy as np

    def text(recording: Recording, index: int) -> np.ndarray:
        start = recording.offset[index]
        return recording.token[start : start + recording.length[index]]

    return float(np.mean([np.array_equal(text(first, a), text(second, b)) for a, b in pairs.tolist()]))


def render(content: dict[str, Any]) -> list[str]:
    """A table per figure."""
    from sim.bootstrap import Estimate
    from sim.contest import TITLES, with_interval
    from sim.table import number, text_table

    names = [
        f"{fact['recording']} ({setting['drafter']})" for fact, setting in zip(content["about"], content["settings"], strict=True)
    ]
    lines = [f"first: {names[0]}", f"second: {names[1]}"]
    lines.append(f"{content['pairs']} texts paired by prompt; {content['same_text']:.0%} of them are the same in both")
    rows = content["rows"]
    for figure in (figure for figure in SHOWN if f"{figure}_first" in rows[0]):
        table = []
        for row in rows:
            apart = Estimate(row[f"{figure}_difference"], row[f"{figure}_low"], row[f"{figure}_high"])
            values = [number(row[f"{figure}_{side}"]) for side in ("first", "second")]
            table.append([row["policy"], row["domain"], str(row["texts"]), *values, with_interval(apart)])
        header = [TITLES[figure], "domain", "texts", "first", "second", "difference\n[95% interval]"]
        lines += ["", text_table(header, table)]
    missed = [row["policy"] for row in rows if min(row["coverage_first"], row["coverage_second"]) < 1]
    if missed:
        lines.append(f"not covered by both recordings: {', '.join(dict.fromkeys(missed))}")
    lines += ["", f"Means over domains. Paired bootstrap over texts, {content['bootstrap']['resamples']} draws."]
    return lines


if __name__ == "__main__":
    run_command(main)
