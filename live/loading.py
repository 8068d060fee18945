"""Target and draft language models and their tokenizers, from a hub id or a folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from live.few_rows import quicken
from live.hub import explain, first_line, resolve, weight_files
from live.model import check_architecture, check_supported
from live.precision import exact
from live.probe import check_trees
from policies.errors import UserError

DTYPES = ("float32", "float64", "bfloat16", "float16")


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch dtype from its name.

    :raises UserError: when it is none of ``DTYPES``.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def parse_device(device: str | torch.device) -> torch.device:
    """torch device from its name.

    :raises UserError: when this machine has no such device.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if parsed.type == "cuda" and not (torch.cuda.is_available() and (parsed.index or 0) < torch.cuda.device_count()):
        raise UserError(f"device {device} is not available here; use --device cpu or a machine with that GPU")
    return parsed


def steady_attention(device: torch.device) -> None:
    """On a GPU, do without cuDNN's attention, which torch prefers on Hopper and later: it builds a plan for every new shape, in
    some tenths of a second, and behind a text that grows every forward has a new one. Flash and memory-efficient kernels do not.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def load_model(
    name_or_folder: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    part: str = "target",
    device_map: str | None = None,
) -> PreTrainedModel:
    """A causal LM in exactly ``dtype`` on ``device``: eval mode, no gradients, SDPA attention where the family has it.

    :param part: which of the shipped models "reference" means.
    :param device_map: "auto" spreads the model over several GPUs (needs accelerate; ``device`` is then ignored).
    :raises UserError: when there is no such model, it has no weights or damaged ones, or trees cannot be exact on it.
    """
    source, wanted = resolve(name_or_folder, part), parse_dtype(dtype)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    _check_files(source)
    if device_map and importlib.util.find_spec("accelerate") is None:
        raise UserError(f"--device-map {device_map} needs the accelerate package: pip install accelerate, or leave it out")
    placed = {"device_map": device_map} if device_map else {}
    target = parse_device(device)
    steady_attention(target)
    try:
        config = AutoConfig.from_pretrained(source, **hub)
        _check_before_loading(config)
        _choose_attention(config)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=wanted, output_loading_info=True, **hub, **placed
        )
    except UserError:
        raise
    except Exception as error:  # the hub's, safetensors' and transformers' own kinds, too many to list
        raise UserError(explain(source, error)) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the weights of {source} lack {missing[0]} and {len(missing) - 1} more tensors; download the model again"
        )
    if any(weights.is_meta for weights in model.parameters()):  # accelerate keeps them elsewhere and brings them in one by one
        raise UserError(
            f"the devices together have too little memory for {source}, and weights fetched anew for every token would be far too "
            "slow: use more GPUs, or a smaller --dtype"
        )
    model = model.eval().requires_grad_(False)
    if not device_map:
        model = model.to(target)
    check_supported(model)
    model = quicken(exact(model))
    check_trees(model)
    return model


def _check_before_loading(config: PreTrainedConfig) -> None:
    """Refuse what trees cannot follow while it costs nothing; unknown classes (remote code) are looked at once loaded."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        check_architecture(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    elif config.is_encoder_decoder:
        raise UserError(f"{config.model_type} is an encoder-decoder model, which tree decoding does not cover; use a decoder")


def _choose_attention(config: PreTrainedConfig) -> None:
    """SDPA where the family has it, else eager, whatever the configuration file prefers: flash attention takes no tree mask.

    Softcapped attention (Gemma 2) is eager: SDPA has no place for it.
    """
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    config._attn_implementation = "eager" if capped else None


def load_tokenizer(
    name_or_folder: str | Path, revision: str | None = None, trust_remote_code: bool = False, part: str = "target"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    :raises UserError: when there is none.
    """
    source = resolve(name_or_folder, part)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"no tokenizer could be loaded from {source} ({first_line(error)}); put its tokenizer.json there"
        ) from error


def load_target(
    name_or_folder: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a target ("reference": the shipped one); see :func:`load_model` and its errors."""
    model = load_model(name_or_folder, dtype, device, revision, trust_remote_code, device_map=device_map)
    return model, load_tokenizer(name_or_folder, revision, trust_remote_code)


def load_reference(
    part: str = "target", dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped pair's ``part`` ("target" or "draft"), with its tokenizer; see :func:`load_model`."""
    return load_model("reference", dtype, device, part=part), load_tokenizer("reference", part=part)


# ---- what can go wrong with the files --------------------------------------------------------------------------------


def _check_files(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} has no config.json, so it is not a Hugging Face model folder; check the path")
    if not weight_files(folder):
        raise UserError(f"{source} has no weights (*.safetensors or *.bin); copy them there or give the hub id")

