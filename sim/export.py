"""A chosen setting in the words of serving engines: ``python -m sim.export TRACE --policy 'eagle3(total_tokens=24, depth=5)'``.

For SGLang, vLLM, TensorRT-LLM and Hugging Face transformers: the options that come closest, and in plain words what the engine
cannot express. ``--tier 8=...`` names the policy for up to so many requests at once; give one per range. Flags as of the
engines' documentation in 2026; acceptance rates are the replay's, on the recording given.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    from policies.contract import Policy
    from traces.recording import Recording

KEYS = "releases differ in whether a key of draft_len_schedule is the largest or the smallest batch of its length"
_OPTIONS = re.compile(r"\(\w+ ?=.*\)$")
_NAMED = re.compile(r"(\w+) ?=")
"""What a recording writes behind a model's name, ``(revision='...')``; the names of such options."""
ENGINES = ("sglang", "vllm", "tensorrt-llm", "transformers")


@dataclass(frozen=True)
class Shape:
    """A policy as engines see it.

    chain       tokens drafted one after the other; None for a tree
    tree        (levels, children per node, verified tokens with the root) of EAGLE's dynamic tree; None for anything else
    other       a fixed tree or a rule that decides in each cycle: no engine's options hold it
    """

    policy: str
    chain: int | None = None
    tree: tuple[int, int, int] | None = None
    other: bool = False

    def up_to(self, levels: int) -> Shape:
        """The same for a drafter that drafts so many levels at most."""
        chain = None if self.chain is None else min(self.chain, levels)
        tree = None if self.tree is None else (min(self.tree[0], levels), *self.tree[1:])
        return replace(self, chain=chain, tree=tree)


@dataclass
class Export:
    """What to tell one engine, and what it cannot be told."""

    engine: str
    options: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    cannot: list[str] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    """Contents of JSON files that the command names."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m sim.export", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", help="the recording that acceptance rates are taken from")
    parse.add_argument("--policy", required=True, help="the chosen setting")
    parse.add_argument("--tier", action="append", default=[], metavar="N=POLICY", help="policy for up to N requests at once")
    parse.add_argument("--drafter", help="recorded drafter (default: the first)")
    parse.add_argument("--engine", choices=(*ENGINES, "all"), default="all")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    return parse


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    tiers = parse_tiers(args.tier)
    from policies.registry import load_policy
    from sim.metrics import replay_rows
    from sim.opening import about, open_sound
    from sim.outputs import check_writable, write_json

    check_writable(args.json)
    recording, drafter = open_sound(args.trace, args.drafter)
    if drafter not in recording.drafters:
        raise UserError(f"drafter {drafter} looks tokens up, which sim.export does not write settings for: name a recorded one")
    policy = load_policy(args.policy)
    row = replay_rows(recording, policy, drafter)[-1]
    shapes = {upto: shape_of(load_policy(spec)) for upto, spec in tiers.items()}
    exports = exported_from(recording, drafter, policy, row.accepted_by_depth, shapes)
    chosen = [one for one in exports if args.engine in ("all", one.engine)]
    content = {
        "command": shlex.join(["python", "-m", "sim.export", *given]),
        "about": about(recording, None),
        "policy": policy.to_json(),
        "tau": row.tau,
        "coverage": row.coverage,
        "accepted_by_depth": row.accepted_by_depth,
        "engines": {
            one.engine: {"options": one.options, "command": one.command, "cannot": one.cannot, "files": one.files}
            for one in chosen
        },
    }
    if args.json:
        write_json(args.json, content)
    print(f"{policy.spec()}: tau {row.tau:.2f} on {recording.folder} with drafter {drafter}")
    if row.coverage < 1:
        print(
            f"the recording covers only {row.coverage:.1%} of its cycles, so that neither tau nor rates hold: draft what is "
            f"missing with python -m traces.record --fill {recording.folder} --policy '{args.policy}'"
        )
    for one in chosen:
        print("\n".join(["", one.engine, f"  {one.command}" if one.command else "  nothing to set", *_wrapped(one.cannot)]))
        for name, config in one.files.items():
            print(f"  {name}: {json.dumps(config)}")


def parse_tiers(words: list[str]) -> dict[int, str]:
    """Policy by the largest number of requests it is for, ascending.

    :raises UserError: when a word cannot be read or repeats a number.
    """
    tiers: dict[int, str] = {}
    for word in words:
        number, _, spec = word.partition("=")
        if not number.strip().isdigit() or int(number) < 1 or not spec.strip():
            raise UserError(f"cannot read the tier '{word}': write N=POLICY, as in --tier 8=chain(k=3)")
        if int(number) in tiers:
            raise UserError(f"two tiers end at {number} requests: give each once")
        tiers[int(number)] = spec
    return dict(sorted(tiers.items()))


def shape_of(policy: Policy) -> Shape:
    """What engines can be told of a policy."""
    name, parameters = policy.name, policy.parameters()
    if name == "autoregressive":
        return Shape(policy.spec(), chain=0)
    if name == "chain":
        return Shape(policy.spec(), chain=parameters["k"])
    if name == "eagle3":
        return Shape(policy.spec(), tree=(parameters["depth"], parameters["top_k"], parameters["total_tokens"]))
    return Shape(policy.spec(), other=True)


def exported_from(
    recording: Recording, drafter: str, policy: Policy, accepted_by_depth: Sequence[float], tiers: dict[int, Shape] | None = None
) -> list[Export]:
    """:func:`exported` for the models of a recording. :param accepted_by_depth: what the policy's replay there gave."""
    kind = next(entry for entry in recording.manifest["drafters"] if entry["name"] == drafter)
    return exported(shape_of(policy), kind, recording.manifest.get("target", {}), list(accepted_by_depth), tiers or {})


