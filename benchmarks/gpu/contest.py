"""Policies against each other at true cost: the shipped pair's text at LLaMA-3.1-8B's price, live on this device.

    recording   the embedded pair records itself in bfloat16, greedy and at temperature 1
    profile     what its parts cost here, in fixed shapes (CUDA graphs on a GPU)
    fitted      HeteroSpec and goodput learn, and the best static setting is chosen, on half of the texts
    live        all of them decode the other half, in turns, beside plain decoding: batch 1 and 4; temperature 0 and 1
    breakdown   where the time of their cycles goes
    random      the same forwards with all weights random: what the embedded pair's many zero activations save
    no graphs   EAGLE-3 and plain decoding in ordinary forwards, beside both in fixed shapes

Predictions are replays of the very texts that are decoded, priced with the profile.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.capacities import measure_parts, slots
from benchmarks.gpu.contest_live import across_domains, capacity_for, decode_live
from benchmarks.gpu.results import Clock, Job
from benchmarks.gpu.setting import Setting
from live.graphed_pair import GraphedPair, graphed
from live.pair import Pair
from policies.contract import Policy
from policies.errors import UserError
from policies.registry import load_policy
from traces.campaign import Shapes

if TYPE_CHECKING:
    from traces.costs import CostModel
    from traces.recording import Recording

OPPONENTS = ("chain(k=3)", "eagle3", "talon", "opt_tree")
FITTED = {"heterospec": "heterospec(minimum_samples=8)", "goodput": "goodput"}
"""Names in the tables, and what is fitted. HeteroSpec learns from fully accepted paths alone, of which the contest's training texts
hold some 40."""
TOY_FITTED = {
    "heterospec": "heterospec(total_tokens=6, depth=2, top_k=4, alpha=1, minimum_samples=4)",
    "goodput": "goodput(total_tokens=6, depth=3, top_k=4)",
}
"""Of rehearsals, within what they record."""
BATCHES, TEMPERATURES = (1, 4), (0.0, 1.0)
"""A larger batch: benchmarks/gpu/contest16.py."""
COVER = ("eagle3(top_k=10, depth=14)", "eagle3(top_k=8, depth=12)", "eagle3(top_k=4, depth=12)", "chain(k=16)")
"""What the contest's policies draft: TALON is the deepest, goodput and the static grid end at 12 levels. One that wants a node that
was not recorded cannot be priced, and so not be fitted."""
SEED, SHARE = 0, 0.5
"""Of the split into texts to learn from and texts to decode; as sim.fit draws it."""


def jobs(setting: Setting) -> list[Job]:
    batches = setting.pick(BATCHES, (1, 2))
    return [
        Job("recording", lambda _: recorded(setting), 40, 90),
        profile_job(setting, "profile", batches),
        Job("fitted", lambda _: fitted(setting), 35, 60),
        *(live_job(setting, batches[0], heat) for heat in TEMPERATURES),
        Job("breakdown", lambda _: breakdown(setting), 20, 45),
        *(live_job(setting, batch, heat) for batch in batches[1:] for heat in TEMPERATURES),
        Job("random", lambda _: against_random(setting), 10, 25),
        Job("no graphs", lambda left: without_graphs(setting, left), 20, 40),
    ]


def live_job(setting: Setting, batch: int, heat: float, least: float = 35, most: float = 70) -> Job:
    return Job(f"live, batch {batch}, temperature {heat:g}", lambda left: live(setting, batch, heat, left), least, most)


def profile_job(setting: Setting, name: str, batches: tuple[int, ...]) -> Job:
    return Job(name, lambda left: profiled(setting, batches, left), 25, 60)


# ---- preparations ----------------------------------------------------------------------------------------------------


def recorded(setting: Setting) -> dict[str, Any]:
    """Record the embedded pair; its texts are generated in fixed shapes, as they will be decoded."""
    from benchmarks.gpu.recording import TOY_COVER, covering, summary
    from traces.record import parser

    folder = setting.work / "contest"
    limit, new, batch = setting.pick(("4", "128", "4"), ("2", "6", "2"))
    options = ["--limit", limit, "--max-new-tokens", new, "--batch", batch]
    options += ["--temperature", "0", "--temperature", "1", "--positions", str(setting.pick(128, 16)), "--cut-loops"]
    options += ["--resume"] if (folder / "manifest.json").is_file() else []
    pair = replace(setting.embedded())
    fixed = graphed(pair, 1024, setting.graphs).plain(int(batch))
    pair.plain = lambda rows=1: fixed  # one for all shards, so that its graphs are captured once
    record_pair(pair, parser().parse_args(["--out", str(folder), *options, *covering(setting.pick(COVER, TOY_COVER))]))
    return summary(folder)


def record_pair(pair: Pair, args: argparse.Namespace) -> None:
    """``traces.record`` with a pair that is in memory instead of on disk."""
    from live.options import sampling_of
    from traces.plan import shard_plan, turns_of
    from traces.prompts import load_prompts, sample_specs
    from traces.record import capture_settings, manifest, record_shards
    from traces.writer import RecordingWriter

    samplings = [sampling_of(args, heat) for heat in args.temperature]
    settings = capture_settings(args)
    turns = turns_of(load_prompts(sample_specs(), limit=args.limit), len(samplings))
    about = manifest(args, pair, settings, samplings)
    writer = RecordingWriter.create(args.out, about, shard_plan(turns, args.batch), resume=args.resume)
    record_shards(writer, pair, turns, samplings, settings, args)
    writer.finish()


def opened(setting: Setting) -> Recording:
    from traces.recording import open_recording

    folder = setting.work / "contest"
    if not (folder / "manifest.json").is_file():
        raise UserError("the contest's recording is not on this machine: remove contest.json and run --stage contest again")
    return open_recording(folder)


def profiled(setting: Setting, batches: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """The embedded pair's profile in fixed shapes, with the caches of the live runs."""
    from traces.profile import running_text

    started = time.monotonic()
    points, pair = grid(setting, batches), in_fixed_shapes(setting)
    text = running_text(pair, max(batches), points.text_length)
    left = 0.75 * (seconds - (time.monotonic() - started))
    profile = measure_parts([(pair, points)], text, points, setting.pick(9, 1), left)
    profile.content["method"]["cuda_graphs"] = setting.graphs
    for batch in batches:
        if batch == max(batches) or not priced(setting, batch).exists():
            profile.save(priced(setting, batch))
    return {"profile": profile.content}


