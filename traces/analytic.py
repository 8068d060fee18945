"""Profiles of hardware one does not have: ``python -m traces.analytic --hardware h100 --model llama-3.1-8b --out p.json``.

Times come from datasheets and shapes (`traces.roofline`), not from a clock, and the profile says so: its kind is "analytic",
and everything priced with it is labelled. ``--shipped`` makes the profiles that lie in traces/profiles again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from policies.errors import UserError, run_command

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    from traces.costs import Profile
    from traces.roofline import Machine, Shape

FOLDER = Path(__file__).parent / "profiles"
SHIPPED = ("a100", "h100", "h200", "l4", "rtx4090")
TOKENS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
WIDTHS = [1, 2, 4, 8, 10, 16, 32]
CAUGHT = [1, 2, 4, 8, 16]
CONTEXTS = [0, 512, 2048, 8192, 32768]
BATCHES = [1, 2, 4, 8, 16, 32, 64]
SPARE = 1.1
"""Memory that a model needs, over its weights: room for cache and activations."""
LOOP_MS = 1.2
"""What an engine adds to a cycle that drafts: fitted on vLLM in arXiv 2601.11580."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m traces.analytic", description=__doc__.split("\n")[0])
    parse.add_argument("--hardware", metavar="NAME|FILE", help="a100, a800, h100, h200, l4, rtx4090, or a JSON like theirs")
    parse.add_argument("--model", metavar="NAME|FILE", help="llama-3.1-8b, vicuna-13b, llama-3.3-70b, or a config.json")
    parse.add_argument(
        "--draft", metavar="NAME[=FILE]", action="append", default=[],
        help="drafter's name as in the recording: alone an EAGLE-3 head, NAME=eagle an EAGLE-1 head, NAME=medusa Medusa heads, "
        "NAME=dflash a DFlash drafter of five layers and blocks of 16, NAME=config.json a language model (default: eagle3)",
    )  # fmt: skip
    parse.add_argument("--devices", type=int, metavar="N", help="devices that share the target (default: as few as hold it)")
    parse.add_argument("--out", type=Path, metavar="FILE", help="where the profile goes (JSON)")
    parse.add_argument("--shipped", type=Path, metavar="FOLDER", help="write all shipped profiles there instead")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.shipped:
        if not args.shipped.is_dir():
            raise UserError(f"there is no folder {args.shipped}: make it first")
        models = _source("models")
        for hardware in SHIPPED:
            for model in models:
                path = args.shipped / f"{hardware}_{model}.json"
                analytic_profile(hardware, model).save(path)
                print(f"written to {path}")
        return
    if not (args.hardware and args.model and args.out):
        raise UserError("give --hardware, --model and --out, or --shipped alone")
    drafts = dict(word.partition("=")[::2] for word in args.draft) or {"eagle3": ""}
    profile = analytic_profile(args.hardware, args.model, drafts, args.devices)
    profile.save(args.out)
    cost, context = profile.cost(next(iter(drafts))), 512
    print(f"{profile.machine}: analytic, {context} tokens of context, batch 1")
    print(f"  plain decoding, a token    {float(cost.plain_ms(context, 1)):8.2f} ms")
    print("  verify 8/32/60 tokens    " + "".join(f"{float(cost.verify_ms(n, context, 1)):8.2f}" for n in (8, 32, 60)) + " ms")
    print("  draft level of 1/10      " + "".join(f"{float(cost.draft_ms(n, context, 1)):8.2f}" for n in (1, 10)) + " ms")
    print(f"\nwritten to {args.out}")


def analytic_profile(
    hardware: str, model: str, drafts: dict[str, str] | None = None, devices: int | None = None
) -> Profile:
    """A profile by the roofline.

    :param hardware: a shipped name, or a JSON file with bandwidth_gb_s, bf16_tflop_s, memory_gb and perhaps all_reduce_us.
    :param model: a shipped name, or a Hugging Face config.json.
    :param drafts: drafters by name; each an EAGLE-3 head (""), "eagle", "medusa", "dflash", or a language model's config.json.
    :param devices: that divide the target among them; the draft stays on one.
    :raises UserError: when one of the files cannot be used.
    """
    from traces.costs import FORMAT, VERSION, Profile
    from traces.roofline import Machine, target_shape

    gpu, about = _hardware(hardware), _model(model)
    config, target = about["config"], target_shape(about["config"])
    count = devices or _fewest(target.stored, gpu["memory_gb"])
    numbers = (float(gpu["bandwidth_gb_s"]), float(gpu["bf16_tflop_s"]))
    many = Machine(*numbers, devices=count, all_reduce_us=float(gpu.get("all_reduce_us", 10.0)))
    one = Machine(*numbers)
    drafts = {"eagle3": ""} if drafts is None else drafts
    passes = {name: _draft_pass(about, what) for name, what in drafts.items()}
    drafters = [{"name": name, "kind": part.kind, "id": part.id} for name, part in passes.items()]
    loop = (0.0, LOOP_MS, LOOP_MS)
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "analytic",
        "interpolation": "linear",
        "machine": {"processor": (f"{count} x " if count > 1 else "") + str(gpu.get("processor", hardware))},
        "device": "cuda",
        "dtype": "bfloat16",
        "target": {"id": about["id"], "parameters": target.stored, "vocabulary": config["vocab_size"]},
        "drafters": drafters,
        "method": {
            "how": "roofline: the slower of memory and arithmetic, launches from CUDA graphs (traces/roofline.py)",
            "hardware": gpu,
            "devices": count,
            "launch_us_per_layer": many.launch_us,
            "bandwidth_share": many.bandwidth_share,
            "compute_share": many.compute_share,
            "loop_ms": LOOP_MS,
        },
        "verify": _table(many, target, "tokens", TOKENS),
        "commit": {"tokens": [1, 16], "batch": BATCHES, "ms": [[0.0] * len(BATCHES)] * 2},
        "plain": {
            "context": CONTEXTS,
            "batch": BATCHES,
            "ms": [[_rounded(many.pass_ms(target, 1, c, b)) for b in BATCHES] for c in CONTEXTS],
        },
        "draft": {name: _table(one, part.shape, "width", WIDTHS, part.per_place) for name, part in passes.items()},
        "catch_up": {
            name: _table(one, part.caught_up, "tokens", CAUGHT, part.per_place, part.block, part.places)
            for name, part in passes.items()
        },
        "overhead": {"eagle3": {"levels": [0, 1, 32], "batch": BATCHES, "ms": [[ms] * len(BATCHES) for ms in loop]}},
    }
    return Profile(content, f"the analytic profile of {hardware} and {model}")


