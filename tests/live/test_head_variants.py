"""What sets one release of EAGLE-1 or Medusa heads apart from another, by random numbers in each: trees follow the formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from live.heads import kind_of, load_head
from live.hub import parse_source
from live.model import CachedModel
from live.pair import load_pair
from policies.errors import UserError
from tests.live.test_head_files import written
from tests.live.witnesses import follows_its_formula, random_material
from tests.tiny_heads import HEADS, NAMES

VOCABULARY, SIZE = 160, 32


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def own_matrices() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {f"lm_heads.{head}.weight": torch.randn(VOCABULARY, SIZE, generator=draw) for head in range(HEADS)}


def check(tiny_pair, kind: str, folder: str, formula: str | None = None) -> None:
    """That a folder is of that kind and that its trees follow the formula over the files in it, or in ``formula``."""
    assert kind_of(folder) == kind
    pair = load_pair(tiny_pair.target, [folder], "float64")
    follows_its_formula(pair, Path(folder).name, formula or folder, *random_material(pair))


@pytest.fixture(scope="module")
def eagle(tiny_heads) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and tensors of the tiny EAGLE-1 head."""
    folder = Path(tiny_heads["eagle1"])
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def medusa(tiny_heads) -> dict[str, Tensor]:
    return load_file(f"{tiny_heads['medusa']}/model.safetensors")


def test_biases_of_an_eagle1_attention(tiny_pair, eagle, tmp_path):
    told, tensors = eagle
    rows = {"q": SIZE, "k": SIZE // 2, "v": SIZE // 2}
    biases = {f"layers.0.self_attn.{part}_proj.bias": some(count) for part, count in rows.items()}
    check(tiny_pair, "eagle", written(tmp_path / "biased", told, tensors | biases))


def test_embeddings_and_output_layer_of_its_own(tiny_pair, eagle, tmp_path):
    """What is the target's again is shared and not written; what is not, counts, and comes back from our own files."""
    told, tensors = eagle
    own = {"embed_tokens.weight": some(VOCABULARY, SIZE), "lm_head.weight": 2 * some(SIZE, VOCABULARY).T}
    folder = written(tmp_path / "own", told, tensors | own)
    check(tiny_pair, "eagle", folder)
    (network,) = load_pair(tiny_pair.target, [folder], "float32").networks.values()
    network.head.save_pretrained(tmp_path / "again", torch.float32)
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == {*tensors, *own}
    check(tiny_pair, "eagle", str(tmp_path / "again"), folder)
    target = load_file(f"{tiny_pair.target}/model.safetensors")["model.embed_tokens.weight"]
    copied = written(tmp_path / "copied", told, tensors | {"embed_tokens.weight": target})
    (network,) = load_pair(tiny_pair.target, [copied], "float32").networks.values()
    assert not network.head.config.own_embeddings
    with pytest.raises(UserError, match=r"embed_tokens is \[7, 32\]"):
        load_pair(tiny_pair.target, [written(tmp_path / "few", told, tensors | {"embed_tokens.weight": some(7, SIZE)})])


def test_an_eagle1_head_that_vllm_converted(tiny_pair, eagle, tmp_path):
    """Its sizes stand in ``model``, and the type of model gives it away, not its number of layers."""
    told, tensors = eagle
    config = {"architectures": ["EAGLEModel"], "model_type": "eagle", "model": told, "truncated_vocab_size": VOCABULARY}
    check(tiny_pair, "eagle", written(tmp_path / "converted", config, tensors))
    check(tiny_pair, "eagle", written(tmp_path / "unnamed", {"model_type": "eagle", "model": told}, tensors))


def test_each_medusa_head_ends_in_its_own_matrix(tiny_pair, medusa, tmp_path):
    """By vLLM's names, in the authors' file, and inside a model's own files under either prefix."""
    matrices = own_matrices()
    vllm = written(tmp_path / "vllm", {"model_type": "medusa"}, medusa | matrices)
    check(tiny_pair, "medusa", vllm)
    target = load_file(f"{tiny_pair.target}/model.safetensors")
    for prefix, beside in (("", {}), ("medusa_head.", target), ("medusa_heads.", target)):
        named = {f"{prefix}{head}.1.weight": matrices[f"lm_heads.{head}.weight"] for head in range(HEADS)}
        for head in range(HEADS):
            for kind in ("weight", "bias"):
                named[f"{prefix}{head}.0.linear.{kind}"] = medusa[f"blocks.{head}.layers.0.{kind}"]
        folder = written(tmp_path / f"named{len(prefix)}", {"medusa_num_heads": HEADS}, named | beside)
        check(tiny_pair, "medusa", folder, vllm)


def test_two_residual_blocks_a_head(tiny_pair, medusa, tmp_path):
    more = {f"blocks.{head}.layers.1.weight": some(SIZE, SIZE) / 8 for head in range(HEADS)}
    more |= {f"blocks.{head}.layers.1.bias": some(SIZE) for head in range(HEADS)}
    check(tiny_pair, "medusa", written(tmp_path / "two", {"model_type": "medusa", "original_lm_head": True}, medusa | more))


def test_one_matrix_for_all_heads_has_to_be_said(tiny_pair, medusa, tmp_path):
    """As vLLM reads ``original_lm_head``: of several the first serves all. Unsaid, a head without its matrix is a damaged file."""
    matrices, told = own_matrices(), {"model_type": "medusa", "original_lm_head": True}
    first = {f"lm_heads.{head}.weight": matrices["lm_heads.0.weight"] for head in range(HEADS)}
    formula = written(tmp_path / "formula", {"model_type": "medusa"}, medusa | first)
    for number, some_matrices in enumerate(({"lm_head.weight": matrices["lm_heads.0.weight"]}, matrices)):
        check(tiny_pair, "medusa", written(tmp_path / f"one{number}", told, medusa | some_matrices), formula)
    for count in (0, 1):
        kept = {f"lm_heads.{head}.weight": matrices[f"lm_heads.{head}.weight"] for head in range(count)}
        folder = written(tmp_path / f"lost{count}", {"model_type": "medusa"}, medusa | kept)
        with pytest.raises(UserError, match=f"4 heads and {count} matrices"):
            load_pair(tiny_pair.target, [folder])


def test_a_shortened_vocabulary_is_of_the_targets_tokens(tiny_pair, medusa, tmp_path):
    """A row's token is the map's: the best of those that are kept, in the order of the whole vocabulary."""
    matrices = own_matrices()
    kept = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2))[:90]
    whole = written(tmp_path / "whole", {"model_type": "medusa"}, medusa | matrices)
    short = {name: tensor[kept] for name, tensor in matrices.items()} | {"token_map": kept}
    folders = [whole, written(tmp_path / "short", {"model_type": "medusa"}, medusa | short)]
    folders.append(written(tmp_path / "rows", {"model_type": "medusa"}, medusa | matrices | {"token_map": kept}))
    found = []
    for folder in folders:
        (network,) = load_pair(tiny_pair.target, [folder], "float64").networks.values()
        network.reset(1)
        with torch.inference_mode():
            source = network.advance(torch.ones(1, 3, dtype=torch.int64), some(1, 3, SIZE).double(), torch.tensor([3]))
            first = network.open(source, torch.tensor([3]), VOCABULARY if folder is whole else 90)
            found.append((first.index[0].tolist(), network.grow(torch.zeros(1, 1, dtype=torch.int64), first.index[:, :1], 6)))
    best = [token for token in found[0][0] if token in set(kept.tolist())]
    assert found[1][0] == found[2][0] == best and best != found[0][0][:90]
    assert torch.equal(found[1][1].index, found[2][1].index) and set(found[1][1].index.flatten().tolist()) <= set(best)