def grid(setting: Setting, batches: tuple[int, ...]) -> Shapes:
    """What is priced."""
    real = Shapes((1, 4, 8, 16, 32, 64, 96), (1, 4, 8, 10, 16), (64, 320), batches, (0, 1, 2, 4, 9), (1, 4, 9))
    return setting.pick(real, Shapes((1, 8), (1, 4), (48,), batches, (0, 2), (1, 2)))


def in_fixed_shapes(setting: Setting) -> GraphedPair:
    """The embedded pair with caches for the longest recorded text and for what is priced. They have one size wherever the contest
    measures, as that is what attention in fixed shapes costs."""
    capacity = max(capacity_for(opened(setting)), slots(grid(setting, (1,)).text_length))
    return graphed(setting.embedded(), capacity, setting.graphs)


def priced(setting: Setting, batch: int) -> Path:
    """Where the profile that holds a batch is kept."""
    return setting.work / f"contest-profile-{batch}.json"


def cost_of(setting: Setting, batch: int = 1) -> CostModel:
    from traces.costs import load_profile

    if not priced(setting, batch).is_file():
        raise UserError(f"batch {batch} has no profile yet: run --stage contest again with more --budget")
    return load_profile(priced(setting, batch)).cost("eagle3")


def fitted(setting: Setting) -> dict[str, Any]:
    """Learn on the training texts; the best static setting among fixed chains and EAGLE-3's grid, by predicted time.

    Each is written when it is found, and one that cannot be found costs none of the others its place: the result names it.
    """
    recording, cost = opened(setting), cost_of(setting)
    policies: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in ("best static", *FITTED):
        path = fitted_file(setting, name)
        try:
            if not path.is_file():  # else an earlier run, which ended before the last of them, has found it
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(learned(setting, name, recording, cost)))
                partial.replace(path)
            policies[name] = json.loads(path.read_text())
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:500]
    return {"policies": policies, "failed": failed}


def learned(setting: Setting, name: str, recording: Recording, cost: CostModel) -> dict[str, Any]:
    """A policy's JSON document, learned on the training texts."""
    from sim.fit import fit
    from sim.setting import Setting as Circumstances
    from sim.static_search import best_static
    from sim.trial import Trials

    if name == "best static":
        best = best_static(Trials(recording, Circumstances("eagle3"), cost, torch.tensor(split(recording)[0])))
        return best.policy.to_json() | {"predicted_ms_per_token": best.ms_per_token}
    spec = setting.pick(FITTED, TOY_FITTED)[name]
    policy, how, _ = fit(recording, load_policy(spec), train_share=SHARE, seed=SEED, drafter="eagle3", cost=cost)
    return policy.to_json() | {"fit": how}


def fitted_file(setting: Setting, name: str) -> Path:
    """Where a policy that was fitted here is kept."""
    return setting.work / f"contest-{name.replace(' ', '-')}.json"


def split(recording: Recording) -> tuple[list[int], list[int]]:
    """Texts to learn from and texts to decode."""
    from sim.split import split_texts

    parts = split_texts(recording, share=SHARE, seed=SEED)
    return list(map(int, parts.train)), list(map(int, parts.held_out))


