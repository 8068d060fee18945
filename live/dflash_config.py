"""What a DFlash drafter is made of, read from the config.json of the layouts people have.

- the authors' releases (z-lab): a Qwen3 configuration with ``dflash_config``, whose ``target_layer_ids`` count outputs of layers
- speculators (vLLM): the layers' sizes in ``transformer_layer_config``, and ``aux_hidden_state_layer_ids``, which are boundaries

A boundary i is the residual stream that enters layer i of the target, as for EAGLE-3 heads (live/eagle3_config.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from live.head_files import Unknown, positive, read_config, rotary_of, sizes_of, whole
from policies.errors import UserError

_SLIDING, _FULL = "sliding_attention", "full_attention"
_REFUSED = {
    "markov_rank": "it is a DSpark drafter, whose logits depend on the token before (a Markov head)",
    "selector_rank": "it is a DFlash 2 drafter (convolutions, and a selector among its candidates)",
    "conv_kernel_size": "it is a DFlash 2 drafter (convolutions, and a selector among its candidates)",
    "attention_sink_bias": "its attention has sinks",
    "add_swa_attention_sink_bias": "its attention has sinks",
    "attention_modes": "its layers attend in ways of their own (attention_modes)",
    "kv_lora_rank": "it has multi-head latent attention",
    "auxiliary_rope": "it has more than one rotary embedding",
}
"""What changes the arithmetic in a way that this loader does not know."""


@dataclass(frozen=True)
class DFlashConfig:
    """Shape and variant of a drafter.

    layer_ids        the target's layers that ``fc`` reads
    ids_name_outputs   those ids count outputs of layers instead of boundaries
    block_size       places of a block, the root's among them
    mask_token_id    the token that stands at the places to be drafted
    windows          of each layer: how many places back its attention reaches, None for all
    causal           of each layer: whether a place of the block sees only those before it
    from_anchor      the root's place drafts too, the token behind it: one drafted token more (speculators)
    input_embedding_scale, output_multiplier, final_logit_softcapping   what the target does to its embeddings and logits
    own_embeddings, own_output, mask_embedding   what the checkpoint brings in place of the target's; ``mask_embedding`` stands for
        the mask token's
    layout           which of the layouts the file has, for messages
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    num_hidden_layers: int
    block_size: int
    mask_token_id: int
    layer_ids: tuple[int, ...]
    ids_name_outputs: bool
    windows: tuple[int | None, ...]
    causal: tuple[bool, ...]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    from_anchor: bool = False
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    own_embeddings: bool = False
    own_output: bool = False
    mask_embedding: bool = False
    layout: str = "official"

    @property
    def deepest(self) -> int:
        """Tokens that a block drafts."""
        return self.block_size if self.from_anchor else self.block_size - 1

    @classmethod
    def from_file(cls, path: Path) -> DFlashConfig:
        """:raises UserError: when the file describes no such drafter, or a variant that this loader does not know, by name."""
        return read_config(path, "a DFlash drafter", partial(_parse, cls))

    def to_json(self) -> dict[str, Any]:
        """The authors' config.json that :meth:`from_file` reads back."""
        found = asdict(self)
        windows, scaling = found.pop("windows"), found.pop("rope_scaling")
        for name in ("own_embeddings", "own_output", "mask_embedding", "layout"):  # the tensors tell, and the file's form
            del found[name]
        kind = "target_layer_ids" if found.pop("ids_name_outputs") else "aux_hidden_state_layer_ids"
        own = {name: found.pop(name) for name in ("block_size", "mask_token_id", "input_embedding_scale", "output_multiplier")}
        own |= {kind: list(found.pop("layer_ids")), "final_logit_softcapping": found.pop("final_logit_softcapping")}
        causal, window = found.pop("causal"), next((window for window in windows if window), None)
        if len(set(causal)) == 1:
            own["causal"] = causal[0]
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "dflash_config": own,
            "block_size": own["block_size"],
            "layer_types": [_SLIDING if window else _FULL for window in windows],
            "sliding_window": window,
            "rope_parameters": {"rope_theta": found.pop("rope_theta")} | (scaling or {"rope_type": "default"}),
            "sample_from_anchor": found.pop("from_anchor"),
            **found,
        }

    def boundaries(self, layers: int) -> tuple[int, ...]:
        """Boundaries to capture in a target with so many layers; the last one's output is the last hidden state behind the final
        norm, as the authors' code gets it from Hugging Face: boundary ``layers + 1``.

        :raises UserError: when the target has no such layers.
        """
        chosen = tuple(i + 1 for i in self.layer_ids) if self.ids_name_outputs else self.layer_ids
        if min(chosen) < 0 or max(chosen) > layers:
            listed = ", ".join(map(str, self.layer_ids))
            raise UserError(
                f"the drafter reads layers {listed}, the target has {layers}: give the target that this drafter was trained for"
            )
        return tuple(i + 1 if self.ids_name_outputs and i == layers else i for i in chosen)


