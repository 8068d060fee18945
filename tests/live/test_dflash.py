"""What sets one DFlash drafter apart from another: trees follow the formula; layouts, and what does not fit, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from live.dflash_config import DFlashConfig
from live.fidelity import check_policy
from live.graphed_dflash import GraphedDFlash
from live.heads import kind_of
from live.pair import load_pair
from live.reference.dflash_training import fill
from policies.errors import UserError
from policies.registry import load_policy
from tests.live.test_head_files import first_answers, written
from tests.live.test_head_variants import some
from tests.live.witnesses import follows_its_formula, random_material
from tests.tiny_heads import DFLASH_LAYERS, DRAFTED
from traces.recording import open_recording

VOCABULARY, SIZE = 160, 32
SLIDING, FULL = "sliding_attention", "full_attention"
Files = tuple[dict, dict[str, Tensor]]


@pytest.fixture(scope="module")
def dflash(tiny_heads) -> Files:
    """Configuration and tensors of the tiny drafter."""
    folder = Path(tiny_heads["dflash"])
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def told(config: dict, own: dict | None = None, **top) -> dict:
    """A configuration with other settings, ``own`` in ``dflash_config``, where nothing says what is causal unless ``own`` does."""
    block = {name: value for name, value in config["dflash_config"].items() if name != "causal"}
    return config | top | {"dflash_config": block | (own or {})}


def check(tiny_pair, folder: str, formula: str | None = None) -> None:
    """That a folder's trees follow the formula over the files in it, or in ``formula``."""
    assert kind_of(folder) == "dflash" and kind_of(formula or folder) == "dflash"
    pair = load_pair(tiny_pair.target, [folder], "float64")
    follows_its_formula(pair, Path(folder).name, formula or folder, *random_material(pair))


ATTENTION = {
    "windows, causal": ({"layer_types": [SLIDING, SLIDING], "sliding_window": 4}, {}),
    "a window and none": ({"layer_types": [FULL, SLIDING], "sliding_window": 3}, {}),
    "windows that see both ways": ({"layer_types": [SLIDING, FULL], "sliding_window": 4}, {"causal": False}),
    "all causal": ({"is_causal": True}, {}),
    "a token more": ({"sample_from_anchor": True}, {}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(tiny_pair, dflash, tmp_path, name):
    config, tensors = dflash
    top, own = ATTENTION[name]
    folder = written(tmp_path / "variant", told(config, own, **top), tensors)
    check(tiny_pair, folder)
    plain = written(tmp_path / "plain", told(config), tensors)
    assert not torch.equal(first_answers(tiny_pair, folder), first_answers(tiny_pair, plain))
    deepest = DRAFTED + (name == "a token more")
    assert next(iter(load_pair(tiny_pair.target, [folder]).networks.values())).deepest == deepest


@pytest.mark.parametrize("name", ATTENTION)
def test_fixed_shapes_answer_as_the_others(tiny_pair, dflash, tmp_path, name):
    """Rows of several lengths, trees, rows that leave, a second cycle, a row that joins."""
    config, tensors = dflash
    top, own = ATTENTION[name]
    pair = load_pair(tiny_pair.target, [written(tmp_path / "variant", told(config, own, **top), tensors)], "float64")
    (ordinary,) = pair.networks.values()
    answers = []
    for network in (ordinary, GraphedDFlash(ordinary.head, capacity=64)):
        draw, found = torch.Generator().manual_seed(1), []

        def caught_up(own, counts: list[int], draw=draw) -> Tensor:
            tokens = torch.randint(4, 150, (len(counts), max(counts)), generator=draw)
            features = torch.randn(len(counts), max(counts), 2 * SIZE, generator=draw, dtype=torch.float64)
            return own.advance(tokens, features, torch.tensor(counts))

        def trees(network, source: Tensor, context: list[int], found=found) -> None:
            first = network.open(source, torch.tensor(context), 3)
            found += [first, network.grow(torch.zeros_like(first.index), first.index, 5)]
            found.append(network.grow(torch.tensor([[1, 2]]).expand(len(source), -1), first.index[:, :2], 2))

        network.reset(3)
        trees(network, caught_up(network, [7, 5, 6]), [7, 5, 6])
        network.gather_rows(torch.tensor([2, 0]))
        source = caught_up(network, [3, 1])
        trees(network, source, [9, 8])
        other = network.beside()
        other.reset(1)
        late = caught_up(other, [12])
        network.join(other)
        trees(network, torch.cat([source, late]), [9, 8, 12])
        answers.append(found)
    for one, two in zip(*answers, strict=True):
        assert torch.equal(one.index, two.index) and torch.allclose(one.logprob, two.logprob, atol=2e-5)
        assert torch.allclose(one.entropy, two.entropy, atol=2e-5)


def test_windows_said_otherwise(tiny_pair, dflash, tmp_path):
    """``use_swa`` puts windows on layers that are not called sliding, and leaves them seeing both ways."""
    config, tensors = dflash
    folder = written(tmp_path / "swa", told(config, {"use_swa": True, "swa_window_size": 4}), tensors)
    formula = told(config, {"causal": False}, layer_types=[SLIDING, SLIDING], sliding_window=4)
    check(tiny_pair, folder, written(tmp_path / "formula", formula, tensors))


def test_windows_that_are_said_not_to_be_causal(tiny_pair, dflash, tmp_path):
    """vLLM's flag; what says of all layers whether they are causal comes first."""
    config, tensors = dflash
    windows = {"layer_types": [SLIDING, SLIDING], "sliding_window": 4}
    folder = written(tmp_path / "flag", told(config, **windows, sliding_window_non_causal=True), tensors)
    check(tiny_pair, folder, written(tmp_path / "formula", told(config, {"causal": False}, **windows), tensors))
    both = told(config, {"causal": True}, **windows, sliding_window_non_causal=True)
    check(tiny_pair, written(tmp_path / "both", both, tensors))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}},
        {"rms_norm_eps": 0.5},
    ],
)
def test_its_own_rotary_base_and_epsilon(tiny_pair, dflash, tmp_path, changed):
    config, tensors = dflash
    folder = written(tmp_path / "own", told(config, **changed), tensors)
    check(tiny_pair, folder)
    assert not torch.equal(first_answers(tiny_pair, folder), first_answers(tiny_pair, written(tmp_path / "as", config, tensors)))


