"""How models are named and fetched, and what is resolved and said when a pair is put together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from live import hub, loading
from live.decode import SpeculativeDecoder
from live.eagle3 import Eagle3Head
from live.hub import Source, parse_source
from live.pair import load_pair
from policies.errors import UserError
from policies.registry import load_policy
from tests.live.tiny import build

# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("org/model", "org/model", {}),
        ("org/model(revision=abc123)", "org/model", {"revision": "abc123"}),
        ("org/model(revision='0123')", "org/model", {"revision": "0123"}),
        ("./head(layers=[2, 16, 29], norm_before_residual=True)", "./head", {"layers": [2, 16, 29], "norm_before_residual": True}),
    ],
)
def test_sources_are_read_and_written(text, name, options):
    source = parse_source(text)
    assert (source.name, source.options) == (name, options)
    assert parse_source(str(source)) == source


def test_a_sources_own_options_come_before_the_defaults(tmp_path):
    assert parse_source("org/model", revision="abc") == Source("org/model", {"revision": "abc"})
    assert parse_source("org/model(revision=xyz)", revision="abc").revision == "xyz"
    folder = tmp_path / "odd(revision=1)"
    folder.mkdir()
    assert parse_source(str(folder)) == Source(str(folder))  # a folder may be called so


@pytest.mark.parametrize(
    ("text", "said"), [("a(b", None), ("a(layers=)", "cannot read"), ("a(x=1)", "no option 'x'"), ("a(5)", "'5'")]
)
def test_sources_that_cannot_be_read(text, said):
    if said is None:
        assert parse_source(text).name == text
    else:
        with pytest.raises(UserError, match=said):
            parse_source(text)


# ---- the hub's cache, without a network ------------------------------------------------------------------------------


def cached(monkeypatch: pytest.MonkeyPatch, home: Path, name: str, folder: str, commit: str) -> None:
    """Put ``folder`` into a hub cache under ``home`` as commit and branch main of ``name``, and take the network away."""
    repository = home / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_hub_ids_and_revisions_without_a_network(tiny_pair, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_pair.eagle3, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"norm.weight": tensors["norm.weight"] + 1}, other / "model.safetensors")
    first, second = "a" * 40, "b" * 40
    cached(monkeypatch, tmp_path / "hub", "some/head", tiny_pair.eagle3, first)
    cached(monkeypatch, tmp_path / "hub", "some/head", str(other), second)  # main moves on
    pair = load_pair(tiny_pair.target, ["some/head", tiny_pair.draft])
    pinned = load_pair(tiny_pair.target, [f"some/head(revision={first!r})"])
    norms = [p.networks["head"].head.norm.weight for p in (pair, pinned)]
    assert torch.equal(norms[0], norms[1] + 1)
    ids = [p.description["drafters"][0]["id"] for p in (pair, pinned)]
    assert ids == ["some/head", f"some/head(revision={first!r})"]
    hashes = [p.description["drafters"][0]["weights_sha256"] for p in (pair, pinned)]
    assert hashes[0] != hashes[1]
    again = load_pair(tiny_pair.target, ids[1:])  # what a recording keeps finds the same files
    assert again.description["drafters"][0]["weights_sha256"] == hashes[1]


def test_offline_is_one_clear_sentence(tiny_pair, tmp_path, monkeypatch):
    cached(monkeypatch, tmp_path / "hub", "some/head", tiny_pair.eagle3, "a" * 40)
    for draft in ("some/other", "some/head(revision=branch)"):
        with pytest.raises(UserError, match="check the id and the network, or give a local folder") as told:
            load_pair(tiny_pair.target, [draft])
        assert "\n" not in str(told.value)


# ---- what is resolved ------------------------------------------------------------------------------------------------


def test_what_was_resolved_is_said(tiny_pair, tmp_path, capsys):
    load_pair(tiny_pair.target, [tiny_pair.eagle3])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eagle3: ")]
    assert told == [
        "eagle3: EAGLE-3 head, official layout; reads what enters layers 2, 3, 3 (official choice); "
        "un-normed residual; rotary base 10000"
    ]
    pair = load_pair(tiny_pair.target, [f"{tiny_pair.eagle3}(layers=[1, 3, 6], norm_before_residual=True)"])
    told = capsys.readouterr().err
    assert "layers 1, 3, 6 (as asked); normed residual" in told
    assert pair.captured == (1, 3, 6) and pair.networks["eagle3"].head.config.norm_before_residual
    assert pair.description["drafters"][0]["captured_layers"] == [1, 3, 6]
    other = shutil.copytree(tiny_pair.eagle3, tmp_path / "second")
    both = load_pair(tiny_pair.target, [tiny_pair.eagle3, f"{other}(layers=[1, 3, 6])"])  # each finds its own among all streams
    assert both.captured == (2, 3, 3, 1, 3, 6) and both.networks["second"].features == slice(96, 192)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("layers=[1, 2]", "3 whole numbers"),
        ("layers='2'", "3 whole numbers"),
        ("layers=[1, 2, 7]", "beyond the target's 6"),
        ("layers=[-1, 2, 3]", "beyond"),
    ],
)
def test_bad_layers(tiny_pair, options, said):
    with pytest.raises(UserError, match=said):
        load_pair(tiny_pair.target, [f"{tiny_pair.eagle3}({options})"])


def test_heads_of_other_targets_are_refused(tiny_pair, tmp_path):
    other = shutil.copytree(tiny_pair.eagle3, tmp_path / "other")
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"target_hidden_size": 64}))
    with pytest.raises(UserError, match="reads features of 64 numbers, the target's have 32"):
        load_pair(tiny_pair.target, [str(other)])
    (other / "config.json").write_text(json.dumps(about | {"eagle_aux_hidden_state_layer_ids": [2, 40, 77]}))
    with pytest.raises(UserError, match="the target has 6"):
        load_pair(tiny_pair.target, [str(other)])
    with pytest.raises(UserError, match="has no layers"):
        load_pair(tiny_pair.target, [f"{tiny_pair.draft}(layers=[2, 3, 3])"])


# ---- vocabularies padded to different sizes over one tokenizer -------------------------------------------------------


@pytest.mark.parametrize("padded", ["draft", "target"])
def test_padded_vocabularies_meet_in_the_tokenizer(tiny_pair, tmp_path, padded):
    """160 tokens; one model has 192 rows, and those beyond the tokenizer shout loudest. They are never proposed."""
    folder = tmp_path / padded
    model = AutoModelForCausalLM.from_pretrained(getattr(tiny_pair, padded))
    tokenizer = AutoTokenizer.from_pretrained(getattr(tiny_pair, padded))
    rows = model.config.vocab_size
    model.resize_token_embeddings(192, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[rows:] = 0.0
        if padded == "draft":  # of two opposite rows one shouts loudest
            model.lm_head.weight[rows] = 50 * model.lm_head.weight[0]
            model.lm_head.weight[rows + 1] = -50 * model.lm_head.weight[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = {"target": tiny_pair.target, "draft": tiny_pair.draft, padded: str(folder)}
    network = load_pair(names["target"], [names["draft"]]).networks["draft"]
    plain = load_pair(tiny_pair.target, [tiny_pair.draft]).networks["draft"]
    found = []
    for one in (network, plain):
        one.reset(1)
        tokens = torch.tensor([[5, 9, 191 if padded == "target" and one is network else rows - 1]])
        source = one.advance(tokens, None, torch.tensor([3]))
        found += [one.open(source, torch.tensor([2]), 8), one.grow(torch.tensor([[0]]), torch.tensor([[7]]), 8)]
    assert all(torch.equal(a.index, b.index) for a, b in zip(found[:2], found[2:], strict=True))
    assert all(torch.allclose(a.logprob, b.logprob) for a, b in zip(found[:2], found[2:], strict=True))


# ---- targets ---------------------------------------------------------------------------------------------------------


def test_device_map_without_accelerate(tiny_pair, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install accelerate"):
        load_pair(tiny_pair.target, [tiny_pair.draft], device_map="auto")


def test_device_map_spreads_the_target_by_hooks(tiny_pair):
    from accelerate import dispatch_model

    plain, placed = (load_pair(tiny_pair.target, [tiny_pair.draft], device_map=where) for where in (None, "auto"))
    layers = {f"model.layers.{index}": "cpu" for index in range(len(placed.model.model.layers))}
    rest = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    dispatch_model(placed.model, layers | rest, force_hooks=True)  # as on several devices: inputs are carried to every part
    assert hasattr(placed.model.model.layers[0], "_hf_hook")
    said = []
    for pair in (plain, placed):
        policy = load_policy("eagle3(total_tokens=8, depth=3, top_k=4)")
        said.append(SpeculativeDecoder(pair.target(), pair.networks["draft"], policy).generate([[5, 9, 11], [7]], 12))
    assert said[0].tokens == said[1].tokens and said[0].cycles == said[1].cycles


def test_device_map_without_enough_memory(tiny_pair):
    with pytest.raises(UserError, match="too little memory"):
        load_pair(tiny_pair.target, [tiny_pair.draft], device_map="meta")


@pytest.mark.parametrize(("family", "chosen"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_attention_is_chosen_whatever_the_file_prefers(tmp_path, family, chosen):
    build(family).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"attn_implementation": "flash_attention_2"}))
    assert loading.load_model(tmp_path).config._attn_implementation == chosen


def test_foreign_code_runs_only_when_asked(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Model"}
    (tmp_path / "config.json").write_text(json.dumps(about | {"model_type": "theirs", "auto_map": code}))
    (tmp_path / "theirs.py").write_text("print('foreign code ran')\nraise SystemExit\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load_model(tmp_path)
    assert "foreign code ran" not in capsys.readouterr().out


def test_unsupported_models_are_refused_before_their_weights_are_read(tmp_path, monkeypatch):
    from transformers import BloomConfig, GPTNeoConfig, MambaConfig, RwkvConfig, T5Config

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    for number, config in enumerate((BloomConfig(), GPTNeoConfig(), MambaConfig(), RwkvConfig(), T5Config())):
        folder = tmp_path / str(number)
        config.save_pretrained(folder)
        (folder / "model.safetensors").touch()
        with pytest.raises(UserError, match="use a decoder"):
            loading.load_model(folder)


def test_a_model_that_ignores_the_mask_is_found_by_its_numbers(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    build("llama").save_pretrained(tmp_path)
    assert loading.load_model(tmp_path) is not None
    real = LlamaModel.forward

    def deaf(self, *args, attention_mask=None, **kwargs):
        return real(self, *args, attention_mask=None, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", deaf)
    with pytest.raises(UserError, match="gives other numbers in a tree"):
        loading.load_model(tmp_path)

    def broken(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise RuntimeError("no caches here\nsecond line")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", broken)
    with pytest.raises(UserError, match=r"cannot run a tree .*\(no caches here\)"):
        loading.load_model(tmp_path)


def test_reference_head_is_the_shipped_one():
    head = Eagle3Head.from_pretrained(hub.REFERENCE / "eagle3", torch.zeros(6144, 256))
    assert head.config.boundaries(12)[0] == (2, 6, 9) and head.config.layout == "official"