def _parse(cls: type[DFlashConfig], found: dict[str, Any]) -> DFlashConfig:
    nested = found.get("transformer_layer_config")
    body, own = nested or found, found.get("dflash_config") or {}
    told = {**body, **found, **own}
    for name, why in _REFUSED.items():
        if told.get(name):
            raise Unknown(f"{why}, which this loader does not know")
    kind = f"{found.get('architectures')} {found.get('speculators_model_type')} {told.get('projector_type')}".lower()
    if other := next((one for one in ("dflash2", "dspark", "domino") if one in kind), None):
        raise Unknown(f"it is a drafter of kind {other}, which this loader does not know")
    if told.get("shift_label"):
        raise Unknown("it was trained on shifted labels, which this loader does not know")
    ids = told.get("target_layer_ids") or told["aux_hidden_state_layer_ids"]
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"the target's layers are {ids!r}, not a list of whole numbers")
    layers = whole(body, "num_hidden_layers", 1)
    sizes = sizes_of({**body, "use_sliding_window": False, "layer_types": None})  # windows are known here
    for name in ("draft_vocab_size", "target_hidden_size"):
        if found.get(name) is not None:
            sizes[name] = whole(found, name, 1)
    windows, causal = _attention(body, own, told, layers)
    return cls(
        **{"draft_vocab_size": body["vocab_size"], "target_hidden_size": body["hidden_size"]} | sizes | rotary_of(body),
        num_hidden_layers=layers,
        block_size=whole({"block_size": 16} | told, "block_size", 2),
        mask_token_id=whole(told, "mask_token_id"),
        layer_ids=tuple(ids),
        ids_name_outputs=bool(told.get("target_layer_ids")),
        windows=windows,
        causal=causal,
        attention_bias=bool(body.get("attention_bias")),
        from_anchor=bool(told.get("sample_from_anchor")),
        input_embedding_scale=positive(told, "input_embedding_scale", 1.0),
        output_multiplier=positive(told, "output_multiplier", 1.0),
        final_logit_softcapping=positive(told, "final_logit_softcapping") if told.get("final_logit_softcapping") else None,
        layout="speculators" if nested else "official",
    )


def _attention(
    body: dict[str, Any], own: dict[str, Any], told: dict[str, Any], layers: int
) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """Windows and causality of each layer: where nothing else is said, one that ``layer_types`` calls sliding is causal within the
    block, and one with a window by ``use_swa`` is not."""
    types = body.get("layer_types") or [_FULL] * layers
    inward = [kind == _SLIDING for kind in types]
    sliding = [True] * layers if own.get("use_swa") and not any(inward) else inward
    window = {"sliding_window": own.get("swa_window_size") or body.get("sliding_window")}
    if any(sliding) and not window["sliding_window"]:
        raise Unknown("its layers have a sliding window of no size")
    if len(types) != layers:
        raise Unknown(f"it has {layers} layers and {len(types)} layer_types")
    if strange := next((kind for kind in types if kind not in (_SLIDING, _FULL)), None):
        raise Unknown(f"it has a layer of type {strange!r}, this loader knows {_FULL} and {_SLIDING}")
    reach = whole(window, "sliding_window", 1) if any(sliding) else None
    asked = next((told[name] for name in ("causal", "is_causal") if told.get(name) is not None), None)
    if asked is None and told.get("sliding_window_non_causal"):
        asked = False
    causal = tuple(bool(one if asked is None else asked) for one in inward)
    return tuple(reach if one else None for one in sliding), causal
