"""Is everything as it should be before minutes are spent? The machine, the embedded pair, CUDA graphs."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.embedding import embedded_pair, exact_in_half
from benchmarks.gpu.results import Job
from benchmarks.gpu.setting import Setting
from live.distribution import Ranked, log_probabilities
from live.graphed import GraphedModel
from live.model import CachedModel
from live.pair import Pair, encode_prompt
from traces.machine import asked_of_driver
from traces.prompts import load_prompts, sample_specs

LARGEST = 1e-3
"""By which a graph's numbers may differ from those of plain calls."""


def jobs(setting: Setting) -> list[Job]:
    return [
        Job("settings", lambda _: settings(), 1, 25),
        Job("graphs on the small pair", lambda _: graphed_decoding(setting), 10, 60),
        Job("embedding at true size", lambda _: true_embedding(setting), 15, 60),
        Job("embedding in float64", lambda _: float64_embedding(setting), 10, 40),
    ]


def settings() -> dict[str, Any]:
    """How the GPU is set, which stays as it is: in a compute mode that allows one process alone, fidelity and recording fail."""
    return {"compute_mode": asked_of_driver("compute_mode")}


def texts_of(pair: Pair, count: int, new: int) -> list[list[int]]:
    """Prompts of all domains, each with the pair's own greedy answer."""
    from live.decoding_plain import plain_decode

    prompts = [encode_prompt(pair.tokenizer, prompt.messages) for prompt in load_prompts(sample_specs(), limit=count)]
    said = plain_decode(CachedModel(pair.model, len(prompts)), prompts, new, pair.end_tokens)
    return [prompt + answer for prompt, answer in zip(prompts, said, strict=True)]


def float64_embedding(setting: Setting) -> dict[str, Any]:
    """Log-probabilities of the pair in a large shape of few neurons, against the small one, in float64 on this device."""
    from benchmarks.gpu.shapes import TOY

    small = setting.small_pair("float64", ("reference/eagle3",))
    large = embedded_pair(small, TOY, torch.float64, setting.device)
    return {"shape": TOY.name} | compared(small, large, texts_of(small, 1, setting.pick(64, 8)))


