"""Training of the reference pair on a toy corpus: streams, loops, bad input, and resuming after an interruption."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace

import numpy as np
import pytest
import torch

from live.reference import train as command
from live.reference.corpus import DOMAINS, MIXTURE, SECOND_MIXTURE, Documents, packed_streams, read_rows
from live.reference.optim import orthogonalise, schedule
from live.reference.own_text import loop_onset
from policies.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, domain in enumerate(DOMAINS):
        for split in ("train", "heldout"):
            rows = [
                {"prompt": f"Count to {i} please", "response": " ".join(map(str, range(i + number))), "source": "toy"}
                for i in range(3, 30)
            ]
            with lzma.open(folder / f"{domain}.{split}.jsonl.xz", "wt") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def documents(rows: int = 40) -> dict[str, Documents]:
    rng = np.random.default_rng(0)
    result = {}
    for domain in DOMAINS:
        lengths = rng.integers(5, 50, rows)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        result[domain] = Documents(rng.integers(0, 99, starts[-1]).astype(np.uint16), starts, starts[:-1] + 3)
    return result


def test_streams_do_not_depend_on_their_length():
    short, mask = packed_streams(documents(), [(500, MIXTURE)], rows=3, seed=1)
    long, _ = packed_streams(documents(), [(500, MIXTURE), (400, SECOND_MIXTURE)], rows=3, seed=1)
    assert np.array_equal(short, long[:, :500])
    assert 0.6 < mask.mean() < 0.98


def test_orthogonalise_gives_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 20, 50)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_schedule_warms_up_and_ends_near_zero():
    assert schedule(0, 100) < 0.1 and schedule(40, 100) == 1.0 and 0 < schedule(99, 100) < 0.05


@pytest.mark.parametrize(
    "tokens, onset",
    [
        ([1, 2, 3] * 40, 48),
        (list(range(60)), None),
        ([9] * 5 + [1, 2, 3, 4] * 20, 53),
        ([1] * 47, None),
    ],
)
def test_loop_onset(tokens, onset):
    assert loop_onset(tokens) == onset


def test_bad_input_is_one_sentence(corpus, tmp_path):
    with pytest.raises(UserError, match="--corpus"):
        read_rows(tmp_path, "math", "train")
    with lzma.open(corpus / "math.train.jsonl.xz", "wt") as lines:
        lines.write('{"prompt": "a", "response": "b"}\n{"prompt": 1}\n')
    with pytest.raises(UserError, match="math.train.jsonl.xz:2"):
        read_rows(corpus, "math", "train")
    with pytest.raises(UserError, match="--stage tokenizer"):
        command.main(["--corpus", str(corpus), "--out", str(tmp_path / "out"), "--stage", "target"])
    with pytest.raises(UserError, match="positive"):
        command.main(["--corpus", str(corpus), "--out", str(tmp_path / "out"), "--head-tokens", "0"])


def test_resumed_training_equals_an_uninterrupted_one(corpus, tmp_path, monkeypatch):
    from live.reference import causal_lm
    from live.reference.causal_lm import TARGET, Second, train
    from live.reference.checkpoint import load_state
    from live.reference.corpus import load_documents
    from live.reference.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(corpus, tmp_path / "tokenizer")
    rows = tokenizer("Count to 12, ünïcode 🙂\n\tok", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(rows) == "Count to 12, ünïcode 🙂\n\tok"
    texts = load_documents(corpus, tokenizer, tmp_path / "tokens")
    second = Second(tokens=3 * 64, shares=SECOND_MIXTURE)
    recipe = replace(
        TARGET, hidden=32, layers=4, intermediate=48, heads=2, kv_heads=1, rows=2, length=32, tokens=4 * 64, second=second
    )

    class Stop(Exception):
        pass

    def stopping(step, steps, **options):  # the fourth step never happens
        if step == 3:
            raise Stop
        return schedule(step, steps, **options)

    train(recipe, texts, MIXTURE, tokenizer, tmp_path / "whole", resume=False)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(causal_lm, "schedule", stopping)
        train(replace(recipe, snapshot_every=0.0), texts, MIXTURE, tokenizer, tmp_path / "parts", resume=False)
    train(recipe, texts, MIXTURE, tokenizer, tmp_path / "parts", resume=True)
    whole, parts = (load_state(tmp_path / name / "target.state.pt")["model"] for name in ("whole", "parts"))
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-6), name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "target", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, whole["lm_head.weight"].bfloat16().float())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole" / "target")) == model.config.vocab_size


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "dflash"])
def test_heads_resume_as_if_never_interrupted(kind, tmp_path, monkeypatch):
    """On a random target and toy texts; what is written drafts for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from live.heads import kind_of, load_head
    from live.hub import parse_source
    from live.model import CachedModel
    from live.reference import head_training
    from live.reference.checkpoint import load_state
    from live.reference.dflash_training import DFlashRecipe, train_dflash
    from live.reference.eagle3_training import HeadRecipe, train_head
    from live.reference.medusa_training import MedusaRecipe, train_medusa

    torch.manual_seed(0)
    shape = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12, "num_attention_heads": 2}
    target = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))
    own, train = {
        "eagle3": (HeadRecipe(draft_vocab=40, intermediate=24, test_steps=2), train_head),
        "medusa": (MedusaRecipe(heads=2, places=20), train_medusa),
        "dflash": (DFlashRecipe(block=4, blocks=12), train_dflash),
    }[kind]
    recipe, sources = replace(own, tokens=4 * 128, batch_tokens=128, length=48), [(1.0, documents())]

    class Stop(Exception):
        pass

    def stopping(step, steps, **options):
        if step == 2:
            raise Stop
        return schedule(step, steps, **options)

    train(target, recipe, sources, tmp_path / "whole", False)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(head_training, "schedule", stopping)
        train(target, recipe, sources, tmp_path / "parts", False, snapshot_every=0.0)
    train(target, recipe, sources, tmp_path / "parts", True)
    whole, parts = (load_state(tmp_path / name / f"{kind}.state.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4 and len(whole["history"]) == len(parts["history"])
    assert all(torch.allclose(whole["head"][name], parts["head"][name], atol=1e-6) for name in whole["head"])
    assert any(bool(tensor.any()) for name, tensor in whole["head"].items() if "o_proj" in name or "blocks" in name)  # it learned
    folder = str(tmp_path / "whole" / kind)
    assert kind_of(folder) == kind
    network = load_head(kind, folder, parse_source(folder), CachedModel(target)).network
    assert network.deepest == {"eagle3": None, "medusa": 2, "dflash": 3}[kind]