class _DraftPass(NamedTuple):
    """A drafter's forward passes.

    shape, caught_up   of a level; of a pass over accepted tokens (at least the root), which fuses the target's features
    per_place          whether a pass takes in each node or token; Medusa heads see the last place alone, whatever the width
    block, places      of a second pass that a catch-up runs, over so many places; a level then only ranks what was said there
    """

    kind: str
    id: str
    shape: Shape
    caught_up: Shape
    per_place: bool = True
    block: Shape | None = None
    places: int = 0


def _draft_pass(about: dict[str, Any], what: str) -> _DraftPass:
    """:param about: the target. :param what: as in ``drafts`` of :func:`analytic_profile`."""
    from traces.roofline import Shape, dflash_context_shape, dflash_shape, eagle1_shape, eagle3_shape, medusa_shape, target_shape

    config = about["config"]
    if what == "eagle":
        return _DraftPass("eagle", f"EAGLE-1 head of {about['id']}", eagle1_shape(config), eagle1_shape(config))
    if what == "medusa":
        return _DraftPass("medusa", f"Medusa heads of {about['id']}", medusa_shape(config), medusa_shape(config), per_place=False)
    if what == "dflash":
        nothing, remembering = Shape(0, 0, 0, 0, 0), dflash_context_shape(config)
        return _DraftPass(
            "dflash", f"DFlash drafter of {about['id']}", nothing, remembering, block=dflash_shape(config), places=16
        )
    if what:
        described = _model(what)
        shape = target_shape(described["config"])
        return _DraftPass("lm", described["id"], shape, shape)
    shape = eagle3_shape(config, about["draft_vocab_size"])
    fusing = replace(shape, parameters=shape.parameters + 3 * config["hidden_size"] ** 2)
    return _DraftPass("eagle3", f"EAGLE-3 head of {about['id']}", shape, fusing)


def _table(
    machine: Machine,
    shape: Shape,
    axis: str,
    points: list[int],
    per_place: bool = True,
    block: Shape | None = None,
    places: int = 0,
) -> dict[str, Any]:
    def pass_ms(n: int, context: int, batch: int) -> float:
        ms = machine.pass_ms(shape, n if per_place else 1, context, batch)
        return _rounded(ms + (machine.pass_ms(block, places, context, batch) if block else 0.0))

    ms = [[[pass_ms(n, c, b) for b in BATCHES] for c in CONTEXTS] for n in points]
    return {axis: points, "context": CONTEXTS, "batch": BATCHES, "ms": ms}


def _rounded(ms: float) -> float:
    return float(f"{ms:.5g}")


def _fewest(parameters: int, memory_gb: float) -> int:
    """The least power of two of devices that hold the weights in bfloat16, and some more."""
    count = 1
    while parameters * 2 * SPARE > memory_gb * 1e9 * count:
        count *= 2
    return count


def _source(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "sources" / f"{name}.json").read_text())


def _hardware(name: str) -> dict[str, Any]:
    known = _source("hardware")
    found = known.get(name) or _read(name, f"hardware '{name}' is none of {', '.join(known)}")
    lacking = [key for key in ("bandwidth_gb_s", "bf16_tflop_s", "memory_gb") if not isinstance(found.get(key), int | float)]
    if lacking:
        raise UserError(f"{name} lacks {', '.join(lacking)}: take the numbers from the hardware's datasheet")
    return found


def _model(name: str) -> dict[str, Any]:
    known = _source("models")
    if name in known:
        return known[name]
    config = _read(name, f"model '{name}' is none of {', '.join(known)}")
    config = config.get("text_config") or config
    return {"id": config.get("_name_or_path") or name, "config": config, "draft_vocab_size": 32000}


def _read(path: str, else_: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except OSError:
        raise UserError(f"{else_}, nor a file that can be read: give one of these or a JSON file") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: give a hardware description or a config.json")
    return content


if __name__ == "__main__":
    run_command(main)