def exported(
    shape: Shape, drafter: dict[str, Any], target: dict[str, Any], rates: list[float], tiers: dict[int, Shape]
) -> list[Export]:
    """The setting for every engine.

    :param drafter, target: entries of the recording's manifest.   :param rates: share of cycles that accept at least d nodes,
        d = 1, 2, ...   :param tiers: by the largest number of requests at once.
    """
    kind, told = drafter.get("kind", "lm"), (str(target.get("id", "TARGET")), str(drafter.get("id", "DRAFT")))
    models = tuple(_OPTIONS.sub("", one) for one in told)
    levels = drafter.get("levels")
    if levels is not None:  # Medusa and DFlash: nothing is deeper than there are heads, or places in a block
        shape, tiers = shape.up_to(levels), {upto: one.up_to(levels) for upto, one in tiers.items()}
    found = [
        _sglang(shape, kind, models, tiers),
        _vllm(shape, kind, models, rates, tiers),
        _tensorrt(shape, kind, models, tiers),
        _transformers(shape, kind, models, tiers),
    ]
    for export in (one for one in found if one.options):
        if kind == "dflash":
            _warn_of_blocks(export, levels, drafter.get("block_size", levels + 1) - levels)
        export.cannot += [
            f"{name} was recorded as {whole}: what stands behind the name, the engine must be told in its own way"
            for name, whole in zip(models, told, strict=True)
            if set(_NAMED.findall(whole.removeprefix(name))) - {"block_size"}
        ]
    return found


def _warn_of_blocks(export: Export, levels: int, more: int) -> None:
    """Engines mask as many places as they draft; what DFlash says at one depends on how many there are.

    :param more: places of a block over the tokens that it drafts.
    """
    options = export.options
    drafted = {options.get(name) for name in ("num_speculative_tokens", "max_draft_len")}
    drafted |= {tokens for *_, tokens in options.get("num_speculative_tokens_per_batch_size", ())}
    drafted |= set(options.get("draft_len_schedule", {}).values())
    drafted |= {options.get("speculative-num-draft-tokens", 1) - 1}
    if others := sorted(drafted - {None, 0, levels}):
        places, sizes = (" or ".join(map(str, numbers)) for numbers in (others, [one + more for one in others]))
        export.cannot.append(
            f"it masks the {places} places that it drafts, the recorded blocks {levels}, and drafts depend on that: what it would "
            f"accept, a recording with --draft 'HEAD(block_size=N)' tells, N = {sizes}"
        )


