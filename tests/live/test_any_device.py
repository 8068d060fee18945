"""Everything runs on a GPU as on a CPU, held against it on a pretended one (tests/live/pretended_gpu.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from live.batcher import Batcher
from live.decode import LiveStep, SpeculativeDecoder
from live.decoding_plain import plain_decode
from live.graphed_eagle import GraphedEagle
from live.graphed_pair import graphed
from live.model import CachedModel
from live.pair import Pair, load_pair
from live.sampling import GREEDY
from policies.contract import Sampling
from policies.registry import load_policy
from tests.live.pretended_gpu import DEVICE, OnDevice, PretendedGpu, pretended_gpu
from tests.policies.cases import make, settings
from traces.analytic import analytic_profile

PROMPTS = [[5, 17, 40, 3, 77], [90, 12, 12, 61, 8, 30, 2], [4, 4, 9], [33, 2, 71, 71]]
COST = analytic_profile("h100", "llama-3.1-8b").cost("eagle3")
SAMPLINGS = (GREEDY, Sampling(temperature=1.0, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=3))
NAMES = ("greedy", "sampled")


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu() as gpu:
        yield gpu


@pytest.fixture
def there(gpu, tiny_pair) -> Pair:
    """The tiny pair in float64 on the GPU."""
    return load_pair(tiny_pair.target, [tiny_pair.eagle3, tiny_pair.draft], "float64", "cuda")


def decoded(
    pair: Pair,
    spec: str,
    sampling: Sampling = GREEDY,
    drafter: str = "eagle3",
    rounds: int = 1,
    target: CachedModel | None = None,
) -> list:
    """What every cycle kept, and tokens and cycles, in each of ``rounds`` generations; texts end one after the other."""
    policy, target = make(spec), pair.target() if target is None else target
    decoder = SpeculativeDecoder(target, pair.draft(drafter), policy, pair.end_tokens, COST, context_limit=128)
    said: list = []

    def kept(step: LiveStep) -> None:
        said.append(step.done.kept.token.tolist())

    for _ in range(rounds):
        done = decoder.generate(PROMPTS[:3], [6, 9, 4], on_step=kept, sampling=sampling)
        assert not done.draft_error
        said += [done.tokens, done.cycles]
    return said


def first_settings() -> list[str]:
    """One setting of every policy."""
    return list({spec.partition("(")[0]: spec for spec in reversed(settings())}.values())


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
def test_plain_decoding(pair64, there, gpu, sampling):
    ours = plain_decode(pair64.plain(), PROMPTS, [9, 15, 4, 12], pair64.end_tokens, sampling=sampling)
    for pair in (there, graphed(there, 128)):
        assert plain_decode(pair.plain(), PROMPTS, [9, 15, 4, 12], pair64.end_tokens, sampling=sampling) == ours
    assert gpu.graphs


@pytest.mark.parametrize("quarter", range(4))
def test_every_policy_as_graphs(pair64, there, gpu, quarter):
    """The head's and the target's forwards replayed from graphs, which were captured under one policy or another."""
    ordinary = {spec: decoded(pair64, spec) for spec in first_settings()[quarter::4]}
    assert not gpu.graphs
    pair = graphed(there, 128)
    target = pair.target()
    for spec, expected in ordinary.items():
        captured, replays = len(gpu.graphs), sum(graph.replays for graph in gpu.graphs)
        assert decoded(pair, spec, target=target) == expected, spec
        assert gpu.graphs and sum(graph.replays for graph in gpu.graphs) - replays > len(gpu.graphs) - captured, spec


@pytest.mark.parametrize("drafter", ["eagle3", "draft", "prompt_lookup(ngram=2, least=1)+eagle3", "suffix"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
def test_every_drafter_call_by_call(pair64, there, drafter, sampling):
    for spec in ("eagle3(total_tokens=9, depth=3, top_k=3)", "chain(k=3)"):
        assert decoded(there, spec, sampling, drafter) == decoded(pair64, spec, sampling, drafter)


def test_sampled_text_from_graphs(pair64, there, gpu):
    spec = "eagle3(total_tokens=9, depth=3, top_k=3)"
    assert decoded(graphed(there, 128), spec, SAMPLINGS[1], rounds=2) == decoded(pair64, spec, SAMPLINGS[1], rounds=2)
    assert gpu.graphs


@pytest.mark.parametrize("in_graphs", [False, True], ids=["calls", "graphs"])
def test_requests_that_join(pair64, there, in_graphs):
    said = []
    for pair in (pair64, graphed(there, 128) if in_graphs else there):
        decoder = SpeculativeDecoder(pair.target(), pair.draft("eagle3"), load_policy("eagle3(total_tokens=9, depth=3, top_k=3)"))
        batcher = Batcher(decoder, batch=2)
        requests = [batcher.submit(prompt, limit) for prompt, limit in zip([*PROMPTS, PROMPTS[0]], (6, 14, 9, 11, 8), strict=True)]
        for _ in batcher.stream():
            pass
        assert not batcher.crashes
        said.append([(request.tokens, request.cycles, request.finish) for request in requests])
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize(("spec", "levels"), [("chain(k=3)", 3), ("eagle3(total_tokens=20, depth=6)", 6), ("autoregressive", 0)])
def test_the_host_waits_once_a_level_and_once_for_the_target(gpu, tiny_pair, spec, levels, dtype):
    """Never per node, nor for the many ties of half precision; and what the device is asked for grows with the levels alone."""
    pair = graphed(load_pair(tiny_pair.target, [tiny_pair.eagle3], dtype, "cuda"), 256)
    decoder = SpeculativeDecoder(pair.target(), pair.draft("eagle3"), load_policy(spec))
    decoder.generate(PROMPTS[:1], 40)  # captures the graphs
    decoder.prefill(PROMPTS[:1], 40)
    decoder.step()
    gpu.forget()
    for _ in range(3):
        decoder.step()
    waits, operations = gpu.waits.total() / 3, gpu.operations.total() / 3
    assert waits == levels + 1, gpu.waits
    assert operations <= 24 + 5 * levels, gpu.operations


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("spec", ["chain(k=4)", "eagle3(total_tokens=20, depth=6)"])
def test_a_block_is_waited_for_once(gpu, tiny_pair, tiny_heads, spec, dtype):
    """A DFlash drafter's depths are ranked together, however deep the policy goes."""
    pair = graphed(load_pair(tiny_pair.target, [tiny_heads["dflash"]], dtype, "cuda"), 256)
    decoder = SpeculativeDecoder(pair.target(drafter=pair.draft("dflash")), pair.draft("dflash"), load_policy(spec))
    decoder.generate(PROMPTS[:1], 40)
    decoder.prefill(PROMPTS[:1], 40)
    decoder.step()
    gpu.forget()
    for _ in range(3):
        decoder.step()
    assert gpu.waits.total() / 3 == 2, gpu.waits


