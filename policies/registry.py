"""Finding policies: each file of this folder registers its own; ``--policy`` reads names, JSON files and Python files.

    eagle3                                name
    eagle3(total_tokens=24, depth=5)      name with parameters
    heterospec.json                       what `sim.fit` wrote
    my_file.py:MyPolicy                   a class from outside, also with (parameters)
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import pkgutil
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from policies.contract import Policy
from policies.errors import UserError

_registered: dict[str, type[Policy]] = {}
WRITE_IT = "write it with sim.fit or Policy.to_json"


def policy(name: str, paper: str, kind: str = "policy") -> Callable[[type], type]:
    """Class decorator: make the class a frozen dataclass and register it under ``name`` with its paper's link."""

    def register(cls: type) -> type:
        cls.name, cls.paper, cls.kind = name, paper, kind
        cls = dataclasses.dataclass(frozen=True)(cls)
        _registered[name] = cls
        return cls

    return register


def all_policies() -> dict[str, type[Policy]]:
    """Every policy of this folder, by name. Importing a file registers what it holds; there is no list to keep."""
    _import_all()
    return dict(sorted(_registered.items()))


@functools.cache
def _import_all() -> None:
    import policies

    for module in pkgutil.iter_modules(policies.__path__):
        if module.name != "__main__":
            importlib.import_module(f"policies.{module.name}")


def load_policy(spec: str) -> Policy:
    """The policy that ``spec`` names: ``name``, ``name(parameter=value, ...)``, a JSON file or ``file.py:Class``."""
    spec = spec.strip()
    if spec.endswith(".json"):
        return _from_file(Path(spec))
    head, parameters = split_spec(spec)
    if ".py:" in head:
        return build(_outside(head), parameters)
    if head.endswith(".json"):
        base = _from_file(Path(head))
        return build(type(base), {**_fields(base), **parameters})
    known = all_policies()
    if head not in known:
        raise UserError(f"unknown policy '{head}': {_how_to_write(head, known)}")
    return build(known[head], parameters)


def _how_to_write(head: str, known: dict[str, Any]) -> str:
    if head.endswith(".py"):
        return "of a Python file say which class, FILE.py:Class"
    if head.partition("(")[0] in known:
        return "write name(parameter=value, ...), with a bracket at the end"
    return hint(head, known)


def from_json(content: dict[str, Any]) -> Policy:
    """The policy that :meth:`Policy.to_json` described."""
    if not isinstance(content, dict) or not isinstance(content.get("policy"), str):
        raise UserError(f"not a policy: the JSON names none under the key 'policy'; {WRITE_IT}")
    name, parameters = content["policy"], content.get("parameters", {})
    if not isinstance(parameters, dict):
        raise UserError(f"policy '{name}' in JSON: its parameters must be an object; {WRITE_IT}")
    if ".py:" in name:
        return build(_outside(name), parameters)
    known = all_policies()
    if name not in known:
        raise UserError(f"unknown policy '{name}' in JSON: {hint(name, known)}")
    return build(known[name], parameters)


def _from_file(path: Path) -> Policy:
    try:
        return from_json(json.loads(path.read_text()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"policy file {path} does not exist: give a JSON that sim.fit wrote, or a name") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"policy file {path} is not valid JSON ({error}): write it with sim.fit") from None
    except OSError as error:
        raise UserError(f"policy file {path} cannot be read ({error.strerror}): give what sim.fit wrote") from None


def split_spec(spec: str, noun: str = "policy") -> tuple[str, dict[str, Any]]:
    """``name(a=1, b=x)`` into its name and parameters; bare words are strings."""
    if not spec.endswith(")"):
        return spec, {}
    place = spec.find(".json(") + len(".json") if ".json(" in spec else spec.find("(")  # a folder's name may hold brackets
    head, bracket, inside = spec[:place], place >= 0, spec[place + 1 : -1]
    try:
        call = ast.parse(f"f({inside})", mode="eval").body if bracket else None
    except (SyntaxError, ValueError):
        call = None
    one_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
    if not one_call or any(keyword.arg is None for keyword in call.keywords):
        raise UserError(f"cannot read {noun} '{spec}': write name(parameter=value, ...)")
    names = [keyword.arg for keyword in call.keywords]
    if len(set(names)) < len(names):
        raise UserError(f"cannot read {noun} '{spec}': it gives a parameter twice")
    return head.strip(), {keyword.arg: _literal(keyword.value, spec) for keyword in call.keywords}


def _literal(node: ast.expr, spec: str) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise UserError(f"cannot read a parameter of '{spec}': values are numbers, words, lists, or text in quotes") from None


def _outside(head: str) -> type[Policy]:
    path, _, name = head.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"policy file {path} does not exist: give FILE.py:Class")
    module_spec = importlib.util.spec_from_file_location(f"_outside_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    inside = all_policies()  # all of them: what the outside file is the first to import would be forgotten with it
    sys.modules[module_spec.name] = module  # dataclasses look the module up to read its annotations
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"policy file {path} cannot be imported ({told}): mend it first") from error
    finally:  # an outside class is found by its file; it never takes the place of a policy of this folder
        _registered.clear()
        _registered.update(inside)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Policy) and dataclasses.is_dataclass(found)):
        raise UserError(f"{path} has no policy class '{name}': derive it from Policy and decorate it with @policy")
    found.source = head
    return found


def _fields(base: Policy) -> dict[str, Any]:
    return {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}


def build(cls: type, parameters: dict[str, Any]) -> Any:
    """An object of a registered class, its parameters checked against its fields; messages name it by its ``noun``."""
    what = f"{getattr(cls, 'noun', 'policy')} '{cls.name}'"
    types_ = typing.get_type_hints(cls)
    known = {field.name: types_[field.name] for field in dataclasses.fields(cls)}
    values = {}
    for name, value in parameters.items():
        if name not in known:
            raise UserError(f"{what} has no parameter '{name}': {hint(name, known)}")
        values[name] = _coerce(what, name, value, known[name])
    return cls(**values)


def hint(wrong: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(wrong, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known) or 'none'}."


def _coerce(what: str, name: str, value: Any, wanted: Any) -> Any:
    """Lists from JSON become tuples; a whole number does for a float; anything else must have the declared type."""
    value = _tuples(value)
    options = typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)
    accepted = tuple(typing.get_origin(option) or option for option in options)
    if float in accepted and int not in accepted and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, tuple):  # tuple[float, ...]: each item must be one
        items = [typing.get_args(option) for option in options if typing.get_origin(option) is tuple]
        if len(items) == 1 and len(items[0]) == 2 and items[0][1] is Ellipsis:
            wanted = items[0][0]
            value = tuple(_coerce(what, f"{name}[{i}]", item, wanted) for i, item in enumerate(value))
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        names = " or ".join(getattr(option, "__name__", str(option)) for option in accepted)
        raise UserError(f"{what}: {name} must be of type {names}, not {value!r}")
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
