"""Every layout of an EAGLE-3 checkpoint gives the same head; variants are computed, or refused by name."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from live.eagle3 import Eagle3Head, captured_layers
from live.eagle3_config import Eagle3Config
from live.eagle_network import EagleNetwork
from policies.errors import UserError
from tests.live import heads

EMBEDDINGS = torch.randn(heads.VOCABULARY, heads.HIDDEN, generator=torch.Generator().manual_seed(9))
FEATURES = torch.randn(6, 3 * heads.HIDDEN, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([3, 41, 7, 7, 12, 30, 21, 4])  # six committed cells, two drafted ones
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def drafted_logprob(head: Eagle3Head) -> torch.Tensor:
    """log q [Vd] in float64 behind six true features and two drafted tokens, through the network's caches."""
    network = EagleNetwork(head.double())
    network.reset(1)
    source = network.advance(TOKENS[None, :6], FEATURES[None].double(), torch.tensor([6]))
    network.open(source, torch.tensor([6]), 1)
    width = head.config.draft_vocab_size
    network.grow(torch.tensor([[0]]), TOKENS[None, 6:7], 1)
    found = network.grow(torch.tensor([[1]]), TOKENS[None, 7:], width)
    draft_ids = torch.argsort(head.d2t + torch.arange(width))
    by_target = found.logprob[0, 0][torch.argsort(found.index[0, 0])]
    return torch.empty(width).index_copy(0, draft_ids, by_target)


def expected(tensors: dict[str, torch.Tensor], **variant) -> torch.Tensor:
    logits = heads.textbook(tensors, FEATURES, TOKENS, EMBEDDINGS, drafted=2, **variant)
    return torch.log_softmax(logits[-1], -1).float()


@pytest.mark.parametrize("layout", ["official", "specforge", "speculators", "modelopt"])
def test_every_layout_gives_the_same_head(layout, tmp_path):
    tensors = heads.official_tensors()
    own = {"embeddings": EMBEDDINGS} if layout == "speculators" else {}
    folder = getattr(heads, f"write_{layout}")(tmp_path, tensors, **own)
    head = Eagle3Head.from_pretrained(folder, EMBEDDINGS)
    assert head.config.boundaries(heads.LAYERS)[0] == captured_layers(heads.LAYERS) == (2, 6, 9)
    state = head.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(head.embed_tokens, EMBEDDINGS) and ("embed_tokens" in state) == (layout == "speculators")
    assert torch.allclose(drafted_logprob(head), expected(tensors), atol=1e-6)


def fused(tensors):
    """q, k, v in one, gate and up in one, NVIDIA's names from before the export, vLLM's name of the map."""
    tensors = dict(tensors)
    attention, mlp = "midlayer.self_attn", "midlayer.mlp"
    tensors["midlayer.0.self_attn.qkv_proj.weight"] = torch.cat([tensors.pop(f"{attention}.{p}_proj.weight") for p in "qkv"])
    tensors["layers.0.mlp.gate_up_proj.weight"] = torch.cat([tensors.pop(f"{mlp}.{p}_proj.weight") for p in ("gate", "up")])
    tensors["eagle_module.hidden_norm.weight"] = tensors.pop("midlayer.hidden_norm.weight")
    tensors["eagle_module.input_embeds_norm.weight"] = tensors.pop("midlayer.input_layernorm.weight")
    tensors["eagle_module.eagle_lm_head.weight"] = tensors.pop("lm_head.weight")
    tensors["draft_id_to_target_id"] = tensors.pop("d2t")
    tensors["model.midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return tensors


def test_other_names_and_fused_matrices(tmp_path):
    tensors = heads.official_tensors()
    head = Eagle3Head.from_pretrained(heads.write_official(tmp_path, fused(tensors)), EMBEDDINGS)
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in tensors.items())


def norm_weights(*names_and_sizes):
    return {name: 1 + 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(len(name))) for name, size in names_and_sizes}


