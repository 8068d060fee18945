"""The cost model: measured tables of one model pair on one machine, as the policies' cost protocol.

A profile is a JSON file that people can share (`traces/profiles/README.md` describes it key by key). It holds what was
measured, scatter included; smoothing is done on reading (`traces.grid`), so a profile never loses what was seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policies.errors import UserError
from policies.lookup.name import read_name
from traces.grid import INTERPOLATIONS, Grid, aligned

FORMAT = "specreplay-profile"
VERSION = 1
DEFAULT_POLICY = "eagle3"
"""Whose loop overhead stands for policies that were not measured themselves."""

_AXES = {
    "verify": ("tokens", "context", "batch"),
    "commit": ("tokens", "batch"),
    "plain": ("context", "batch"),
    "draft": ("width", "context", "batch"),
    "catch_up": ("tokens", "context", "batch"),
    "overhead": ("levels", "batch"),
    "looked_up": ("levels", "batch"),
}
_SHARED, _PER_DRAFTER, _PER_POLICY = ("verify", "commit", "plain"), ("draft", "catch_up"), ("overhead", "looked_up")
_ABOVE_0 = ("verify", "plain")  # what speedups divide by
LONGEST = 1e9
"""Milliseconds, eleven days: sums of what is beyond would leave the numbers."""
_CURE = "measure it again with python -m traces.profile"


class CostModel:
    """Milliseconds of one drafter with its target: implements :class:`policies.cost.Cost`.

    All arguments are int64 tensors (or ints) that broadcast; results float64 of the broadcast shape, on the arguments'
    device, non-decreasing in every argument. What is not asked for (no token, no node) costs nothing.
    """

    def __init__(
        self, tables: Mapping[str, Grid], context_offset: int = 0, loops: Mapping[str, Mapping[str, Grid]] | None = None
    ):
        """:param tables: verify, commit, draft, catch_up, overhead, and where they were measured plain decoding's and looked_up. A
            training-free drafter has neither draft nor catch_up: both cost nothing.
        :param context_offset: tokens to add to every context that is asked for.
        :param loops: tables by policy, for :meth:`of`: overhead, and looked_up where a rule stands before the network."""
        self.tables, self.context_offset, self.loops = tables, context_offset, loops or {}

    def draft_ms(self, width: Tensor, context: Tensor, batch: Tensor) -> Tensor:
        """One draft forward over ``width`` frontier nodes (the root is not one of them: see :meth:`catch_up_ms`)."""
        if "draft" not in self.tables:
            return self._free(width, context, batch)
        return self._asked("draft", width, context + self.context_offset, batch)

    def catch_up_ms(self, tokens: Tensor, context: Tensor, batch: Tensor) -> Tensor:
        """The draft's pass over ``tokens`` new committed tokens, which gives the root's children as well.

        With 0 tokens (right behind the prefill) only those are computed.
        """
        if "catch_up" not in self.tables:
            return self._free(tokens, context, batch)
        return self.tables["catch_up"](tokens, context + self.context_offset, batch)

    def verify_ms(self, tokens: Tensor, context: Tensor, batch: Tensor) -> Tensor:
        """The target's pass over ``tokens`` (kept nodes and the root) and the acceptance walk."""
        return self._asked("verify", tokens, context + self.context_offset, batch)

    def commit_ms(self, tokens: Tensor, batch: Tensor) -> Tensor:
        """Moving ``tokens`` (accepted nodes and the root) into place in the target's cache."""
        return self._asked("commit", tokens, batch)

    def overhead_ms(self, levels: Tensor, batch: Tensor) -> Tensor:
        """Drafting loop, tree, policy and decoding loop, for a cycle of ``levels`` draft levels; of a training-free drafter with
        what looking takes."""
        return self.tables["overhead"](levels, batch)

    def looked_up_ms(self, levels: Tensor, batch: Tensor) -> Tensor:
        """The same of a cycle whose ``levels`` a rule before the network looked up."""
        return self.tables["looked_up" if "looked_up" in self.tables else "overhead"](levels, batch)

    def look_ms(self, batch: Tensor) -> Tensor:
        """What a rule before the network takes where it finds nothing; 0 where there is none, or nobody knows."""
        return (self.looked_up_ms(1, batch) - self.overhead_ms(1, batch)).clamp(min=0)

    def plain_ms(self, context: Tensor, batch: Tensor) -> Tensor:
        """One token of plain decoding (its own loop included), behind ``context`` tokens."""
        if "plain" in self.tables:
            return self.tables["plain"](context + self.context_offset, batch)
        return self.verify_ms(1, context, batch) + self.overhead_ms(0, batch)

    def behind(self, tokens: int) -> CostModel:
        """The same machine with ``tokens`` more in front of every context."""
        return CostModel(self.tables, self.context_offset + tokens, self.loops)

    def of(self, policy: str) -> CostModel:
        """The same machine decoding with this policy, whose decisions take their own time; with the default's if unmeasured."""
        own = {kind: loops.get(policy) or loops[DEFAULT_POLICY] for kind, loops in self.loops.items()}
        return CostModel({**self.tables, **own}, self.context_offset, self.loops)

    def _free(self, *where: Tensor | int) -> Tensor:
        return torch.zeros_like(torch.broadcast_tensors(*aligned(*where))[0], dtype=torch.float64)

    def _asked(self, table: str, *where: Tensor | int) -> Tensor:
        where = aligned(*where)
        return self.tables[table](*where).masked_fill(where[0] <= 0, 0.0)