def test_damaged_files_are_one_sentence(tiny_pair, eagle, medusa, tmp_path):
    told, tensors = eagle
    kind = {"model_type": "medusa"}
    mapped = medusa | own_matrices()
    flat = {name: tensor.flatten() if name.startswith("blocks") else tensor for name, tensor in medusa.items()}
    cases = {
        "token_map is empty or points outside": (kind, mapped | {"token_map": torch.tensor([1, 2, -3])}),
        "outside the target's vocabulary of 160": (kind, mapped | {"token_map": torch.tensor([1, 2, 160])}),
        "token_map is empty": (kind, mapped | {"token_map": torch.zeros(0, dtype=torch.int64)}),
        "token_map is empty or": (kind, mapped | {"token_map": torch.tensor([[1, 2, 3]])}),
        "hold no residual blocks": (kind, flat),
        "weight holds int8 numbers": (kind | {"original_lm_head": True}, {name: t.to(torch.int8) for name, t in medusa.items()}),
        "fc.weight holds int8 numbers": (told, tensors | {"fc.weight": tensors["fc.weight"].to(torch.int8)}),
        "has a size that cannot be": (told | {"num_attention_heads": 0, "head_dim": None}, tensors),
        "lacks 'hidden_size'": ({name: value for name, value in told.items() if name != "hidden_size"}, tensors),
        "holds no JSON object": ([1], medusa),
    }
    for number, (said, (config, files)) in enumerate(cases.items()):
        with pytest.raises(UserError, match=said):
            load_pair(tiny_pair.target, [written(tmp_path / str(number), config, files)])
    for number, pickled in enumerate(([torch.zeros(3)], torch.zeros(3), {1: torch.zeros(3)}, {"state_dict": medusa})):
        folder = written(tmp_path / f"pickled{number}", {"medusa_num_heads": HEADS}, pickled, "medusa_lm_head.pt")
        with pytest.raises(UserError, match="is no table of tensors"):
            load_pair(tiny_pair.target, [folder])
    (nothing := tmp_path / "nothing").mkdir()
    (nothing / "config.json").write_text('{"medusa_num_heads": 4}')
    with pytest.raises(UserError, match="medusa_lm_head"):
        load_pair(tiny_pair.target, [str(nothing)])
    unscaled = written(tmp_path / "unscaled", kind | {"logit_scale": None, "original_lm_head": True}, medusa)
    check(tiny_pair, "medusa", unscaled)


@pytest.mark.parametrize(("family", "setting"), [("cohere", "logit_scale"), ("granite", "logits_scaling")])
def test_targets_that_scale_their_logits_are_refused(tiny_heads, family, setting):
    """Unless they scale by one; see tests/live/test_head_files.py for a target that caps them."""
    from tests.live.tiny import build

    scaling = CachedModel(build(family, torch.float32, vocab_size=VOCABULARY, **{setting: 4.0}))
    plain = CachedModel(build(family, torch.float32, vocab_size=VOCABULARY, **{setting: 1.0}))
    for name, kind in zip(NAMES[:2], ("eagle", "medusa"), strict=True):
        source = parse_source(tiny_heads[name])
        with pytest.raises(UserError, match="output layer"):
            load_head(kind, tiny_heads[name], source, scaling)
        assert load_head(kind, tiny_heads[name], source, plain).layers == (4,)
