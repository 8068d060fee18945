"""Loading says what is wrong in one sentence, and hashes go by content."""

from __future__ import annotations

import shutil

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from live import hub, identity, loading
from policies.errors import UserError
from tests.live.tiny import build


def tokenizer(words: str = "a b c d", lower: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words.split()])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        inner.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_loads_exactly_the_asked_dtype(folder, dtype):
    model, tok = loading.load_target(folder, dtype)
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted} and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert tok("a d").input_ids == [1, 4]
    if dtype == "float32":
        want = build("llama").state_dict()
        assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())


def test_bad_folders(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="no config.json"):
        loading.load_target(empty)
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(UserError, match="no weights"):
        loading.load_target(empty)
    with pytest.raises(UserError, match="no model folder"):
        loading.load_target(empty / "absent")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load_target(folder)
    weights.write_bytes(whole)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        loading.load_target(folder)


def test_missing_tensor_is_named(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.up_proj"):
        loading.load_target(folder)


def test_unknown_id_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no model 'nobody/nothing-such'"):
        loading.load_target("nobody/nothing-such")


def test_bad_dtype_device_and_part(folder, monkeypatch):
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        loading.load_target(folder, "int8")
    with pytest.raises(UserError, match="unknown device"):
        loading.load_target(folder, device="abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="not available"):
        loading.load_target(folder, device="cuda")
    monkeypatch.setattr(hub, "REFERENCE", folder)
    with pytest.raises(UserError, match="reference draft"):
        loading.load_reference("draft")


def test_reference_resolves_to_the_shipped_folder(folder, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("reference")
    shutil.copytree(folder, home / "draft")
    monkeypatch.setattr(hub, "REFERENCE", home)
    model, _ = loading.load_reference("draft")
    assert model.dtype == torch.float32
    assert identity.weights_hash(home / "draft") == identity.weights_hash(folder)


def test_tokenizers_are_compared_by_content():
    base = identity.tokenizer_hash(tokenizer())
    assert base == identity.tokenizer_hash(tokenizer()) != identity.tokenizer_hash(tokenizer(lower=True))
    noisy = tokenizer()
    noisy.backend_tokenizer.enable_truncation(4)
    noisy.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    noisy.chat_template = "{{ messages }}"
    identity.check_same_tokenizer(tokenizer(), noisy)
    for other, said in ((tokenizer("a b d c"), "'c' is numbered 3 and 4"), (tokenizer(lower=True), "normalisation")):
        with pytest.raises(UserError, match=said):
            identity.check_same_tokenizer(tokenizer(), other)


def byte_pairs(merges: list[tuple[str, str]] = (("a", "b"), ("c", "d")), added: tuple[str, ...] = ("<end>",)):
    """BPE over four letters and the pairs ab and cd, however they are merged, with added special tokens."""
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd"])}, list(merges)))
    inner.add_special_tokens([AddedToken(word, special=True) for word in added])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        (byte_pairs([("c", "d"), ("a", "b")]), "merges differ"),  # the same words, met in another order
        (byte_pairs([("a", "b"), ("c", "d"), ("ab", "cd")]), "merges differ"),
        (byte_pairs(added=("<stop>",)), "number 7 is '<end>' and '<stop>'"),
        (byte_pairs(added=("<stop>", "<end>")), "'<end>' is numbered 7 and 8"),
        (tokenizer(), "'a' is numbered 0 and 1"),
    ],
)
def test_tokenizers_that_number_text_differently(draft, said):
    with pytest.raises(UserError, match=said):
        identity.check_same_tokenizer(byte_pairs(), draft)
    with pytest.raises(UserError, match="different tokenizers"):
        identity.check_same_tokenizer(draft, byte_pairs())


def test_tokens_that_only_one_has_added_are_no_hindrance():
    """As with chat models of one family: one knows a few more special tokens behind the shared ones."""
    more = byte_pairs(added=("<end>", "<tool>", "<image>"))
    identity.check_same_tokenizer(byte_pairs(), more)
    identity.check_same_tokenizer(more, byte_pairs())
    assert identity.tokenizer_hash(more) != identity.tokenizer_hash(byte_pairs())


def test_weights_hash_follows_the_weights(folder):
    first = identity.weights_hash(folder)
    model = loading.load_model(folder)
    in_memory = identity.weights_hash(model)
    assert in_memory == identity.weights_hash(loading.load_model(folder))
    model.lm_head.weight[0, 0] += 1
    assert in_memory != identity.weights_hash(model)
    model.save_pretrained(folder)
    assert first != identity.weights_hash(folder)