def _sglang(shape: Shape, kind: str, models: tuple[str, str], tiers: dict[int, Shape]) -> Export:
    export = Export("sglang")
    if kind == "medusa":
        export.cannot.append("SGLang has no Medusa heads")
        return export
    if shape.other:
        export.cannot.append(f"{shape.policy}: SGLang's options hold chains and EAGLE's dynamic tree, one for all cycles")
        return export
    if kind == "dflash" and shape.tree:
        export.cannot.append(f"{shape.policy} is a tree; with DFlash, SGLang verifies one path, whose accepted length is lower")
        shape = Shape(shape.policy, chain=shape.tree[0])
    steps, top_k, tokens = shape.tree or (shape.chain, 1, (shape.chain or 0) + 1)
    if not steps:
        export.command = f"python -m sglang.launch_server --model-path {shlex.quote(models[0])}"
        return export
    export.options = {
        "speculative-algorithm": {"eagle3": "EAGLE3", "eagle": "EAGLE", "dflash": "DFLASH"}.get(kind, "STANDALONE"),
        "speculative-draft-model-path": models[1],
        "speculative-num-steps": steps,
        "speculative-eagle-topk": top_k,
        "speculative-num-draft-tokens": tokens,
    }
    if kind == "dflash":
        del export.options["speculative-num-steps"], export.options["speculative-eagle-topk"]
    if tiers and kind == "dflash":
        export.cannot.append("tiers by batch: its blocks are of one length")
    elif tiers:
        chains = all(one.chain is not None for one in tiers.values()) and top_k == 1
        if chains:
            starts = [1, *(upto + 1 for upto in tiers)]
            config = {
                str(first): {"candidate_steps": [one.chain], "warmup_batches": 0}
                for first, one in zip(starts, tiers.values(), strict=False)
            }
            export.options |= {"speculative-adaptive": True, "speculative-adaptive-config": "adaptive.json"}
            export.files["adaptive.json"] = config
        else:
            export.cannot.append("tiers by batch need --speculative-eagle-topk 1: only chains can change with the batch")
    words = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in export.options.items())
    flags = " ".join(shlex.join(word) for word in words)
    export.command = f"python -m sglang.launch_server --model-path {shlex.quote(models[0])} {flags}"
    return export


def _vllm(shape: Shape, kind: str, models: tuple[str, str], rates: list[float], tiers: dict[int, Shape]) -> Export:
    export = Export("vllm")
    length = shape.chain if shape.chain is not None else len(rates) if shape.other else shape.tree[0]
    if shape.chain is None:
        what = "no chain" if shape.other else "a tree"
        export.cannot.append(f"{shape.policy} is {what}; vLLM verifies chains of one length, whose accepted length is lower")
    if not length:
        export.command = f"vllm serve {shlex.quote(models[0])}"
        return export
    if kind == "medusa":
        export.cannot.append(
            "vLLM loads Medusa heads whose files hold vocab_size and output matrices; heads that share the target's, as "
            "reference/medusa, hold neither"
        )
    method = kind if kind in ("eagle3", "eagle", "medusa", "dflash") else "draft_model"
    export.options = {"method": method, "model": models[1], "num_speculative_tokens": length}
    if tiers:
        table, first = [], 1
        for upto, one in tiers.items():
            if one.chain is None:
                export.cannot.append(f"the tier up to {upto} ({one.policy}) is no chain and is left out of the table")
            else:
                table.append([first, upto, one.chain])
                export.options["num_speculative_tokens"] = max(export.options["num_speculative_tokens"], one.chain)
            first = upto + 1
        export.options["num_speculative_tokens_per_batch_size"] = table
    synthetic = [round(rate, 6) for rate in (rates + [0.0] * length)[:length]]
    export.options["synthetic"] = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": synthetic}
    export.cannot.append(
        "the options named synthetic, which --json writes, are no deployment: with them vLLM accepts at the replayed rates per "
        "position (of the tree, where there is one), to measure throughput without these weights"
    )
    served = {name: value for name, value in export.options.items() if name != "synthetic"}
    export.command = f"vllm serve {shlex.quote(models[0])} --speculative-config {shlex.quote(json.dumps(served))}"
    return export


