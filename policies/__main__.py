"""`python -m policies` lists the policies; `python -m policies NAME` explains one."""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import TYPE_CHECKING

from policies.errors import run_command

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    from policies.contract import Policy


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog="python -m policies", description="List the policies, or explain one.")
    about.add_argument("policy", nargs="?", metavar="NAME", help="a policy's name, a fitted JSON or file.py:Class")
    return about


def _fields(cls: type[Policy], learned: bool) -> list[tuple[str, str, str]]:
    """(name, type, default) of the parameters, or of what fitting fills in."""
    import dataclasses

    chosen = [field for field in dataclasses.fields(cls) if field.name.endswith("_") == learned]
    return [(field.name, str(field.type), repr(field.default)) for field in chosen]


def list_policies() -> str:
    """All policies: name, kind, one line, paper, parameters with defaults."""
    from policies.registry import all_policies

    blocks = []
    for name, cls in all_policies().items():
        parameters = ", ".join(f"{field}={default}" for field, _, default in _fields(cls, learned=False))
        lines = [f"{name}  [{cls.kind}]  {inspect.getdoc(cls).splitlines()[0]}"]
        lines += [f"    {cls.paper}"] if cls.paper else []
        lines += [f"    {parameters}"] if parameters else []
        lines += [f"    a capped form; as published: {cls.published}"] if cls.published else []
        lines += ["    must be fitted: python -m sim.fit --help"] if cls.required_fit() else []
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def list_drafters() -> str:
    """All training-free drafters: name, one line, paper, parameters with defaults."""
    from policies.lookup.rule import all_rules

    blocks = []
    for name, cls in all_rules().items():
        parameters = ", ".join(f"{field}={default}" for field, _, default in _fields(cls, learned=False))
        about = inspect.getdoc(sys.modules[cls.__module__]).splitlines()[0]
        blocks.append(f"{name}  [--drafter]  {about}\n    {cls.paper}\n    {parameters}")
    return "\n".join(blocks)


def explain(spec: str) -> str:
    """One policy in full: what its class and its file say, and its parameters."""
    from policies.registry import load_policy

    found = load_policy(spec)
    cls = type(found)
    lines = [f"{found.spec()}  [{cls.kind}]", cls.paper, "", inspect.getdoc(cls) or ""]
    for title, learned in (("Parameters", False), ("Learned by sim.fit", True)):
        for place, (name, kind, default) in enumerate(_fields(cls, learned)):
            lines += ["", title] if place == 0 else []
            value = getattr(found, name)
            changed = "" if repr(value) == default else f"   here {value!r}"
            lines.append(f"  {name}: {kind} = {default}{changed}")
    about = inspect.getdoc(sys.modules[cls.__module__])
    return "\n".join(lines + (["", "From its file", about] if about else []))


def main() -> None:
    given = parser().parse_args()
    drafters = f"Training-free drafters (RULE+NETWORK: the network drafts where the rule finds nothing)\n{list_drafters()}"
    print(explain(given.policy) if given.policy else f"{list_policies()}\n\n{drafters}")


if __name__ == "__main__":
    run_command(main)
