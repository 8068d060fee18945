"""Where models come from: a folder, a hub id, or the shipped pair; how to name one on a command line, how to fetch it.

    org/model                                  hub id, or a folder
    org/model(revision=abc123)                 one commit, branch or tag
    org/head(layers=[2, 16, 29])               an EAGLE-3 head with its options (live/pair.py lists them)

A recording keeps what was written here, so whoever opens it loads the same files.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policies.errors import UserError

REFERENCE = Path(__file__).parent / "reference"
OPTIONS = ("revision", "layers", "norm_before_residual", "block_size")


@dataclass(frozen=True)
class Source:
    """A model's name (hub id, folder or "reference...") and the options written behind it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def revision(self) -> str | None:
        return None if self.options.get("revision") is None else str(self.options["revision"])

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.name}({listed})" if listed else self.name


def parse_source(text: str, **defaults: Any) -> Source:
    """``NAME`` or ``NAME(option=value, ...)``; ``defaults`` that are None do not count.

    :raises UserError: when it cannot be read or has an unknown option.
    """
    given = {name: value for name, value in defaults.items() if value is not None}
    if not text.endswith(")") or Path(text).expanduser().is_dir():
        return Source(text, given)
    name, _, inside = text[:-1].partition("(")
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        written = {k.arg: k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise UserError(f"cannot read model '{text}': write NAME(revision='...') with a quoted revision") from None
    if unknown := sorted(map(str, set(written) - set(OPTIONS))) or ([ast.unparse(call.args[0])] if call.args else []):
        raise UserError(f"model '{text}' has no option '{unknown[0]}': known are {', '.join(OPTIONS)}")
    return Source(name.strip(), given | written)


def resolve(name: str | Path, part: str = "target") -> str:
    """Folder or hub id for ``name``; "reference" is the shipped pair's ``part`` (target, draft, eagle3, medusa or dflash).

    :raises UserError: when the shipped part or a folder given as a path is not there.
    """
    if str(name) == "reference":
        folder = REFERENCE / part
        if not (folder / "config.json").is_file():
            raise UserError(f"the reference {part} is not in {folder}; run the training script in live/reference first")
        return str(folder)
    looks_like_path = str(name).startswith((".", "/", "~")) or str(name).count("/") > 1
    path = Path(name).expanduser()
    if looks_like_path and not path.is_dir():
        raise UserError(f"there is no model folder {name}; check the path, or give a hub id such as org/model")
    return str(path) if path.is_dir() else str(name)


def fetch_config(source: str, revision: str | None = None) -> Path:
    """config.json of a folder or hub id (fetched into the hub's cache).

    :raises UserError: when there is none, or it is not in the cache and the hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source) / "config.json"
    from transformers.utils import cached_file

    try:
        found = cached_file(source, "config.json", revision=revision)
    except Exception as error:  # the hub's kinds, too many to list
        raise UserError(explain(source, error)) from error
    if found is None:
        raise UserError(f"{source} has no config.json, so it is no Hugging Face model; check the id")
    return Path(found)


def fetch_folder(source: str, revision: str | None = None) -> Path:
    """Folder with configuration and weights of a small model, such as a draft head.

    :raises UserError: as :func:`fetch_config`.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "*.safetensors", "pytorch_model*.bin", "medusa_lm_head*.pt"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise UserError(explain(source, error)) from error


def weight_files(folder: Path) -> list[Path]:
    """The files a loader would read: safetensors when there are any, else pickled ones."""
    pickled = (*folder.glob("pytorch_model*.bin"), *folder.glob("medusa_lm_head*.pt"))
    return sorted(folder.glob("*.safetensors")) or sorted(pickled)


def explain(source: str, error: Exception) -> str:
    """One sentence for what the hub, safetensors or transformers told."""
    reason = first_line(error)
    if Path(source).is_dir():
        return f"the model in {source} cannot be loaded ({reason}); its files may be damaged, copy them again"
    return f"no model {source!r} could be loaded ({reason}); check the id and the network, or give a local folder"


def first_line(error: Exception) -> str:
    """The first line of an error's text, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(". ")
