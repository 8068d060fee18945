"""EAGLE-1, Medusa and DFlash heads: against their formulas, in every layout, and in the one loop with everybody else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from live.batcher import Batcher
from live.decode import SpeculativeDecoder
from live.explain import TapedDrafter, same_decision
from live.fidelity import check_policy
from live.graphed_pair import graphed
from live.hook import attach
from live.medusa import MedusaHeads
from live.medusa_network import MedusaNetwork
from live.model import CachedModel, last_hidden
from live.pair import Pair, load_pair, place_in
from policies.chain import Chain
from policies.contract import Expansion, Sampling
from policies.drafting import draft
from policies.errors import UserError
from policies.registry import load_policy
from policies.verification import pack
from sim.recorded import ListeningDrafter, RecordedDrafter, RecordedText
from sim.replay import replay
from tests.live.pretended_gpu import pretended_gpu
from tests.live.test_batcher import submitted
from tests.live.test_networks import CONTEXTS, Grown, close, grow, rows
from tests.live.witnesses import follows_its_formula, random_material
from tests.tiny_heads import DFLASH_LAYERS, DRAFTED, HEADS, NAMES
from traces.measure import DraftStage
from traces.recording import Recording, open_recording

PROMPTS = [[5, 17, 40, 3, 77], [90, 12, 12, 61, 8, 30, 2], [4, 4, 9]]
POLICIES = (
    "eagle3(total_tokens=12, depth=3, top_k=4)",
    "eagle3(total_tokens=30, depth=8, top_k=8)",
    "chain(k=9)",
    "static(tree=medusa)",
    "dyspec(nodes=12, depth=8)",
    "opt_tree(threshold=0.02)",
)


@pytest.fixture(scope="module")
def material(headed_pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    return random_material(headed_pair)


# ---- what they compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shared_text_rows_and_formula_agree(headed_pair, tiny_heads, material, name):
    follows_its_formula(headed_pair, name, tiny_heads[name], *material)


@pytest.mark.parametrize("name", NAMES)
def test_padding_disturbs_nobody_and_rows_leave(headed_pair, material, name):
    text, features, tokens = material
    network, stay = headed_pair.networks[name], torch.tensor([3, 1])
    with torch.inference_mode():
        whole = grow(network, rows(network, text, features, CONTEXTS), CONTEXTS, tokens)
        holed = grow(network, rows(network, text, features, CONTEXTS), CONTEXTS, tokens, padded=(1, 2))
        source = rows(network, text, features, CONTEXTS)
        network.gather_rows(stay)
        left = grow(network, source[stay], CONTEXTS[stay], tokens[stay])
    keep = [node for node in range(8) if node != 3]
    assert close(Grown(*(part[:, keep] for part in holed[:3]), holed.paths), Grown(*(part[:, keep] for part in whole[:3]), []))
    assert close(left, whole, stay)


def test_the_last_hidden_state_is_captured_for_every_family():
    from tests.live.tiny import FAMILIES, build

    text = torch.randint(4, 90, (1, 9), generator=torch.Generator().manual_seed(1))
    for family in FAMILIES:
        model = build(family, torch.float64)
        captured = CachedModel(model, layers_to_capture=(last_hidden(model), 1)).prefill(text).captured
        with torch.no_grad():
            wanted = model(input_ids=text, output_hidden_states=True).hidden_states
        assert torch.allclose(captured, torch.cat([wanted[-1], wanted[1]], -1), atol=1e-10), family


def test_heads_share_one_pass_of_the_target(headed_pair):
    """Each finds its own streams among all that are captured; two heads that read the same ones share them."""
    assert headed_pair.captured == (2, 3, 3, 7, *DFLASH_LAYERS)
    slices = [slice(0, 96), slice(96, 128), slice(96, 128), slice(128, 192)]
    assert [headed_pair.networks[name].features for name in ("eagle3", *NAMES)] == slices
    assert place_in((2, 3, 5), (3, 5), 4) == ((2, 3, 5), slice(4, 12))
    assert place_in((2, 3, 5), (5, 7), 4) == ((2, 3, 5, 5, 7), slice(12, 20))


# ---- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_float64_is_the_proof(headed_recording, headed_pair, name, temperature):
    recording = open_recording(headed_recording)
    for spec in POLICIES:
        report = check_policy(recording, headed_pair, load_policy(spec), name, 24, temperature)
        assert report.identical == report.cycles >= 24 and not report.notes, spec
        assert report.largest < 1e-5


@pytest.mark.parametrize("first", ["prompt_lookup(ngram=2, least=1)", "suffix"])
def test_a_rule_before_heads(headed_recording, headed_pair, first):
    for spec in POLICIES[1:3]:
        report = check_policy(open_recording(headed_recording), headed_pair, load_policy(spec), f"{first}+medusa", 24)
        assert report.identical == report.cycles >= 24 and not report.notes


def test_no_tree_is_deeper_than_there_are_heads(headed_recording, headed_pair):
    recording = open_recording(headed_recording)
    assert (recording.deepest("medusa"), recording.deepest("eagle1")) == (HEADS, None)
    log = replay(recording, load_policy("chain(k=9)"), "medusa")
    assert log.coverage == 1 and int(log.levels.max()) == HEADS and int(log.kept.max()) == HEADS
    assert int(log.accepted.max()) > 1, "the heads have learned nothing, and the test says little"
    before = replay(recording, load_policy("chain(k=9)"), "prompt_lookup(ngram=2, least=1)+medusa")
    assert int(before.kept.max()) == HEADS and int(before.looked_up.sum()) > 0
    decoder = SpeculativeDecoder(headed_pair.target(), headed_pair.draft("medusa"), load_policy("chain(k=9)"))
    kept = []
    done = decoder.generate(PROMPTS[:1], 24, on_step=lambda step: kept.append(int(step.done.draft.kept.sum()) - 1))
    assert max(kept) == HEADS and done.draft_error is None
    network = MedusaNetwork(headed_pair.networks["medusa"].heads)
    with torch.inference_mode():
        network.open(torch.zeros(1, 32, dtype=torch.float64), torch.tensor([4]), 2)
        narrow, wide = (network.grow(torch.tensor([[0]]), torch.tensor([[5]]), width) for width in (1, 3))  # each what it asked for
        assert narrow.index.shape[2] == 1 and wide.index.shape[2] == 3 and narrow.index[0, 0, 0] == wide.index[0, 0, 0]
        network.open(torch.zeros(1, 32, dtype=torch.float64), torch.tensor([4]), 2)
    with torch.inference_mode(), pytest.raises(ValueError, match="4 Medusa heads"):
        for slot in range(HEADS):
            network.grow(torch.tensor([[slot]]), torch.tensor([[5]]), 2)


class AsFarAsItReaches(Chain):
    """Two children of the root where no tree could be deeper than the heads, else one: who does not know drafts another tree."""

    def expand(self, tree, cycle, state):
        return None if tree.levels else Expansion(tree.root_nodes(), 2 if int(cycle.reach.max()) <= HEADS else 1)


def test_every_drafter_knows_how_deep_its_heads_draft(headed_recording):
    """Taped, asked again with what was taped, and listened to."""
    recording, policy = open_recording(headed_recording), AsFarAsItReaches(20)
    text = RecordedText(recording)
    heads = RecordedDrafter(recording, "medusa", text)
    zero = torch.zeros(1, dtype=torch.int64)
    cycle = text.cycle(zero, zero, zero, zero, recording.manifest["context_limit"])
    tape = TapedDrafter(heads)
    for drafter in (heads, tape, ListeningDrafter(heads)):
        drafted = draft(policy, drafter, cycle, policy.begin(cycle, {}))
        assert drafted.tree.width == 3
    assert same_decision(policy, cycle, {}, tape, pack(drafted.tree, drafted.kept), int(drafted.tree.token[0, 0]))


def test_batches_and_graphs_decode_the_same(headed_pair):
    """Texts that end one after the other, in fixed shapes as well; and a head of either kind beside none."""
    for name in NAMES:
        said = []
        for one in (headed_pair, graphed(headed_pair, 128)):
            decoder = SpeculativeDecoder(one.target(), one.draft(name), load_policy(POLICIES[1]), one.end_tokens)
            done = decoder.generate(PROMPTS, [9, 24, 16], sampling=Sampling(temperature=0.7, seed=2))
            assert done.draft_error is None
            said.append((done.tokens, done.cycles))
        assert said[0] == said[1]


@pytest.mark.parametrize("name", ("eagle3", *NAMES))
def test_who_joins_drafts_with_the_streams_of_its_own_head(headed_pair, name):
    """Beside heads that read others: nothing crashes, and a request takes as many cycles as it takes alone."""
    for one in (headed_pair, graphed(headed_pair, 128)):
        decoder = SpeculativeDecoder(one.target(), one.draft(name), load_policy("chain(k=4)"), one.end_tokens)
        batcher = Batcher(decoder, batch=3)
        requests = submitted(batcher, PROMPTS, 8)
        batcher.run()
        assert not batcher.crashes
        for request in requests:
            text = torch.tensor([request.text])
            done = decoder.generate([request.prompt], request.max_new_tokens, sampling=request.sampling, text=text)
            assert (request.tokens, request.cycles) == (done.tokens[0], done.cycles[0])
        assert sum(request.cycles for request in requests) < sum(len(request.tokens) - 1 for request in requests)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_pretended_gpu(tiny_pair, tiny_heads, headed_pair, name):
    decoded = []
    with pretended_gpu():
        there = load_pair(tiny_pair.target, [tiny_heads[name]], "float64", "cuda")
        for one in (headed_pair, there, graphed(there, 128)):
            decoder = SpeculativeDecoder(one.target(), one.draft(name), load_policy(POLICIES[0]), one.end_tokens)
            done = decoder.generate(PROMPTS, [6, 9, 4])
            assert done.draft_error is None
            decoded.append((done.tokens, done.cycles))
    assert decoded[0] == decoded[1] == decoded[2]


def test_what_is_missing_is_drafted_later(tiny_pair, tiny_heads, tmp_path, capsys):
    from traces.record import main

    out = tmp_path / "trace"
    drafts = [*(word for folder in tiny_heads.values() for word in ("--draft", folder)), "--cover", "chain(k=2)"]
    size = ["--limit", "1", "--max-new-tokens", "12", "--dtype", "float64", "--top-m", "4"]
    main(["--target", tiny_pair.target, *drafts, "--prompts", *tiny_pair.prompts, *size, "--out", str(out)])
    wide = load_policy(POLICIES[1])
    assert all(replay(open_recording(out), wide, name).coverage < 1 for name in NAMES)
    main(["--fill", str(out), "--policy", POLICIES[1]])
    assert all(replay(open_recording(out), wide, name).coverage == 1 for name in NAMES)
    whole = load_pair(tiny_pair.target, list(tiny_heads.values()), "float64")
    assert all(_identical(open_recording(out), whole, name) for name in NAMES)


def _identical(recording: Recording, pair: Pair, name: str) -> bool:
    report = check_policy(recording, pair, load_policy(POLICIES[1]), name, 8)
    return report.identical == report.cycles


def test_what_was_resolved_is_said_and_recorded(headed_pair, tiny_pair, tiny_heads, capsys):
    load_pair(tiny_pair.target, list(tiny_heads.values()), "float32")
    told = capsys.readouterr().err
    assert "eagle1: EAGLE-1 head; reads the last hidden state; rotary base 10000" in told
    assert "medusa: 4 Medusa heads; read the last hidden state, the target's own output layer" in told
    assert "dflash: DFlash drafter, official layout, 4 tokens a block; reads what enters layers 1, 4; rotary base 10000" in told
    kinds = [("eagle", [7]), ("medusa", [7]), ("dflash", list(DFLASH_LAYERS))]
    about = {entry["name"]: entry for entry in headed_pair.description["drafters"]}
    assert [(about[name]["kind"], about[name]["captured_layers"]) for name in NAMES] == kinds
    assert [about[name].get("levels") for name in NAMES] == [None, HEADS, DRAFTED]


# ---- in the commands -------------------------------------------------------------------------------------------------


def test_a_profile_and_what_is_priced_by_it(tiny_pair, tiny_heads, headed_recording, tmp_path, capsys):
    """No level below the heads is timed; the loops are those of a drafter that drafts as deep as asked, if there is one."""
    from sim.contest import main as replayed
    from traces.profile import main

    out = tmp_path / "profile.json"
    drafts = [word for folder in (tiny_heads["medusa"], tiny_pair.eagle3) for word in ("--draft", folder)]
    sizes = ["--tokens", "1", "8", "16", "--contexts", "16", "60", "--widths", "1", "4", "--repeats", "1", "--policy", "eagle3"]
    main(["--target", tiny_pair.target, *drafts, "--dtype", "float64", *sizes, "--batches", "1", "--out", str(out)])
    content = json.loads(out.read_text())
    assert set(content["draft"]) == {"medusa", "eagle3"} and max(content["overhead"]["eagle3"]["levels"]) > HEADS
    capsys.readouterr()
    what = [str(headed_recording), "--drafter", "medusa", "--profile", str(out), "--policy", POLICIES[0]]
    replayed([*what, "--temperature", "0"])
    assert "ms/token" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing while that is verified"):
        replayed([*what, "--execution", "pipelined"])


@pytest.mark.parametrize("count", [1, 2])
def test_few_heads_are_timed_as_deep_as_they_go(headed_pair, material, count):
    """The root's children come with the catch-up; each further head is one level, and none is timed that is not there."""
    heads = headed_pair.networks["medusa"].heads
    few = MedusaHeads(replace(heads.shape, heads=count), headed_pair.model.lm_head).double().requires_grad_(False)
    few.load_state_dict(heads.state_dict(), strict=False)
    text, features, _ = material
    stage = DraftStage(MedusaNetwork(few, features=headed_pair.networks["medusa"].features), text, features, text.device)
    stage.settle(6)
    spent = stage.level(3)
    assert len(spent) == 1 and (spent == [0.0]) == (count == 1)


