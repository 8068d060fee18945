"""What leaves the policy lab: the policy as JSON, command lines that reproduce what was seen, and an engine's own words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import streamlit as st

from dashboard.common import escaped, from_here, policy_of
from dashboard.view import View
from policies.contract import Policy
from sim.export import Export, exported_from
from sim.metrics import result_rows
from sim.setting import Setting
from sim.tally import Tally


@st.fragment
def show(view: View, setting: Setting, study: str, sums: Tally) -> None:
    st.subheader("Take it away", anchor=False)
    policy: Policy = policy_of(study)
    content = json.dumps(policy.to_json(), indent=1)
    left, right = st.columns([1, 2])
    name, icon = f"{policy.name}.json", ":material/download:"
    left.download_button("Policy as JSON", content, name, "application/json", icon=icon, key="json", on_click="ignore")
    left.caption("Takes the place of a name wherever a policy is asked for.")
    right.code("\n".join(commands(view, setting, study)), language="bash", wrap_lines=True)
    every = " of every text" if len(view.texts) < len(view.every_text) else ""
    right.caption(f"The same replay{every}, and the same policy decoding live.")
    row = result_rows(sums, policy, setting)[-1]
    exports = {each.engine: each for each in exported_from(view.recording, view.drafter, policy, row.accepted_by_depth)}
    engine = st.segmented_control("In the words of an engine", list(exports), key="engine", bind="query-params")
    if engine:
        in_words(exports[engine])


def commands(view: View, setting: Setting, study: str) -> list[str]:
    """What to type for the same on a command line, or live."""
    trace, spec = typed(view.recording.folder), shlex.quote(study)
    drafter = shlex.quote(view.drafter)  # a training-free one may come with parameters in brackets
    words = [trace, f"--drafter {drafter}"]
    if view.temperature is not None:
        words.append(f"--temperature {view.temperature:g}")
    profile = ""
    if view.profile is not None:
        profile = f" --profile {typed(Path(view.profile.source.removeprefix('the profile ')))}"
        words += [profile.strip(), "--other-models"] if view.what_if else [profile.strip()]
    for option in ("batch", "ragged", "execution", "schedule"):
        if (value := getattr(setting, option)) != getattr(view.setting, option):
            words.append(f"--{option} {value}")
    lines = [f"python -m sim.replay {' '.join(words)} --policy {spec}"]
    if not view.what_if:  # another pair's profile predicts nothing of this one's decoding
        lines.append(f"python -m live.bench {trace}{profile} --drafter {drafter} --policy {spec}")
    return [*lines, f"python -m live.generate 'Why is the sky blue?' --policy {spec}"]


def typed(path: Path) -> str:
    return shlex.quote(str(from_here(path)))


def in_words(export: Export) -> None:
    """What to tell one engine, and what it cannot be told."""
    if export.command:
        st.code(export.command, language="bash", wrap_lines=True)
    for name, content in export.files.items():
        st.caption(name)
        st.code(json.dumps(content, indent=1), language="json")
    for lacking in export.cannot:
        st.caption(escaped(lacking))
