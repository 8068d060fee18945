"""Files of draft heads of any kind: config.json and tensors, and what is wrong with them, by name."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from live.hub import weight_files
from policies.errors import UserError

_ROTARY = ("default", "linear", "llama3", "yarn")
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "draft_vocab_size", "target_hidden_size", "rms_norm_eps", "rope_theta", "max_position_embeddings",
)  # fmt: skip
_COUNTS = (*SIZES[:8], "max_position_embeddings", "num_hidden_layers")
"""Sizes that count something."""
_NAMED = 12
"""Tensors that a message names, at most."""


class Unknown(Exception):
    """A variant that this loader does not know."""


Config = TypeVar("Config")


def read_config(path: Path, what: str, parse: Callable[[dict[str, Any]], Config]) -> Config:
    """What ``parse`` makes of a head's config.json. :param what: the kind of head, for messages.

    :raises UserError: when there is none, it is no JSON, lacks something, or ``parse`` raises :class:`Unknown`.
    """
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: give the folder of {what}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch the head again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: it does not describe {what}")
    try:
        return parse(found)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it does not describe {what}") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} has a value of another kind than it should ({error}): it does not describe {what}") from None
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} has a size that cannot be ({error}): it does not describe {what}") from None
    except Unknown as error:
        raise UserError(f"{path}: {error}; use a head without it") from None


def sizes_of(body: dict[str, Any]) -> dict[str, Any]:
    """The sizes that stand in a configuration, and those that follow from them.

    :raises Unknown: for an activation or attention that no loader here knows.
    """
    if body.get("hidden_act", "silu") != "silu":
        raise Unknown(f"its activation is {body['hidden_act']!r}, this loader knows silu")
    window = body.get("sliding_window") if body.get("use_sliding_window", True) else None
    if (window and window < body.get("max_position_embeddings", 2048)) or "sliding_attention" in (body.get("layer_types") or ()):
        raise Unknown("its attention has a sliding window, which this loader does not know")
    known = {name: body[name] for name in SIZES if body.get(name) is not None}
    for name in _COUNTS:
        if body.get(name) is not None:
            whole(body, name, 1)
    for name in ("rms_norm_eps", "rope_theta"):
        if name in known:
            known[name] = positive(body, name)
    known.setdefault("head_dim", body["hidden_size"] // body["num_attention_heads"])
    known.setdefault("num_key_value_heads", body["num_attention_heads"])
    return known


def whole(body: dict[str, Any], name: str, least: int = 0) -> int:
    """A whole number of a configuration. Raises ValueError when it is none, or lower than ``least``; KeyError without one."""
    if type(body[name]) is not int or body[name] < least:
        raise ValueError(f"{name} is {body[name]!r}, not a whole number from {least} on")
    return body[name]


def positive(body: dict[str, Any], name: str, default: float | None = None) -> float | None:
    """A number above 0 of a configuration, ``default`` where there is none. Raises ValueError when it is something else."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}, not a number above 0")
    return float(value)


def rotary_of(body: dict[str, Any]) -> dict[str, Any]:
    """Base and scaling, from the old keys or the new one."""
    told = body.get("rope_parameters") or body.get("rope_scaling") or {}
    kind = told.get("rope_type", told.get("type")) or "default"
    base = body.get("rope_theta") or told.get("rope_theta") or 10000.0
    if kind not in _ROTARY or told.get("partial_rotary_factor", body.get("partial_rotary_factor", 1.0)) != 1.0:
        raise Unknown(f"it has rotary embeddings of kind {kind!r} or partial ones; this loader knows whole {', '.join(_ROTARY)}")
    scaling = {name: value for name, value in told.items() if name not in ("type", "rope_theta")} | {"rope_type": kind}
    return {"rope_theta": float(base), "rope_scaling": None if kind == "default" else scaling}


class Sized(Protocol):
    """What the sizes of fused matrices follow from."""

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


