"""Float64 that is float64 all the way: the proof mode of DESIGN section 6.

Hugging Face families cast to float32 inside norms, rotary embeddings, routers and the eager softmax whatever the
model's dtype. There the last bits depend on batch shape, and 1e-7 is enough to turn an argmax. ``exact`` replaces the
known modules on the instance (so plain ``model.generate`` uses the same arithmetic), checks with one forward that
nothing is left, and otherwise runs the model's forward under a mode in which "float32" means float64.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from policies.errors import UserError


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """Make a float64 model compute in float64 throughout; other dtypes are left as they are. Returns the model.

    :raises UserError: when some part still computes in float32.
    """
    if model.dtype != torch.float64:
        return model
    if hasattr(model, "set_experts_implementation") and _has_experts(model):
        model.set_experts_implementation("eager")  # the grouped matrix product refuses float64
    for module in model.modules():
        for candidate in _candidates(module):
            if _agrees(module, candidate):
                module.forward = types.MethodType(candidate, module)
                break
    if downcasts(model):
        _run_without_downcasts(model)
    left = downcasts(model)
    if left:
        raise UserError(
            f"{type(model).__name__} computes in float32 inside ({', '.join(left[:3])}), so float64 proves nothing "
            "for it; use dtype float32"
        )
    return model


def downcasts(model: PreTrainedModel) -> list[str]:
    """Names of operations that give float32 numbers in one small forward of ``model`` (none: float64 throughout)."""
    device = model.get_input_embeddings().weight.device
    tokens = torch.zeros(1, 3, dtype=torch.int64, device=device)
    positions = torch.arange(3, device=device)[None]  # given, as always here: some families count them in float32
    with torch.no_grad(), _Float32Watch() as watch:
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    return sorted(watch.seen)


_CONSTANTS = ("aten.ones.", "aten.zeros.", "aten.full.")
"""Nothing is lost in these; what is computed from them would be noticed."""


class _Float32Watch(TorchDispatchMode):
    """Notes every operation whose result is float32 or narrower, but for constants."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            narrow = isinstance(part, Tensor) and part.dtype in (torch.float32, torch.bfloat16, torch.float16)
            if narrow and not str(func).startswith(_CONSTANTS):
                self.seen.add(str(func))
        return result


class _NoDowncast(TorchFunctionMode):
    """Inside, a request for float32 is one for float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        if torch.float32 in (a for a in args if isinstance(a, torch.dtype)):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **(kwargs or {}))


def _run_without_downcasts(model: PreTrainedModel) -> None:
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        with _NoDowncast():
            return inner(*args, **kwargs)

    model.forward = forward


def _has_experts(model: PreTrainedModel) -> bool:
    return any(type(module).__name__.endswith("Experts") for module in model.modules())


# ---- replacements: the families' formulas without the casts ----------------------------------------------------------


def _candidates(module: nn.Module) -> tuple[Callable, ...]:
    """Formulas that may be this module's own; ``_agrees`` decides."""
    name = type(module).__name__
    if name.endswith("RotaryEmbedding"):
        kinds = module.rope_type if hasattr(module, "rope_type") else None
        if isinstance(kinds, str) and kinds not in ("dynamic", "longrope"):
            return (_rotary,)
        if isinstance(kinds, dict) and not {"dynamic", "longrope"} & set(kinds.values()):
            return (_rotary_by_layer_type,)
    own = type(module).forward not in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    weighted = isinstance(getattr(module, "weight", None), Tensor) and hasattr(module, _epsilon(module))
    return (_rms_norm, _rms_norm_one_plus, _mean_norm) if "Norm" in name and own and weighted else ()


def _epsilon(module: nn.Module) -> str:
    return "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"


def _agrees(module: nn.Module, candidate: Callable) -> bool:
    """Whether ``candidate`` is the module's own formula, up to its float32 rounding."""
    with torch.no_grad():
        if candidate in (_rotary, _rotary_by_layer_type):
            x = torch.zeros(1, 1, dtype=torch.float64, device=next(module.buffers()).device)
            places = torch.arange(40, device=x.device)[None]
            for extra in [()] if candidate is _rotary else [(kind,) for kind in module.rope_type]:
                ours, theirs = (candidate(module, x, places, *extra), module(x, places, *extra))
                if not all(_close(a, b) for a, b in zip(ours, theirs, strict=True)):
                    return False
            return True
        shape, device = module.weight.shape, module.weight.device
        x = torch.linspace(-1.7, 2.9, shape.numel(), dtype=torch.float64, device=device).sin().reshape(shape)[None]
        return _close(candidate(module, x), module(x))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    """Llama, Qwen, Mistral, Mixtral: weight * x / rms(x), in x's dtype."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(self, _epsilon(self))))


def _rms_norm_one_plus(self: nn.Module, x: Tensor) -> Tensor:
    """Gemma: (1 + weight) * x / rms(x), in x's dtype."""
    return (1.0 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(self, _epsilon(self))))


def _mean_norm(self: nn.Module, x: Tensor) -> Tensor:
    """Cohere: weight * (x - mean) / std, in x's dtype."""
    centred = x - x.mean(-1, keepdim=True)
    return self.weight * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + getattr(self, _epsilon(self))))


def _rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [R, T, rotary_dim] in x's dtype for int64 positions [R, T]."""
    angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(device=x.device, dtype=x.dtype)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def _rotary_by_layer_type(self: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
    """The same for Gemma 3, whose layer types have their own frequencies."""
    inv_freq, scaling = (getattr(self, f"{layer_type}_inv_freq"), getattr(self, f"{layer_type}_attention_scaling"))
    angles = position_ids[..., None].to(x.dtype) * inv_freq.to(device=x.device, dtype=x.dtype)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling
