"""What an EAGLE-3 head is made of, read from the config.json of the layouts people have.

- official (the authors' releases): flat; the rotary base is 10000 where none is given, whatever the target's is
- SpecForge: flat, with ``eagle_config``
- speculators (vLLM): nested in ``transformer_layer_config``, flags and layer ids beside it
- ModelOpt (NVIDIA): flat, with ``eagle_config`` and its flags

They differ above all in how they number the target's layers. Here a layer id is a *boundary* i: the residual stream that
enters layer i, ``hidden_states[i]``, as in the official code and in vLLM. ``eagle_config`` counts outputs: one less.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from live.head_files import SIZES, Unknown, read_config, rotary_of, sizes_of
from policies.errors import UserError

_IDS = "eagle_aux_hidden_state_layer_ids"
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "return_hidden_post_norm", "attention_bias")
_REFUSED = {
    "eh_proj_before_attn": "it projects embedding and feature before the attention",
    "mask_hidden": "it drafts in parallel (P-EAGLE)",
    "parallel_drafting": "it drafts in parallel (P-EAGLE)",
    "use_mtp_layernorm": "it has the norms of a multi-token-prediction layer",
    "kv_lora_rank": "it has multi-head latent attention",
}
"""What changes the arithmetic in a way that this loader does not know."""
_REQUIRED = {
    "use_aux_hidden_state": "it reads no captured layers (EAGLE-1)",
    "use_input_layernorm_in_first_layer": "it does not norm the embedding",
    "use_last_layernorm": "it has no norm in front of its output layer",
}


def captured_layers(layers: int) -> tuple[int, int, int]:
    """The official boundaries of a target with so many layers, low to high (eagle.md 3.1: 2, L // 2, L - 3)."""
    return 2, layers // 2, layers - 3


@dataclass(frozen=True)
class Eagle3Config:
    """Shape and variant of a head; the names of the official config.json and, for variants, of those who brought them.

    eagle_aux_hidden_state_layer_ids  the target's layers, None: the official choice
    ids_name_outputs         those ids count outputs of layers instead of boundaries
    rope_scaling             as in Hugging Face's rope_parameters, or None
    norm_before_residual     the residual of the layer is the normed feature (speculators)
    norm_before_fc, fc_norm  an RMS norm in front of ``fc``: one over all features, or one for each
    return_hidden_post_norm  cells feed on the normed output of the cell before (speculators: norm_output)
    attention_bias, bias     biases on the attention's matrices, and on ``fc``
    qk_norm                  RMS norms on queries and keys (Qwen3)
    own_embeddings           the checkpoint brings its own token embeddings
    layout                   which of the layouts the file has, for messages
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    eagle_aux_hidden_state_layer_ids: tuple[int, ...] | None = None
    ids_name_outputs: bool = False
    rope_scaling: dict[str, Any] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    return_hidden_post_norm: bool = False
    attention_bias: bool = False
    bias: bool = False
    qk_norm: bool = False
    own_embeddings: bool = False
    layout: str = field(default="official", compare=False)

    @property
    def streams(self) -> int:
        """Captured layers whose residuals ``fc`` reads."""
        return len(self.eagle_aux_hidden_state_layer_ids or (0, 0, 0))

    @classmethod
    def from_file(cls, path: Path) -> Eagle3Config:
        """Read a config.json of any of the four layouts; what it leaves out takes the official default.

        :raises UserError: when it describes no EAGLE-3 head, or a variant that this loader does not know, by name.
        """
        return read_config(path, "an EAGLE-3 head", partial(_parse, cls))

    def to_json(self) -> dict[str, Any]:
        """The flat config.json that :meth:`from_file` reads back; variants stand in it only where the head has them."""
        plain = {f.name: f.default for f in fields(self)} | {"layout": self.layout, "own_embeddings": self.own_embeddings}
        found = {name: value for name, value in asdict(self).items() if name in SIZES or value != plain[name]}
        if found.pop("ids_name_outputs", False):
            found["eagle_config"] = {_IDS: found.pop(_IDS)}
        if found["target_hidden_size"] == found["hidden_size"]:
            del found["target_hidden_size"]  # official loaders read its presence as "brings its own embeddings"
        return found

    def boundaries(self, layers: int) -> tuple[tuple[int, ...], str]:
        """Boundaries to capture in a target with so many layers, and where they come from, in words (eagle.md 3.2).

        :raises UserError: when the target has no such layers.
        """
        official, ids = captured_layers(layers), self.eagle_aux_hidden_state_layer_ids
        if ids is None:
            return official, "official choice"
        after = tuple(i + 1 for i in ids)
        listed = ", ".join(map(str, ids))
        if ids == official:
            chosen, why = ids, "config names them"
        elif after == official or ids[0] == 1:
            chosen, why = after, f"config names outputs of layers {listed}"
        elif not self.ids_name_outputs:
            chosen, why = ids, "config names them"
        elif max(after) > layers:  # as outputs they would lie behind the last layer
            chosen, why = ids, f"config names {listed}, too high for outputs"
        else:
            chosen, why = after, f"config names outputs of layers {listed}"
        if min(chosen) < 0 or max(chosen) > layers:
            raise UserError(
                f"the head reads layers {listed}, the target has {layers}: give the target that this head was trained for"
            )
        return chosen, why


def _parse(cls: type[Eagle3Config], found: dict[str, Any]) -> Eagle3Config:
    nested = found.get("transformer_layer_config")
    extra = found.get("eagle_config") or {}
    kind = found.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise Unknown(f"it is a speculator of kind {kind!r}")
    body = nested or found  # sizes
    flags = {**body, **found, **extra}  # flags stand where their authors put them
    _refuse(flags)
    known = sizes_of(body)
    known |= {name: found[name] for name in ("draft_vocab_size", "target_hidden_size") if found.get(name) is not None}
    known.setdefault("draft_vocab_size", body["vocab_size"])
    known.setdefault("target_hidden_size", body["hidden_size"])
    known |= {name: True for name in _FLAGS if flags.get(name)}
    if nested is None and flags.get("norm_output") is False:
        raise Unknown("it sets norm_output to false, so it has no norm in front of its output layer")
    if nested is not None and flags.get("norm_output"):  # SpecForge gives this name to the norm before lm_head
        known["return_hidden_post_norm"] = True
    top, inner = found.get(_IDS), extra.get(_IDS)
    if ids := top or inner:
        known |= {_IDS: tuple(int(i) for i in ids), "ids_name_outputs": not top}
    layout = "speculators" if nested is not None else "eagle_config" if "eagle_config" in found else "official"
    return cls(**known | rotary_of(body), layout=layout)


def _refuse(flags: dict[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if flags.get(name):
            raise Unknown(f"it sets {name}: {why}, which this loader does not know")
    for name, why in _REQUIRED.items():
        if flags.get(name) is False:
            raise Unknown(f"it unsets {name}: {why}, which this loader does not know")
    if flags.get("parallel_draft_step", 1) not in (None, 1):
        raise Unknown("it drafts in parallel (parallel_draft_step), which this loader does not know")