def entrants(setting: Setting) -> dict[str, Policy]:
    """Everyone who drafts, by the name in the tables."""
    toys = ("eagle3(total_tokens=6, depth=3, top_k=4)", "chain(k=3)")
    found = {spec: load_policy(spec) for spec in setting.pick(OPPONENTS, toys)}
    files = {name: fitted_file(setting, name) for name in ("best static", *FITTED)}
    return found | {name: load_policy(str(path)) for name, path in files.items() if path.is_file()}


# ---- the contest -----------------------------------------------------------------------------------------------------


def live(setting: Setting, batch: int, heat: float, seconds: float) -> dict[str, Any]:
    """Everyone decodes the held-out texts of a temperature."""
    clock, recording = Clock(seconds), opened(setting)
    at = [text for text in range(len(recording.length)) if recording.sampling(text)["temperature"] == heat]
    at = [text for text in at if recording.length[text] > 1]
    held_out = set(split(recording)[1])
    texts = [text for text in at if text in held_out]
    whose = "held-out texts"
    if len(texts) < batch:  # for want of others; the results say so
        texts, whose = at, "all texts, those that policies were fitted on among them"
    texts, most = across_domains(recording, texts), setting.pick((max(5 // batch, 1), 5), (1, 1))
    pair = in_fixed_shapes(setting)
    cost = cost_of(setting, batch)
    policies = entrants(setting)
    found = decode_live(pair, policies, recording, cost, texts, batch, most, clock.left)
    absent = [name for name in ("best static", *FITTED) if name not in policies]
    return {"temperature": heat, "decoded": whose, "absent": absent, "capacity": pair.capacity} | found


def without_graphs(setting: Setting, seconds: float) -> dict[str, Any]:
    """EAGLE-3 and plain decoding of greedy held-out texts: what fixed shapes and graphs are worth."""
    clock, recording, cost = Clock(seconds), opened(setting), cost_of(setting)
    texts = [text for text in split(recording)[1] if recording.sampling(text)["temperature"] == 0 and recording.length[text] > 1]
    texts = across_domains(recording, texts)
    policies = {name: policy for name, policy in entrants(setting).items() if name.startswith("eagle3")}
    pair, ordinary = in_fixed_shapes(setting), setting.embedded()
    found = decode_live(pair, policies, recording, cost, texts, 1, setting.pick((3, 3), (1, 1)), clock.left, ordinary)
    return {"temperature": 0.0} | found


def breakdown(setting: Setting) -> dict[str, Any]:
    """Where a cycle's time goes, at batch 1 on greedy held-out texts; every border waits for the device."""
    from live.contenders import break_down

    recording, cost = opened(setting), cost_of(setting)
    texts = [text for text in split(recording)[1] if recording.sampling(text)["temperature"] == 0 and recording.length[text] > 1]
    texts = across_domains(recording, texts)[: setting.pick(2, 1)]
    pair = in_fixed_shapes(setting)
    policies = list({policy.spec(): policy for policy in entrants(setting).values()}.values())
    found = break_down(recording, pair, policies, "eagle3", cost, texts)
    return {
        "per_cycle_ms": {
            name: part.per_cycle() | {"cycles": part.cycles, "overhead": part.overhead} for name, part in found.items()
        }
    }


def against_random(setting: Setting) -> dict[str, Any]:
    """Plain steps and verifications of the embedded target and of one with random weights, in turns, on the same text."""
    from benchmarks.gpu.passes import spread, timed_forward
    from benchmarks.gpu.shapes import random_target
    from live.graphed import GraphedModel
    from traces.profile import running_text

    pair, context = setting.embedded(), setting.pick(512, 32)
    other = random_target(setting.true_shape, torch.bfloat16, setting.device, seed=5)
    text = running_text(pair, 1, context)
    networks = {"embedded": pair.model, "random": other}
    models = {name: GraphedModel(network, 1, context + 256, graphs=setting.graphs) for name, network in networks.items()}
    samples: dict[tuple[str, int], list[float]] = {}
    for model in models.values():
        model.reset(1)
        model.prefill(text, logits="none")
    ways = [(name, count) for name in models for count in setting.pick((1, 16, 64), (1, 8))]
    for number in range(setting.pick(30, 2)):
        random.Random(number).shuffle(ways)
        for name, count in ways:
            ms = timed_forward(models[name], 1, context, count)
            if number:
                samples.setdefault((name, count), []).append(ms)
    rows = [
        {"model": name, "tokens": count, "ms": round(statistics.median(values), 5), "spread_ms": round(spread(values), 5)}
        for (name, count), values in sorted(samples.items())
    ]
    return {"context": context, "rows": rows}