def machine_in_words(content: dict[str, Any]) -> str:
    """What a profile or a recording's manifest says of the machine that made it."""
    parts = [content.get("machine", {}).get("processor"), content.get("device"), content.get("dtype")]
    return ", ".join(dict.fromkeys(str(part) for part in parts if part)) or "an unknown machine"


@dataclass(frozen=True)
class Profile:
    """One model pair on one machine.

    content  the JSON document; see `traces/profiles/README.md`
    source   where it came from, for messages
    """

    content: dict[str, Any]
    source: str = "the profile"
    tables: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        _check_header(self.content, self.source)
        try:
            object.__setattr__(self, "tables", _tables(self.content, self.source))
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None

    @property
    def drafters(self) -> list[str]:
        """Names of the measured drafters."""
        return list(self.content["draft"])

    @property
    def machine(self) -> str:
        """The machine in words."""
        return machine_in_words(self.content)

    def cost(self, drafter: str, policy: str = DEFAULT_POLICY) -> CostModel:
        """The cost model of one drafter; the loop's overhead is that measured with ``policy``, or else the default's.

        Of a rule and a network (``suffix+eagle3``) it is the network's, and knows what looking takes, for prices (`sim.pricing`);
        policies decide as if the network drafted.

        :raises UserError: when the profile does not hold the drafter.
        """
        asked = read_name(drafter, self.drafters)
        loops, looking = self.tables["overhead"], self.tables["overhead"] | self.tables["looked_up"]
        tables = {kind: self.tables[kind] for kind in _SHARED if kind in self.tables}
        if asked.network is None:  # looking up takes no forward pass
            return CostModel(tables, loops={"overhead": looking}).of(policy)
        if asked.network not in self.drafters:
            raise UserError(
                f"{self.source} has no drafter '{asked.network}': it holds {', '.join(self.drafters)}; "
                "measure this one with python -m traces.profile --draft"
            )
        tables |= {kind: self.tables[kind][asked.network] for kind in _PER_DRAFTER}
        return CostModel(tables, loops={"overhead": loops} | ({"looked_up": looking} if asked.rule else {})).of(policy)

    def text(self) -> str:
        """The JSON document, as it lies in a file."""
        return _render(self.content)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the document: tells whether a file still holds the profile that something was computed with."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the profile, whole or not at all.

        :raises UserError: when the file cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.write(self.text())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write the profile {path} ({error.strerror}): name another file with --out") from error


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    :raises UserError: when the file is missing, not JSON, not a profile, damaged or of a newer version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no profile {path}: write it with python -m traces.profile --out {path}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"the profile {path} is not JSON ({error}): {_CURE}") from None
    except OSError as error:
        raise UserError(f"the profile {path} cannot be read ({error.strerror}): give a readable file") from None
    return Profile(content, f"the profile {path}")


def check_profile(profile: Profile, manifest: Mapping[str, Any], other: str = "the recording was made with") -> None:
    """Make sure that the profile was measured on the models of a recording (its manifest); what has no hash passes.

    An analytic profile was made from a shape: it fits every target of that size (parameters within 2%).

    :param other: what an error says of the models that ``manifest`` describes, in front of their name.
    :raises UserError: naming both models, when their weights or sizes differ.
    """
    shape, recorded = profile.content.get("target", {}), manifest.get("target", {})
    if profile.content.get("kind") == "analytic" and "parameters" in shape:
        a, b = shape["parameters"], recorded.get("parameters")
        if b is None or abs(a - b) > 0.02 * b:
            size = "unknown size" if b is None else f"{b / 1e9:.3g} billion"
            raise UserError(
                f"{profile.source} is of {shape.get('id', '?')} ({a / 1e9:.3g} billion parameters), {other} "
                f"{recorded.get('id', '?')} ({size}): make one with python -m traces.analytic --model"
            )
    ours = {drafter["name"]: drafter for drafter in profile.content.get("drafters", ())}
    pairs = [("target", profile.content.get("target", {}), manifest.get("target", {}))]
    pairs += [("drafter", ours[d["name"]], d) for d in manifest["drafters"] if d["name"] in ours]
    for kind, measured, recorded in pairs:
        a, b = measured.get("weights_sha256"), recorded.get("weights_sha256")
        if a and b and a != b:
            raise UserError(
                f"{profile.source} was measured with the {kind} {measured.get('id', '?')} (weights {a[:12]}), {other} "
                f"{recorded.get('id', '?')} (weights {b[:12]}): measure that pair with "
                "python -m traces.profile"
            )
        a, b = measured.get("config_sha256"), recorded.get("config_sha256")
        if a and b and a != b:
            raise UserError(
                f"{profile.source} was measured with {measured.get('id', '?')}, {other} {recorded.get('id', '?')}, whose settings "
                "(config.json, or the options behind the name) differ: measure that one with python -m traces.profile"
            )