VARIANTS = {
    "norm_before_residual": ({"norm_before_residual": True}, {}, {"norm_before_residual": True}),
    "post norm": ({"return_hidden_post_norm": True}, {}, {"post_norm": True}),
    "norm before fc": ({"norm_before_fc": True}, norm_weights(("input_norm.weight", 96)), {}),
    "a norm for each": ({}, norm_weights(*((f"fc_norm.{i}.weight", 32) for i in range(3))), {}),
    "qwen3": ({}, norm_weights(("midlayer.self_attn.q_norm.weight", 8), ("midlayer.self_attn.k_norm.weight", 8)), {}),
    "biases": (
        {"attention_bias": True},
        norm_weights(*((f"midlayer.self_attn.{p}_proj.bias", 16 if p in "kv" else 32) for p in "qkvo"), ("fc.bias", 32)),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_what_their_names_say(tmp_path, name):
    flags, more, variant = VARIANTS[name]
    tensors = heads.official_tensors() | more
    config = heads.SIZES | {"draft_vocab_size": heads.DRAFTED} | flags
    head = Eagle3Head.from_pretrained(heads.write(tmp_path, config, tensors), EMBEDDINGS)
    found = drafted_logprob(head)
    assert torch.allclose(found, expected(tensors, **variant), atol=1e-6)
    assert not torch.allclose(found, expected(heads.official_tensors()), atol=1e-3)  # it does make a difference
    head.float().save_pretrained(tmp_path / "again", torch.float32)
    again = Eagle3Head.from_pretrained(tmp_path / "again", EMBEDDINGS)
    assert again.config == head.config and torch.equal(drafted_logprob(again), found)


def test_speculators_flags_and_own_embeddings(tmp_path):
    tensors = heads.official_tensors()
    folder = heads.write_speculators(tmp_path, tensors, EMBEDDINGS.flip(0))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"norm_before_residual": True, "norm_output": True}))
    head = Eagle3Head.from_pretrained(folder, torch.zeros(heads.VOCABULARY, 7))  # a target of another width
    want = heads.textbook(tensors, FEATURES, TOKENS, EMBEDDINGS.flip(0), 2, norm_before_residual=True, post_norm=True)
    assert torch.allclose(drafted_logprob(head), torch.log_softmax(want[-1], -1).float(), atol=1e-6)
    head.save_pretrained(tmp_path / "again", torch.float32)
    assert torch.equal(Eagle3Head.from_pretrained(tmp_path / "again", torch.zeros(50, 7)).embed_tokens, EMBEDDINGS.flip(0))


def test_rotary_base_is_the_heads_own(tmp_path):
    """Official files give none: 10000, unscaled. Where one is given, that counts, in the old and the new spelling."""
    tensors = heads.official_tensors()
    plain = Eagle3Config.from_file(heads.write_official(tmp_path / "plain", tensors) / "config.json")
    assert (plain.rope_theta, plain.rope_scaling) == (10000.0, None)
    sizes = heads.SIZES | {"draft_vocab_size": heads.DRAFTED}
    old = heads.write(tmp_path / "old", sizes | {"rope_theta": 500000.0, "rope_scaling": LLAMA3}, tensors)
    new = heads.write(tmp_path / "new", sizes | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}, tensors)
    head, other = (Eagle3Head.from_pretrained(folder, EMBEDDINGS) for folder in (old, new))
    assert torch.equal(drafted_logprob(head), drafted_logprob(other))
    base = 500000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    wavelength = 2 * torch.pi / base  # Llama 3.1: long waves are stretched, in between a blend
    smooth = ((64 / wavelength - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    want = (1 - smooth) * base / 8 + smooth * base
    assert torch.allclose(head.rotary.scaled()[0].double(), want, rtol=1e-5)
    assert torch.allclose(drafted_logprob(head), expected(tensors, frequencies=head.rotary.scaled()[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eh_proj_before_attn": True}, "eh_proj_before_attn"),
        ({"mask_hidden": True}, "P-EAGLE"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm"),
        ({"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step"),
        ({"norm_output": False}, "norm_output"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"sliding_window": 512}, "sliding window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"speculators_model_type": "mlp_speculator"}, "mlp_speculator"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_unknown_variants_are_refused_by_name(tmp_path, change, said):
    config = {name: value for name, value in (heads.SIZES | change).items() if value is not None}
    with pytest.raises(UserError, match=said):
        Eagle3Config.from_file(heads.write(tmp_path, config, {}) / "config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"midlayer.mlp.up_proj.weight": None}, "missing midlayer.mlp.up_proj.weight"),
        ({"layers.1.mlp.up_proj.weight": torch.zeros(2, 2)}, "more than one decoder layer"),
        ({"mask_hidden": torch.zeros(2)}, "unexpected mask_hidden"),
        ({"midlayer.self_attn.kv_a_proj_with_mqa.weight": torch.zeros(2, 2)}, "unexpected midlayer.self_attn.kv_a_proj"),
        ({"midlayer.self_attn.q_proj.bias": torch.zeros(32)}, "missing midlayer.self_attn.k_proj.bias"),
        ({"lm_head.weight": torch.zeros(29, 32)}, r"lm_head.weight is \[29, 32\] where \[30, 32\]"),
        ({"d2t": torch.full((30,), 49)}, "outside the target's vocabulary"),
        ({"d2t": torch.full((30,), 49), "t2d": None}, "outside the target's vocabulary"),
        ({"d2t": torch.tensor(1), "t2d": None}, "d2t is no list of whole numbers"),
        ({"d2t": torch.zeros(30)}, "d2t is no list of whole numbers"),
        ({"d2t": torch.zeros(29, dtype=torch.int64)}, "d2t maps 29 tokens where 30 are drafted"),
        ({"embed_tokens.weight": torch.zeros(50, 31)}, "embed_tokens"),
    ],
)
def test_tensors_are_checked_by_name(tmp_path, change, said):
    tensors = {name: tensor for name, tensor in (heads.official_tensors() | change).items() if tensor is not None}
    with pytest.raises(UserError, match=said):
        Eagle3Head.from_pretrained(heads.write_official(tmp_path, tensors), EMBEDDINGS)


def test_one_vocabulary_needs_no_maps(tmp_path):
    """As in the Vicuna head: draft and target vocabulary are one, whether zero maps stand in the file or not."""
    tensors = heads.official_tensors() | {"lm_head.weight": torch.randn(50, 32)}
    zero = {"d2t": torch.zeros(50, dtype=torch.int64), "t2d": torch.ones(50, dtype=torch.bool)}
    for number, maps in enumerate((zero, {})):
        found = {name: tensor for name, tensor in tensors.items() if name not in zero} | maps
        head = Eagle3Head.from_pretrained(heads.write(tmp_path / str(number), heads.SIZES, found), EMBEDDINGS)
        assert head.d2t is None and head.t2d is None
    with pytest.raises(UserError, match="renames"):
        found = tensors | {"d2t": torch.ones(50, dtype=torch.int64)}
        Eagle3Head.from_pretrained(heads.write(tmp_path / "odd", heads.SIZES, found), EMBEDDINGS)


class Surprise:
    def __reduce__(self):
        return print, ("a pickle ran code",)


def test_pickles_are_read_as_data_only(tmp_path, capsys):
    folder = heads.write_official(tmp_path, heads.official_tensors())
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Surprise(), file, protocol=2)
    with pytest.raises(UserError, match="no plain tensors"):
        Eagle3Head.from_pretrained(folder, EMBEDDINGS)
    assert "ran code" not in capsys.readouterr().out
    torch.save({"fc.weight": [1.0]}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no table of tensors"):
        Eagle3Head.from_pretrained(folder, EMBEDDINGS)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no weights"):
        Eagle3Head.from_pretrained(folder, EMBEDDINGS)


# ---- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "outputs", "layers", "want", "said"),
    [
        (None, False, 32, (2, 16, 29), "official"),
        ((2, 16, 29), False, 32, (2, 16, 29), "names them"),
        ((1, 15, 28), True, 32, (2, 16, 29), "outputs"),
        ((1, 46, 90), False, 94, (2, 47, 91), "outputs"),  # a converted head that kept SGLang's numbers
        ((2, 16, 29), True, 32, (2, 16, 29), "names them"),  # written as boundaries where outputs belong
        ((5, 20, 30), True, 32, (6, 21, 31), "outputs"),
        ((5, 20, 30), False, 32, (5, 20, 30), "names them"),
        ((24, 30, 36), True, 36, (24, 30, 36), "too high"),  # gpt-oss: the last is the stream behind the last layer
        ((3, 18), False, 24, (3, 18), "names them"),
    ],
)
def test_layer_conventions(ids, outputs, layers, want, said):
    config = Eagle3Config(32, 48, 4, 2, 8, 50, 30, 32, eagle_aux_hidden_state_layer_ids=ids, ids_name_outputs=outputs)
    found, why = config.boundaries(layers)
    assert found == want and said in why
    assert config.streams == (3 if ids is None else len(ids))


def test_layers_the_target_has_not():
    config = Eagle3Config(32, 48, 4, 2, 8, 50, 30, 32, eagle_aux_hidden_state_layer_ids=(2, 40, 77))
    with pytest.raises(UserError, match="the target has 32"):
        config.boundaries(32)


# ---- the four heads of the HeteroSpec paper, on the meta device ------------------------------------------------------

_LLAMA8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "draft_vocab_size": 32000,
}  # fmt: skip
_LLAMA8B_SHAPES = {"fc": (4096, 12288), "q": (4096, 8192), "k": (1024, 8192), "lm_head": (32000, 4096), "d2t": (32000,)}
PAPER = {
    "EAGLE3-LLaMA3.1-Instruct-8B": (_LLAMA8B, 4096, _LLAMA8B_SHAPES, 850),
    "EAGLE3-DeepSeek-R1-Distill-LLaMA-8B": (_LLAMA8B, 4096, _LLAMA8B_SHAPES, 850),
    "EAGLE3-Vicuna1.3-13B": (
        {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "vocab_size": 32000},
        5120,
        {"fc": (5120, 15360), "q": (5120, 10240), "k": (5120, 10240), "lm_head": (32000, 5120)},
        1277,
    ),
    "EAGLE3-LLaMA3.3-Instruct-70B": (
        {"hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_key_value_heads": 8,
         "vocab_size": 128256, "draft_vocab_size": 32000, "target_hidden_size": 8192},
        8192,
        {"fc": (6144, 24576), "q": (6144, 12288), "k": (1024, 12288), "lm_head": (32000, 6144), "embed_tokens": (128256, 6144)},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_heads_of_the_paper_load_by_shape(tmp_path, name):
    """Whole checkpoints of the published sizes, on the meta device, through the loader; and their size on the hub in megabytes."""
    sizes, target_width, shapes, megabytes = PAPER[name]
    config = Eagle3Config.from_file(heads.write(tmp_path, sizes | {"rms_norm_eps": 1e-5}, {}) / "config.json")
    assert (config.rope_theta, config.rope_scaling, config.target_hidden_size) == (10000.0, None, target_width)
    hidden, inner, both = config.hidden_size, config.intermediate_size, 2 * config.hidden_size
    heads_width, groups_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layout = {
        "fc.weight": (hidden, 3 * target_width), "norm.weight": (hidden,), "lm_head.weight": (config.draft_vocab_size, hidden),
        "midlayer.self_attn.q_proj.weight": (heads_width, both), "midlayer.self_attn.k_proj.weight": (groups_width, both),
        "midlayer.self_attn.v_proj.weight": (groups_width, both), "midlayer.self_attn.o_proj.weight": (hidden, heads_width),
        "midlayer.mlp.gate_proj.weight": (inner, hidden), "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
    }  # fmt: skip
    layout |= {f"midlayer.{norm}.weight": (hidden,) for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    if "target_hidden_size" in sizes:
        layout["embed_tokens.weight"] = (config.vocab_size, hidden)
    tensors = {key: torch.empty(shape, dtype=torch.float16, device="meta") for key, shape in layout.items()}
    if config.draft_vocab_size != config.vocab_size:
        tensors["d2t"] = torch.empty(config.draft_vocab_size, dtype=torch.int64, device="meta")
        tensors["t2d"] = torch.empty(config.vocab_size, dtype=torch.bool, device="meta")
    embeddings = torch.empty(config.vocab_size, target_width, dtype=torch.float16, device="meta")
    head = Eagle3Head.from_tensors(config, tensors, embeddings, torch.float16)
    state = head.state_dict()
    for part, shape in shapes.items():
        names = (part, f"{part}.weight", f"midlayer.self_attn.{part}_proj.weight")
        assert [tuple(state[key].shape) for key in names if key in state] == [shape], part
    assert head.embed_tokens.shape == (config.vocab_size, hidden)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / 1e6
    assert megabytes is None or abs(size - megabytes) < 1  # 849.7 MB and 1.277 GB on the hub
    without = {key: tensor for key, tensor in tensors.items() if not key.startswith("embed")}
    with pytest.raises(UserError, match="give the target that this head was trained for"):
        Eagle3Head.from_tensors(config, without, embeddings[:, :-1])