def test_who_calls_itself_otherwise(dflash, tmp_path):
    """The authors' earlier releases are Qwen3 models by name: what tells is the block that describes the drafter."""
    config, tensors = dflash
    assert kind_of(written(tmp_path / "named", config | {"architectures": ["Qwen3ForCausalLM"]}, tensors)) == "dflash"


def test_what_a_checkpoint_brings_itself(tiny_pair, dflash, tmp_path):
    """Embeddings, a mask that is no token, an output layer, biases; and it all comes back from our own files."""
    config, tensors = dflash
    rows = {"q_proj": SIZE, "k_proj": SIZE // 2, "v_proj": SIZE // 2, "o_proj": SIZE}
    own = {f"layers.{layer}.self_attn.{part}.bias": some(count + layer)[:count] for part, count in rows.items() for layer in (0, 1)}
    own |= {"embed_tokens.weight": some(VOCABULARY, SIZE), "mask_embedding": some(SIZE)}
    own |= {"lm_head.weight": 2 * some(SIZE, VOCABULARY).T}
    folder = written(tmp_path / "own", told(config), tensors | own)
    check(tiny_pair, folder)
    (network,) = load_pair(tiny_pair.target, [folder], "float32").networks.values()
    network.head.save_pretrained(tmp_path / "again", torch.float32)
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == {*tensors, *own}
    check(tiny_pair, str(tmp_path / "again"), folder)
    target = load_file(f"{tiny_pair.target}/model.safetensors")["model.embed_tokens.weight"]
    copied = written(tmp_path / "copied", told(config), tensors | {"embed_tokens.weight": target})
    (network,) = load_pair(tiny_pair.target, [copied], "float32").networks.values()
    assert not network.head.config.own_embeddings


def test_what_the_target_does_to_embeddings_and_logits(tiny_pair, dflash, tmp_path):
    config, tensors = dflash
    own = {"input_embedding_scale": 3.0, "output_multiplier": 0.5, "final_logit_softcapping": 2.0}
    check(tiny_pair, written(tmp_path / "scaled", told(config, own), tensors))


def test_a_vocabulary_of_its_own(tiny_pair, dflash, tmp_path):
    config, tensors = dflash
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2))[:90].sort().values
    own = {"lm_head.weight": some(90, SIZE), "d2t": ids - torch.arange(90), "t2d": torch.zeros(VOCABULARY, dtype=torch.bool)}
    folder = written(tmp_path / "short", told(config, draft_vocab_size=90), tensors | own)
    check(tiny_pair, folder)
    assert set(first_answers(tiny_pair, folder)[:1].flatten().long().tolist()) <= set(ids.tolist())