def read_tensors(folder: Path, kind: str, prefix: str | tuple[str, ...] = "") -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files, or of its pickled ones (read as data only), on the CPU.

    :param kind: of head, for messages.   :param prefix: of the names that are wanted, or several; only those are read.
    :raises UserError: when there are none, or a file is damaged or holds more than tensors.
    """
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    if not files:
        names = "*.safetensors, pytorch_model*.bin or medusa_lm_head*.pt"
        raise UserError(f"no weights ({names}) in {folder}: give the folder of {kind}")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as held:
                    part = {name: held.get_tensor(name) for name in held.keys() if name.startswith(prefix)}
            else:
                part = torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            told = str(error).strip().splitlines()[0][:150]
            raise UserError(f"{file} holds no plain tensors, or only a part of them ({told}); fetch the head again") from None
        if not isinstance(part, dict) or not all(isinstance(name, str) and isinstance(part[name], Tensor) for name in part):
            raise UserError(f"{file} is no table of tensors: give the weights of {kind}")
        found |= {name: tensor for name, tensor in part.items() if name.startswith(prefix)}
    return found


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder's weight files, without reading the tensors; none of a damaged file."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for file in weight_files(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as part:
                    names |= set(part.keys())
            else:
                part = torch.load(file, map_location="meta", weights_only=True)
                names |= {name for name in part if isinstance(name, str)} if isinstance(part, dict) else set()
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError):
            continue  # whoever loads it says what is wrong
    return names


def split_fused(named: dict[str, Tensor], layer: str, config: Sized) -> None:
    """In place: q, k and v, gate and up of the layer with that prefix, apart where they were one."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for kind in ("weight", "bias"):
        _split(named, f"{layer}self_attn.qkv_proj.{kind}", ("q", "k", "v"), (heads * size, groups * size, groups * size))
        _split(named, f"{layer}mlp.gate_up_proj.{kind}", ("gate", "up"), (config.intermediate_size,) * 2)


def _split(named: dict[str, Tensor], fused: str, parts: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    if fused in named:
        whole = named.pop(fused)
        rows = whole.shape[0] if whole.dim() else 0
        if rows != sum(sizes):
            raise UserError(f"{fused} has {rows} rows where {sum(sizes)} are expected: it contradicts config.json")
        stem, _, kind = fused.rpartition(".")
        for part, piece in zip(parts, whole.split(sizes), strict=True):
            named[f"{stem.rpartition('.')[0]}.{part}_proj.{kind}"] = piece.contiguous()


def checked_map(d2t: Tensor, drafted: int, vocabulary: int) -> Tensor | None:
    """d2t int64 [Vd], target id minus draft id; None where draft and target vocabulary are one.

    :raises UserError: when it is of another size, points outside the target's vocabulary, or renames tokens of one vocabulary.
    """
    if d2t.is_floating_point() or d2t.dim() != 1:
        raise UserError("d2t is no list of whole numbers; the head is damaged, fetch it again")
    if drafted == vocabulary:
        if bool(d2t.any()):
            raise UserError("d2t renames tokens though draft and target vocabulary have one size: it contradicts config.json")
        return None
    if len(d2t) != drafted:
        raise UserError(f"d2t maps {len(d2t)} tokens where {drafted} are drafted: it contradicts config.json")
    target = d2t.to(torch.int64) + torch.arange(drafted, device=d2t.device)
    if int(target.min()) < 0 or int(target.max()) >= vocabulary:
        raise UserError(f"d2t points outside the target's vocabulary of {vocabulary} tokens; the head is damaged, fetch it again")
    return d2t.to(torch.int64)


def same_table(table: Tensor, embed_tokens: Tensor, dtype: torch.dtype) -> bool:
    """Whether a file's token embeddings are the target's, in the precision that both are used in."""
    if table.shape != embed_tokens.shape:
        return False
    return torch.equal(table.to(embed_tokens.device, dtype), embed_tokens.to(dtype))


def renamed(found: dict[str, Tensor], names: Sequence[tuple[str, str]], ignored: re.Pattern[str]) -> dict[str, Tensor]:
    """Tensors under the names that a loader knows, without those that nothing depends on.

    :param names: patterns and what takes their place, one after the other.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if not ignored.search(name):
            for pattern, other in names:
                name = re.sub(pattern, other, name)
            named[name] = tensor
    return named


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str, kind: str) -> None:
    """:raises UserError: naming the tensors that are missing, unexpected, of another shape, or whole numbers where weights are."""
    wrong = [f"missing {name}" for name in expected if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in expected]
    wrong += [
        f"{name} is {list(found[name].shape)} where {list(tensor.shape)} is expected"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    wrong += [
        f"{name} holds {str(found[name].dtype).removeprefix('torch.')} numbers"
        for name, tensor in expected.items()
        if name in found and tensor.is_floating_point() and not found[name].is_floating_point()
    ]
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise UserError(f"{what} is not {kind} that this loader knows: {'; '.join(wrong[:_NAMED])}{more}")