def test_nothing_of_a_spoilt_text_is_left(gpu, there):
    """A longer text whose features were not numbers, and then another one in the same graph."""
    head = there.networks["eagle3"].head
    draw = torch.Generator().manual_seed(1)
    features = torch.randn((1, 9, head.fc.in_features), generator=draw, dtype=torch.float64).to("cuda")
    tokens, answers = torch.arange(9)[None], []
    for spoilt in (False, True):
        network = GraphedEagle(head, capacity=64)
        if spoilt:
            network.advance(tokens, features * torch.nan, torch.tensor([9]))
        network.reset(1)
        source = network.advance(tokens[:, :7], features[:, :7], torch.tensor([7]))
        found = network.open(source, torch.tensor([7]), 3)
        answers.append([*found, *network.grow(torch.zeros_like(found.index), found.index, 3)])
    assert gpu.graphs and all(map(torch.equal, *answers)) and not answers[0][1].isnan().any()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
def test_recording(pair64, there, sampling):
    from traces.capture import CaptureSettings, TargetCapture, capture_forest, generate_texts

    cover = (load_policy("eagle3(top_k=4, depth=3)"), load_policy("static"), load_policy("chain(k=5)"))
    asked = CaptureSettings(6, 8, 12, 10, cover, False, 4)
    said = []
    for pair in (pair64, there):
        with torch.inference_mode():
            for number, text in enumerate(generate_texts(pair, PROMPTS[:2], asked, sampling)):
                capture = TargetCapture(pair.target(), text, sampling, number)
                columns = [capture.columns(12)]
                columns += [capture_forest(network, capture, text, asked, 128) for network in pair.networks.values()]
                said.append((text.tokens, columns))
    for (tokens, ours), (others, theirs) in zip(said[: len(said) // 2], said[len(said) // 2 :], strict=True):
        assert tokens == others
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)


def same(one, other) -> None:
    """Two sets of recorded columns hold the same, up to the last bits of float32."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        for ours, theirs in zip(one, other, strict=True):
            same(ours, theirs)
    elif hasattr(one, "dtype"):
        assert torch.allclose(torch.as_tensor(one).double(), torch.as_tensor(other).double(), atol=1e-6, equal_nan=True)
    else:
        assert one == other


def test_a_gpu_refuses_host_tensors_and_numpy(gpu):
    values = torch.rand(3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        values + torch.arange(3)
    with pytest.raises(RuntimeError, match="same device"):
        values.scatter(0, torch.zeros(1, dtype=torch.int64), 0.0)
    with pytest.raises(TypeError, match="numpy"):
        values.numpy()
    there = values[torch.arange(2)] * torch.tensor(2.0) + torch.arange(2).to(DEVICE)
    assert isinstance(there, OnDevice) and there.device == DEVICE and not there.is_cpu and there.cpu().is_cpu


def test_a_capture_refuses_what_moves_numbers_or_waits(gpu):
    from live.graphed_network import record

    fixed = torch.ones(3, device="cuda")
    wrong = (
        (lambda: fixed * fixed.sum().item(), "waits"),
        (lambda: fixed[fixed > 0], "waits"),
        (lambda: fixed.cpu() * 2, "during a capture"),
        (lambda: fixed * torch.tensor([1.0, 2.0, 3.0], device="cuda"), "during a capture"),
        (lambda: fixed[torch.tensor([0, 1])], "during a capture"),
    )
    for compute, said in wrong:
        with pytest.raises((AssertionError, RuntimeError), match=said):
            record(compute, DEVICE, None)


def test_a_replay_reads_where_it_read_and_a_result_stands_until_the_next_replay(gpu):
    from live.graphed_network import record

    fixed, outside = torch.ones(3, device="cuda"), [torch.full((3,), 2.0, device="cuda")]
    one, result = record(lambda: fixed * 2, DEVICE, "memory")
    other, _ = record(lambda: fixed * outside[0], DEVICE, "memory")
    fixed.fill_(3.0)
    assert result.isnan().all()  # a capture computes nothing
    one.replay()
    assert result.tolist() == [6.0, 6.0, 6.0]
    other.replay()
    assert result.isnan().all()
    outside.clear()
    with pytest.raises(AssertionError, match="freed"):
        other.replay()


def test_fidelity(gpu, tiny_recording, tmp_path):
    """A recording made on a CPU against decoding there."""
    from live.fidelity import main

    policies = ["--policy", "eagle3(total_tokens=9, depth=3, top_k=3)", "--policy", "chain(k=3)"]
    report = tmp_path / "report.json"
    few = ["--cycles", "6", "--witness", "0", "--skip-generate", "--json", str(report)]
    assert main([str(tiny_recording), *policies, *few, "--device", "cuda"]) == 0
    checks = json.loads(report.read_text())["policies"]
    assert len(checks) == 4 and all(check["identical"] == check["cycles"] >= 6 for check in checks)


def test_inside_generate(gpu, tiny_pair):
    """Greedy beside another row, and with a stop string and a padded prompt: as on a CPU."""
    from live.hook import speculate
    from live.loading import load_model, load_tokenizer

    said, tokenizer = [], load_tokenizer(tiny_pair.target)
    prompts = torch.tensor([[7, 5, 17, 40], [90, 12, 61, 8]])
    for device in ("cpu", "cuda"):
        model = load_model(tiny_pair.target, "float64", device)
        for draft in (tiny_pair.eagle3, f"suffix+{tiny_pair.eagle3}"):
            custom = speculate(draft=draft, policy="chain(k=3)", tokenizer=tokenizer, stop_strings=["e"])
            given = {"input_ids": prompts.to(device), "attention_mask": torch.ones_like(prompts).to(device)}
            said.append(model.generate(**given, custom_generate=custom, max_new_tokens=10).tolist())
    assert said[:2] == said[2:]


def test_commands(gpu, tiny_pair, tiny_recording, tmp_path, capsys):
    """Bench with its breakdown, an answer, and a recording that names the GPU."""
    from live import bench, generate
    from traces import record

    models, there = ["--target", tiny_pair.target, "--draft", tiny_pair.eagle3], ["--device", "cuda"]
    asked = [str(tiny_recording), *there, "--policy", "chain(k=3)", "--texts", "1", "--rounds", "1", "--drafter", "eagle3"]
    bench.main(asked)
    bench.main([*asked, "--breakdown"])
    assert capsys.readouterr().out.count("chain(k=3)") >= 2
    generate.main(["the cat sat", *models, *there, "--policy", "chain(k=3)", "--max-new-tokens", "8"])
    assert capsys.readouterr().out.strip()
    record.main(tiny_pair.record(tmp_path / "trace", *there, "--limit", "1", "--max-new-tokens", "4"))
    assert json.loads((tmp_path / "trace" / "manifest.json").read_text())["device"] == "a pretended GPU"


@pytest.mark.long
def test_profile(gpu, tiny_pair, tmp_path):
    from traces.costs import load_profile
    from traces.profile import main

    shapes = ["--tokens", "1", "4", "--widths", "1", "4", "--contexts", "40", "--batches", "1", "2", "--repeats", "1"]
    out = tmp_path / "profile.json"
    main(["--target", tiny_pair.target, "--draft", tiny_pair.eagle3, "--device", "cuda", *shapes, "--out", str(out)])
    assert load_profile(out).content["device"] == "a pretended GPU"