def _check_header(content: Any, source: str) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("version"), int):
        raise UserError(f"{source} is not a SpecReplay profile: give a file that traces.profile wrote")
    if content["version"] > VERSION:
        raise UserError(
            f"{source} has format version {content['version']}, newer than version {VERSION}, the last this program "
            "reads: upgrade specreplay"
        )
    if content.get("interpolation") not in INTERPOLATIONS:
        raise UserError(f"{source} asks for interpolation {content.get('interpolation')!r}: it is linear or staircase")
    for key, kind in {"target": dict, "machine": dict, "drafters": list}.items():
        if not isinstance(content.get(key, kind()), kind):
            raise UserError(f"{source} lacks a valid {key!r}: {_CURE}")
    if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in content.get("drafters", ())):
        raise UserError(f"{source} names no model under 'name' in an entry of its 'drafters': {_CURE}")


def _tables(content: dict[str, Any], source: str) -> dict[str, Any]:
    """Grids by kind, and by kind and name where there is one per drafter or policy; plain may be missing."""
    tables: dict[str, Any] = {}
    for kind in _SHARED:
        if kind in content or kind != "plain":
            tables[kind] = _grid(content, source, kind, content.get(kind))
    for kind in (*_PER_DRAFTER, *_PER_POLICY):
        parts = content.get(kind, {} if kind == "looked_up" else None)
        if not isinstance(parts, dict) or not (parts or kind == "looked_up"):
            raise UserError(f"it has no table {kind!r}: {_CURE}")
        tables[kind] = {name: _grid(content, source, kind, part, f" of {name}") for name, part in parts.items()}
    if DEFAULT_POLICY not in tables["overhead"]:
        raise UserError(f"it has no overhead of the policy {DEFAULT_POLICY}, which stands for the others: {_CURE}")
    for kind in _PER_POLICY:
        if (default := tables[kind].get(DEFAULT_POLICY)) is not None:
            for name, part in content[kind].items():
                tables[kind][name] = _grid(content, source, kind, _as_the_default(part, default), f" of {name}")
    if lacking := tables["draft"].keys() ^ tables["catch_up"].keys():
        raise UserError(f"its tables draft and catch_up disagree about the drafter {min(lacking)!r}: {_CURE}")
    return tables


def _as_the_default(part: dict[str, Any], default: Grid) -> dict[str, Any]:
    """A policy's overhead, which was seen at the numbers of levels that it chose: below and beyond them it changes by what the
    default's changes by, and not by the slope between its own last two, which may lie one noisy level apart."""
    own, batches = part["levels"], part["batch"]
    if not set(batches) <= set(default.axes["batch"]):
        return part
    ms = dict(zip(own, torch.tensor(part["ms"], dtype=torch.float64), strict=True))
    batch = torch.tensor(batches)
    for level in (*default.axes["levels"], own[-1] + 1):  # one more, whose slope goes on
        if not own[0] <= level <= own[-1]:
            nearest = own[0] if level < own[0] else own[-1]
            ms[level] = (ms[nearest] + default(level, batch) - default(nearest, batch)).clamp(min=0)
    levels = sorted(ms)
    return part | {"levels": levels, "ms": [ms[level].tolist() for level in levels]}


def _grid(content: dict[str, Any], source: str, kind: str, part: Any, owner: str = "") -> Grid:
    axes = _AXES[kind]
    if not isinstance(part, dict) or "ms" not in part or any(not isinstance(part.get(axis), list) for axis in axes):
        raise UserError(f"it has no table {kind!r}{owner} with the axes {', '.join(axes)} and the values ms: {_CURE}")
    points = {axis: part[axis] for axis in axes}
    if any(isinstance(point, bool) or not isinstance(point, int) for axis in points.values() for point in axis):
        raise UserError(f"its table {kind!r}{owner} has an axis with points that are no whole numbers: {_CURE}")
    if kind in ("verify", "draft") and len(points[axes[0]]) < 2:
        raise UserError(f"its table {kind!r}{owner} has one point along {axes[0]}, two are needed: {_CURE}")
    steps = content["interpolation"] if kind not in _PER_POLICY else "linear"  # the loop is not captured in a graph
    grid = Grid(kind + owner, points, part["ms"], steps, smooth=("context",), source=source)
    ms = torch.as_tensor(part["ms"], dtype=torch.float64)
    if float(ms.max()) > LONGEST or (kind in _ABOVE_0 and not float(ms.min()) > 0):
        least = "above 0" if kind in _ABOVE_0 else "from 0"
        raise UserError(f"its table {kind!r}{owner} holds times that are not {least} to {LONGEST:g} ms: {_CURE}")
    return grid


def _render(content: dict[str, Any]) -> str:
    """JSON with each innermost list on one line, so that people can read and compare the tables."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # strings hold no line break, so only lists match
    return re.sub(r"\[\n *([^\[\]{}]*?)\n *\]", lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", text) + "\n"