def test_layouts(tiny_pair, tiny_heads, dflash, tmp_path):
    """speculators' configuration and its boundaries; the names of other releases; the file that we write."""
    config, tensors = dflash
    ours = first_answers(tiny_pair, tiny_heads["dflash"])
    assert config["dflash_config"]["target_layer_ids"] == [i - 1 for i in DFLASH_LAYERS]
    layer = {name: value for name, value in config.items() if name not in ("dflash_config", "architectures")}
    nested = {
        "speculators_model_type": "dflash",
        "transformer_layer_config": layer,
        "aux_hidden_state_layer_ids": list(DFLASH_LAYERS),
        "draft_vocab_size": VOCABULARY,
        "block_size": 1 + DRAFTED,
        "mask_token_id": 3,
    }
    ignored = {"verifier_norm.weight": some(SIZE), "rotary_emb.inv_freq": some(4)}
    ignored["d2t"] = torch.zeros(VOCABULARY, dtype=torch.int64)
    folder = written(tmp_path / "speculators", nested, tensors | ignored)
    assert torch.equal(first_answers(tiny_pair, folder), ours)
    boundaries = DFlashConfig.from_file(Path(folder, "config.json"))  # ours keeps them: the last means another stream as an output
    (tmp_path / "boundaries.json").write_text(json.dumps(boundaries.to_json()))
    assert DFlashConfig.from_file(tmp_path / "boundaries.json").boundaries(4) == DFLASH_LAYERS == boundaries.boundaries(4)
    renamed = {f"model.{name}".replace("model.fc.", "encoder.fc."): tensor for name, tensor in tensors.items()}
    renamed["encoder.output_norm_enc.weight"] = renamed.pop("model.hidden_norm.weight")
    stem = "model.layers.1.mlp."
    renamed[f"{stem}gate_up_proj.weight"] = torch.cat([renamed.pop(f"{stem}{part}_proj.weight") for part in ("gate", "up")])
    assert torch.equal(first_answers(tiny_pair, written(tmp_path / "renamed", config, renamed)), ours)


def test_the_last_layers_output_is_the_last_hidden_state(dflash, tmp_path):
    config, tensors = dflash
    folder = written(tmp_path / "last", told(config, {"target_layer_ids": [0, 5]}), tensors)
    read = DFlashConfig.from_file(Path(folder, "config.json"))
    assert read.boundaries(6) == (1, 7) and read.boundaries(7) == (1, 6)


def test_training_fills_blocks_as_decoding_does(tiny_pair, tiny_heads):
    """Blocks at several places of two padded texts, against the network's own."""
    pair = load_pair(tiny_pair.target, [tiny_heads["dflash"]], "float64")
    network, begin = pair.networks["dflash"], torch.tensor([[3, 4, 9], [2, 7, 7]])
    texts = torch.randint(4, 150, (2, 14), generator=torch.Generator().manual_seed(3))
    features = torch.cat([pair.target().prefill(text[None], logits="none").captured for text in texts])
    with torch.inference_mode():
        logits = fill(network.head, features, texts, begin)
        assert logits.shape == (2, 3, DRAFTED, VOCABULARY)
        for row, text in enumerate(texts):
            network.reset(1)
            sources = network.advance(text[None, 1:], features[row : row + 1, :-1], torch.tensor([13]), everywhere=True)
            network.open(sources[0][begin[row] - 1], begin[row], 3)
            for depth in range(DRAFTED):
                assert torch.allclose(network.logits_at(depth), logits[row, :, depth], atol=1e-5)  # its softmax is float32


def test_another_block_is_another_drafter(tiny_pair, tiny_heads, dflash, tmp_path):
    """As engines run it that draft fewer tokens: fewer masks stand beside each other."""
    config, tensors = dflash
    check(tiny_pair, written(tmp_path / "long", told(config, {"block_size": 9}, block_size=9), tensors))
    folder = written(tmp_path / "short", told(config, {"block_size": 3}, block_size=3), tensors)
    asked = load_pair(tiny_pair.target, [f"{tiny_heads['dflash']}(block_size=3)"], "float32")
    assert asked.networks["dflash"].deepest == 2 and asked.description["drafters"][0]["levels"] == 2
    assert torch.equal(first_answers(tiny_pair, f"{tiny_heads['dflash']}(block_size=3)"), first_answers(tiny_pair, folder))
    assert not torch.equal(first_answers(tiny_pair, folder), first_answers(tiny_pair, tiny_heads["dflash"]))
    numbers = [load_pair(tiny_pair.target, [one]).description["drafters"][0] for one in (folder, tiny_heads["dflash"])]
    assert [about["block_size"] for about in numbers] == [3, 5] and asked.description["drafters"][0]["block_size"] == 3
    hashes = [about["config_sha256"] for about in (*numbers, asked.description["drafters"][0])]
    assert hashes[0] == hashes[2] != hashes[1]  # one drafter, whether its file or its name says so
    for wrong in ("1", "'4'", "2.5"):
        with pytest.raises(UserError, match="block_size of"):
            load_pair(tiny_pair.target, [f"{tiny_heads['dflash']}(block_size={wrong})"])