def _tensorrt(shape: Shape, kind: str, models: tuple[str, str], tiers: dict[int, Shape]) -> Export:
    export = Export("tensorrt-llm")
    if shape.other:
        export.cannot.append(f"{shape.policy}: TensorRT-LLM's options hold chains and EAGLE's dynamic tree, one per batch size")
        return export
    if shape.chain == 0:
        export.command = "leave speculative_config out"
        return export
    if kind in ("eagle", "medusa"):
        export.cannot.append(f"its PyTorch backend has no {'EAGLE-1' if kind == 'eagle' else 'Medusa'} heads")
        return export
    eagle = kind == "eagle3"
    name = {"eagle3": "Eagle3DecodingConfig", "dflash": "DFlashDecodingConfig"}.get(kind, "DraftTargetDecodingConfig")
    export.options = {"max_draft_len": shape.chain or shape.tree[0], "speculative_model": models[1]}
    if shape.tree and eagle:
        levels, top_k, tokens = shape.tree
        export.options |= {"use_dynamic_tree": True, "dynamic_tree_max_topK": top_k, "max_total_draft_tokens": tokens - 1}
    elif shape.tree:
        export.cannot.append("trees are for EAGLE heads only: with any other drafter the tree becomes a chain of its depth")
    if tiers:
        schedule = {upto: one.chain for upto, one in tiers.items() if one.chain is not None}
        if shape.tree or len(schedule) < len(tiers):
            export.cannot.append("draft_len_schedule changes the length of chains only; tiers that are trees are left out")
        if schedule and not shape.tree:
            export.options["max_draft_len"] = max(export.options["max_draft_len"], *schedule.values())
            export.options["draft_len_schedule"] = schedule
            export.cannot.append(f"{KEYS}: here the largest")
    words = ", ".join(f"{key}={value!r}" for key, value in export.options.items())
    export.command = f"speculative_config={name}({words})"
    return export


def _transformers(shape: Shape, kind: str, models: tuple[str, str], tiers: dict[int, Shape]) -> Export:
    export = Export("transformers")
    if kind != "lm":
        heads = {"medusa": "Medusa heads", "dflash": "DFlash drafters"}.get(kind, "EAGLE heads")
        export.cannot.append(f"generate knows no {heads}: only a draft language model can be its assistant")
        return export
    if shape.chain is None:
        export.cannot.append(f"{shape.policy} is no chain of one length; generate drafts chains only")
        return export
    if tiers:
        export.cannot.append("assisted generation decodes one request at a time: there are no tiers by batch")
    if shape.chain == 0:
        export.command = "model.generate(**inputs)"
        return export
    export.options = {
        "num_assistant_tokens": shape.chain,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    words = ", ".join(f"{key}={value!r}" for key, value in export.options.items())
    settings = f"assistant.generation_config.update({words})"  # generate reads them there, not from its own arguments
    export.command = f"{settings}; model.generate(**inputs, assistant_model=assistant)  # assistant: {models[1]}"
    return export


def _wrapped(lines: list[str]) -> list[str]:
    import textwrap

    return [textwrap.fill(line, 110, initial_indent="  cannot say: ", subsequent_indent="      ") for line in lines]


if __name__ == "__main__":
    run_command(main)