def true_embedding(setting: Setting) -> dict[str, Any]:
    """The same at LLaMA-3.1-8B's size in bfloat16, against the small pair in bfloat16; and fixed shapes against any shape."""
    small, large = setting.small_pair("bfloat16", ("reference/eagle3",)), setting.embedded()
    texts = texts_of(small, 1, setting.pick(48, 8))
    told = {"shape": setting.true_shape.name, "exact_in_half": exact_in_half(small.model, setting.true_shape)}
    return told | compared(small, large, texts) | graphs_against_calls(large, texts[0], setting.graphs)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where one of them is no number, which a maximum over several would pass over."""
    largest = (one.double() - other.double()).abs().max()
    return float(largest) if bool(largest.isfinite()) else float("inf")


@torch.no_grad()
def compared(small: Pair, large: Pair, texts: list[list[int]]) -> dict[str, Any]:
    """How log-probabilities of target and head (first draft level, true features) agree, over all places of the texts."""
    words = small.description["target"]["vocabulary"]
    largest, same, divergence, head_same = 0.0, [], [], []
    for text in texts:
        tokens = torch.tensor([text], device=small.model.device)
        outputs = [
            CachedModel(pair.model, layers_to_capture=pair.captured).prefill(tokens, logits="all") for pair in (small, large)
        ]
        ours, theirs = (log_probabilities(output.logits)[0] for output in outputs)
        theirs = theirs[:, :words]
        largest = max(largest, apart(ours, theirs))
        same += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
        divergence += (ours.exp() * (ours - theirs)).sum(-1).tolist()
        drafted = []
        for pair, output in zip((small, large), outputs, strict=True):
            network = pair.networks["eagle3"]
            network.reset(1)
            count = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
            cells = network.advance(tokens[:, 1:], output.captured[:, :-1], count, everywhere=True)
            drafted.append(network.head.logits(cells).argmax(-1)[0])
        head_same += (drafted[0] == drafted[1]).tolist()
    return {
        "places": len(same),
        "largest_difference_nats": largest,
        "same_argmax": statistics.mean(same),
        "mean_kl_nats": statistics.mean(divergence),
        "head_same_argmax": statistics.mean(head_same),
    }


@torch.no_grad()
def graphs_against_calls(pair: Pair, text: list[int], graphs: bool) -> dict[str, Any]:
    """A tree of 24 nodes behind a text: fixed shapes (as graphs, if wanted and on a GPU) against the forward of any shape."""
    device, count = pair.model.device, 24
    tokens = torch.tensor([text], device=device)
    tree = torch.arange(1, count + 1, device=device)[None]
    positions = torch.full_like(tree, len(text))
    sees = torch.eye(count, dtype=torch.bool, device=device)[None]
    found: list[list[Tensor]] = []
    for model in (CachedModel(pair.model), GraphedModel(pair.model, 1, 1024, graphs=graphs)):
        said = []
        for number in range(2):  # the second time a graph is replayed with other numbers than it was captured with
            model.reset(1)
            model.prefill(tokens[:, number:], logits="none")
            logits = model.forward_tree(tree + number, None, positions - number, sees).logits.clone()
            said.append(log_probabilities(logits)[..., : pair.tokenizer.vocab_size])
        found.append(said)
    calls, fixed = (torch.cat(said) for said in found)
    return {
        "graphs": graphs and device.type == "cuda",
        "graph_largest_difference_nats": apart(calls, fixed),
        "graph_same_argmax": float((calls.argmax(-1) == fixed.argmax(-1)).double().mean()),
    }


def why_no_graphs(pair: Pair) -> str:
    """What speaks against CUDA graphs here: the error of a first capture, of target or head, or numbers that are not those of
    plain calls; "" when nothing does."""
    try:
        largest = graphs_against_calls(pair, list(range(5, 45)), graphs=True)["graph_largest_difference_nats"]
        (sources, calls), (own_sources, graphs) = (head_answers(pair, graphs) for graphs in (False, True))
        for one, other in zip(sources, own_sources, strict=True):
            largest = max(largest, apart(one, other))
        for one, other in zip(calls, graphs, strict=True):
            largest = max(largest, apart(one.logprob, other.logprob))
            ahead = one.logprob[..., 0] - one.logprob[..., 1] > LARGEST  # else which is first is left to the rounding
            if not torch.equal(one.index[..., 0][ahead], other.index[..., 0][ahead]):
                return "the children that they name are not those of plain calls"
    except Exception as error:  # whatever it is, the measurements can do without graphs
        return f"{type(error).__name__}: {error}"[:500]
    return "" if largest < LARGEST else f"their numbers differ from those of plain calls by {largest:.2g}"


@torch.inference_mode()
def head_answers(pair: Pair, graphs: bool) -> tuple[list[Tensor], list[Ranked]]:
    """What the EAGLE-3 head in fixed shapes says in two cycles, each a catch-up (what a root is made of), a root and two levels: so
    every graph is replayed with other numbers than those that it was captured with."""
    from live.graphed_eagle import GraphedEagle

    head = pair.networks["eagle3"].head
    network, draw = GraphedEagle(head, "eagle3", 256, graphs), torch.Generator().manual_seed(0)
    sources, answers, count = [], [], torch.tensor([4])
    for cycle in range(2):
        features = torch.randn((1, 4, head.fc.in_features), generator=draw).to(head.fc.weight)
        tokens = torch.arange(5, 9)[None] + 30 * cycle
        last = network.advance(tokens, features, count).clone()
        sources.append(last.float().cpu())
        answers.append(network.open(last, (cycle + 1) * count, 4))
        for parent in (torch.zeros_like(tokens), torch.arange(1, 5)[None]):
            answers.append(network.grow(parent, tokens + 9, 4))
    return sources, answers


def graphed_decoding(setting: Setting) -> dict[str, Any]:
    """EAGLE-3 decoding of the small pair in float32, ordinary and in fixed shapes, alone and as a batch whose texts end one after
    the other: tokens and cycles must be the same, or a graph was captured wrongly."""
    from live.decode import SpeculativeDecoder
    from live.graphed_pair import graphed
    from policies.registry import load_policy

    pair = setting.small_pair("float32", ("reference/eagle3",))
    prompts = [encode_prompt(pair.tokenizer, prompt.messages) for prompt in load_prompts(sample_specs()[:4], limit=1)]
    limits = [setting.pick(96, 8) - 2 * row for row in range(len(prompts))]
    capacity = max(map(len, prompts)) + max(limits) + 256
    told: dict[str, list] = {}
    for name, own in (("calls", pair), ("fixed shapes", graphed(pair, capacity, setting.graphs))):
        decoder = SpeculativeDecoder(own.target(), own.draft("eagle3"), load_policy("eagle3"), pair.end_tokens)
        found = [decoder.generate(prompts, limits)]
        found += [decoder.generate([prompt], limits[0]) for prompt in prompts[:2]]
        if errors := [done.draft_error for done in found if done.draft_error]:
            raise RuntimeError(errors[0])
        told[name] = [(tokens, cycles) for done in found for tokens, cycles in zip(done.tokens, done.cycles, strict=True)]
    same = [one == other for one, other in zip(told["calls"], told["fixed shapes"], strict=True)]
    return {"texts": len(same), "identical": sum(same), "captured": setting.graphs}