def test_windows_in_the_loop(tiny_pair, dflash, tmp_path):
    """Recorded, replayed and decoded live, alone and behind a rule: every cycle in float64."""
    from traces.record import main

    config, tensors = dflash
    folder = written(tmp_path / "windows", told(config, layer_types=[SLIDING, FULL], sliding_window=6), tensors)
    out = tmp_path / "trace"
    size = ["--limit", "1", "--max-new-tokens", "24", "--dtype", "float64", "--top-m", "4"]
    main(["--target", tiny_pair.target, "--draft", folder, "--prompts", *tiny_pair.prompts, *size, "--out", str(out)])
    pair = load_pair(tiny_pair.target, [folder], "float64")
    for name in ("windows", "prompt_lookup(ngram=2, least=1)+windows"):
        for spec in ("chain(k=9)", "eagle3(total_tokens=12, depth=6, top_k=4)"):
            report = check_policy(open_recording(out), pair, load_policy(spec), name, 24)
            assert report.identical == report.cycles >= 24 and not report.notes


def test_files_that_do_not_fit_are_one_sentence(tiny_pair, dflash, tmp_path):
    config, tensors = dflash
    short = {"lm_head.weight": some(90, SIZE)}
    cases = {
        "DFlash 2": (told(config, {"selector_rank": 4}), tensors),
        "kind dflash2": (told(config, architectures=["DFlash2DraftModel"]), tensors),
        "DSpark": ({"speculators_model_type": "dspark", "markov_rank": 8} | told(config), tensors),
        "attention has sinks": (told(config, {"attention_sink_bias": True}), tensors),
        "shifted labels": (told(config, shift_label=True), tensors),
        "beyond the target's 160 embeddings": (told(config, {"mask_token_id": 160}), tensors),
        "the target has 6": (told(config, {"target_layer_ids": [1, 6]}), tensors),
        "features of 48 numbers": (told(config, target_hidden_size=48), tensors),
        "embeds 99 tokens": (told(config, vocab_size=99, draft_vocab_size=99), tensors),
        "window of no size": (told(config, layer_types=[SLIDING, FULL], sliding_window=None), tensors),
        "2 layers and 3 layer_types": (told(config, layer_types=[FULL] * 3), tensors),
        "lacks 'mask_token_id'": (config | {"dflash_config": {"target_layer_ids": [0]}}, tensors),
        "missing layers.1.mlp.up_proj.weight": (config, {n: t for n, t in tensors.items() if n != "layers.1.mlp.up_proj.weight"}),
        "missing d2t": (told(config, draft_vocab_size=90), tensors | short),
        "outside the target's vocabulary": (told(config, draft_vocab_size=90), tensors | short | {"d2t": torch.full((90,), 150)}),
        "one size": (told(config), tensors | {"d2t": torch.ones(VOCABULARY, dtype=torch.int64)}),
        "d2t is no list": (told(config, draft_vocab_size=90), tensors | short | {"d2t": torch.tensor(3)}),
        "d2t maps 0 tokens where 90": (told(config, draft_vocab_size=90), tensors | short | {"d2t": torch.ones(0).long()}),
        "drafts 90 of 160 tokens": (told(config, draft_vocab_size=90), tensors | {"d2t": torch.zeros(90).long()}),
        "qkv_proj.weight has 0 rows": (config, tensors | {"layers.0.self_attn.qkv_proj.weight": torch.tensor(1.0)}),
        "block_size is 1, not a whole": (told(config, {"block_size": 1}, block_size=1), tensors),
        "num_hidden_layers is 0": (told(config, num_hidden_layers=0), tensors),
        "mask_token_id is -1": (told(config, {"mask_token_id": -1}), tensors),
        "mask_token_id is True": (told(config, {"mask_token_id": True}), tensors),
        "layer of type 'linear_attention'": (told(config, layer_types=["linear_attention", FULL]), tensors),
        "sliding_window is 2.5": (told(config, layer_types=[SLIDING, FULL], sliding_window=2.5), tensors),
        "output_multiplier is -1.0": (told(config, {"output_multiplier": -1.0}), tensors),
        "final_logit_softcapping is '30'": (told(config, {"final_logit_softcapping": "30"}), tensors),
        "layers are '1'": (told(config, {"target_layer_ids": "1"}), tensors),
        "layers are .1, 2.5.": (told(config, {"target_layer_ids": [1, 2.5]}), tensors),
        "num_attention_heads is 4.5": (told(config, num_attention_heads=4.5), tensors),
        "rms_norm_eps is 'small'": (told(config, rms_norm_eps="small"), tensors),
        "value of another kind": (told(config, rope_parameters=[1]), tensors),
    }
    for number, (said, (changed, files)) in enumerate(cases.items()):
        with pytest.raises(UserError, match=said):
            load_pair(tiny_pair.target, [written(tmp_path / str(number), changed, files)])