def test_inside_generate(tiny_pair, tiny_heads):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import live

    model = AutoModelForCausalLM.from_pretrained(tiny_pair.target, dtype=torch.float64).eval()
    inputs = AutoTokenizer.from_pretrained(tiny_pair.target)("what is 2 plus 3", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    for name in NAMES:
        ours = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, custom_generate=live.speculate(draft=tiny_heads[name], policy=POLICIES[0])
        )
        assert torch.equal(ours, plain)
        wanted = DFLASH_LAYERS if name == "dflash" else (7,)  # behind the last of six layers and the norm
        assert attach(model, tiny_heads[name], None)[0].layers_to_capture == wanted


def test_a_sweep_beyond_the_heads_is_what_replay_gives(headed_recording):
    """One drafting per position for all depths, of which some are more than there are heads."""
    from sim.family import replay_family

    recording = open_recording(headed_recording)
    policies = [load_policy(f"eagle3(total_tokens={size}, depth={depth}, top_k=4)") for size in (6, 20) for depth in (2, 4, 6)]
    for policy, found in zip(policies, replay_family(recording, policies, "medusa"), strict=True):
        alone = replay(recording, policy, "medusa")
        for column in ("position", "accepted", "kept", "levels", "missing"):
            assert torch.equal(getattr(found, column), getattr(alone, column)), (policy.spec(), column)


@pytest.mark.parametrize(("name", "least"), [("medusa", 1.3), ("dflash", 1.5)])
def test_the_shipped_heads_draft(name, least):
    """Greedy text is the target's own, and of two drafted tokens a cycle some are accepted."""
    from live.decoding_plain import plain_decode
    from live.pair import encode_prompt

    shipped = load_pair("reference", [f"reference/{name}"], "float32")
    prompt = encode_prompt(shipped.tokenizer, [{"role": "user", "content": "Tell me a story about a small dog."}])
    decoder = SpeculativeDecoder(shipped.target(), shipped.draft(name), load_policy("chain(k=2)"), shipped.end_tokens)
    done = decoder.generate([prompt], 40)
    assert done.tokens == plain_decode(shipped.plain(), [prompt], 40, shipped.end_tokens)
    assert (len(done.tokens[0]) - 1) / done.cycles[0] > least
