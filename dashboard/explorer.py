"""Token explorer: one text cycle by cycle, and the draft tree behind any of its tokens, under two policies."""

from __future__ import annotations

import numpy as np
import polars as pl
import streamlit as st

from dashboard.common import (
    choose_policy,
    drawn_alone,
    escaped,
    friendly,
    nothing_drafted,
    policy_key,
    policy_of,
    show_chart,
    words,
)
from dashboard.view import View, current
from policies.contract import Policy
from sim import token_charts, walkthrough
from sim.walkthrough import Shown

# No bare strings in pages: Streamlit would show them.
FIRST, SECOND = "eagle3", "heterospec"  # what the two sides begin with
LIMIT = 400  # cycles walked at most; a text has some four tokens per cycle


@drawn_alone
def page() -> None:
    view = current()
    if nothing_drafted(view):
        return
    text = choose_text(view)
    last = int(view.recording.length[text]) - 2
    if last < 0:
        st.info("This text has no second token, so nothing was ever drafted.")
        return
    at = choose_position(view, text, last)
    left, right = st.columns(2, vertical_alignment="center")
    whole = left.toggle("Draw every drafted node, also those not sent to verification", key="whole", bind="query-params")
    sides = []
    for column, name, start in zip(st.columns(2, gap="medium"), "ab", (FIRST, SECOND), strict=True):
        with column, friendly():
            policy = policy_of(choose_policy(f"Policy {name.upper()}", name, start))
            st.caption(escaped((type(policy).__doc__ or "").strip().split("\n")[0]))
            sides.append((column, name, policy, walked(view.priced_key, policy_key(policy), text, view, policy)))
    for column, name, _, shown in sides:
        with column:
            told(view, name, shown, text, at, last)
    with right:
        jump_to_difference(view, text, at, [policy for _, _, policy, _ in sides])
    trees = [(column, name, policy, cycle_here(view, policy, shown, text, at)) for column, name, policy, shown in sides]
    deepest = max((int(here.step.done.draft.tree.depth.max()) for *_, here in trees), default=0)
    for column, name, _, here in trees:
        with column:
            tree(view, name, here, text, at, whole, None if whole else min(deepest, drawn_depth(view, trees, text)))


KEY = " ".join(
    f"<span style='background:{colour}; color:{token_charts.DARK}; border-radius:3px; padding:1px 6px; font-size:0.8rem'>"
    f"{token_charts.SOURCE_NAMES[name]}</span>"
    for name, colour in token_charts.SOURCES.items()
)


def choose_text(view: View) -> int:
    names = {f"{index} · {view.recording.domains[view.recording.domain_index[index]]}": int(index) for index in view.every_text}
    left, right = st.columns([1, 3], vertical_alignment="bottom")
    name = left.selectbox("Text", list(names), key="text", bind="query-params")
    text = names[name]
    prompt = words().text(view.recording.prompt_tokens(text))
    right.text_input("Prompt", prompt, disabled=True, key=f"prompt_{text}")
    return text


def choose_position(view: View, text: int, last: int) -> int:
    """The root of the trees: typed, clicked in a text, or reached by the buttons."""
    if st.session_state.get("at", 0) > last:
        st.session_state["at"] = last
    left, right = st.columns([1, 3], vertical_alignment="bottom")
    at = int(left.number_input("Position of the root", 0, last, key="at", bind="query-params", help="or click a token below"))
    tokens = view.recording.token[view.recording.offset[text] :]
    before = words().text(tokens[max(0, at - 12) : at])
    root, after = words().label(tokens[at]), words().label(tokens[at + 1])
    right.markdown(f"…{escaped(before)}:orange-background[{escaped(root)}] → the target says **{escaped(after)}**")
    return at


@st.cache_resource(max_entries=40, show_spinner=False)
def walked(key: str, policy_key: str, text: int, _view: View, _policy: Policy) -> list[Shown]:
    return walkthrough.cycles(_view.recording, _policy, _view.drafter, text, _view.cost(_policy.name), LIMIT)


def cycle_here(view: View, policy: Policy, shown: list[Shown], text: int, at: int) -> Shown:
    """The policy's own cycle that begins here, or what it would draft here."""
    own = next((each for each in shown if each.position == at), None)
    return own or fresh(view.priced_key, policy_key(policy), text, at, view, policy)


@st.cache_resource(max_entries=100, show_spinner=False)
def fresh(key: str, policy_key: str, text: int, at: int, _view: View, _policy: Policy) -> Shown:
    return walkthrough.cycle_at(_view.recording, _policy, _view.drafter, text, at, _view.cost(_policy.name))


def told(view: View, name: str, shown: list[Shown], text: int, at: int, last: int) -> None:
    """The text as this policy's cycles give it, with figures and buttons."""
    emitted, kept = sum(each.emitted for each in shown), sum(each.kept for each in shown)
    figures = {"cycles": f"{len(shown)}", "tau": f"{emitted / len(shown):.2f}", "verified per cycle": f"{kept / len(shown):.1f}"}
    for column, (figure, value) in zip(st.columns([2, 2, 3]), figures.items(), strict=True):
        column.metric(figure, value)
    lines = token_charts.text_lines(walkthrough.token_table(view.recording, shown, text), words())
    key = f"text_{name}_{text}"

    def clicked() -> None:
        found = st.session_state[f"chart_{key}"].selection["token"]
        if found:
            st.session_state["at"] = min(int(found[0]["position"]), last)

    st.html(KEY)
    with st.container(height=min(330, 20 * int(lines["line"].max()) + 165), border=True):
        show_chart(
            token_charts.text_chart(lines, at),
            lines,
            key,
            "Each cycle: tokens accepted from the draft, then one of the target's own. Click a token to see the tree behind it.",
            on_select=clicked,
            width="content",
        )
    before = [each.position for each in shown if each.position < at]
    after = [each.position for each in shown if each.position > at]
    left, right = st.columns(2)
    for place, label, where in ((left, "← previous cycle", before[-1:]), (right, "next cycle →", after[:1])):
        jump = {"on_click": go_to, "args": (where[0],)} if where else {}
        place.button(label, key=f"{label}{name}", disabled=not where, width="stretch", **jump)


@st.cache_data(max_entries=40, show_spinner=False)
def everywhere(key: str, policy_key: str, text: int, _view: View, _policy: Policy) -> pl.DataFrame:
    return walkthrough.accepted_everywhere(_view.recording, _policy, _view.drafter, np.array([text]), _view.cost(_policy.name))


def jump_to_difference(view: View, text: int, at: int, policies: list[Policy]) -> None:
    """A button to the next position (round the text) at which the two would draft or verify differently."""
    if len(policies) < 2:
        return
    one, other = (everywhere(view.priced_key, policy_key(policy), text, view, policy) for policy in policies)
    columns = ["kept", "levels", "accepted"]
    differ = one["position"].filter((one.select(columns) != other.select(columns)).select(pl.any_horizontal(columns)).to_series())
    ahead = [place for place in differ if place > at] or list(differ)
    label = f"Jump to the next of the {len(differ)} positions where the two differ" if len(differ) else "The two never differ here"
    jump = {"on_click": go_to, "args": (int(ahead[0]),)} if ahead else {}
    st.button(label, key="differ", disabled=not ahead, icon=":material/difference:", **jump)


def go_to(position: int) -> None:
    st.session_state["at"] = position


def drawn_depth(view: View, trees: list, text: int) -> int:
    """Depth of the deepest node drawn on either side, so that both trees share one scale."""
    tables = [walkthrough.tree_table(view.recording, here, text) for *_, here in trees]
    return max(int(table.filter(table["kept"] | table["true"])["depth"].max()) + 1 for table in tables)


def tree(view: View, name: str, here: Shown, text: int, at: int, whole: bool, depth: int | None) -> None:
    nodes = walkthrough.tree_table(view.recording, here, text)
    accepted, drafted = here.accepted, len(nodes) - 1
    st.markdown(
        f"Drafted **{drafted}** nodes in **{here.levels}** levels, had **{here.kept}** verified, **{accepted}** accepted: the "
        f"cycle emits **{here.emitted}**."
    )
    if here.missing:
        st.warning(f"The recording lacks {here.missing} of the expansions that this policy wants here: the tree is cut short.")
    following = int(view.recording.offset[text]) + at + accepted + 1
    end = int(view.recording.offset[text + 1])
    nodes = token_charts.with_bonus(nodes, int(view.recording.token[following]) if following < end else -1)
    layout = token_charts.tree_layout(nodes, whole)
    own = at == 0 or int(here.step.cycle.number[0]) > 0  # a tree drawn for the asking is its text's first cycle
    show_chart(
        token_charts.tree_chart(layout, words(), depth),
        layout,
        f"tree_{name}",
        ("" if own else "No cycle of this policy begins here; this is what it would draft. ")
        + "From left to right: the root, then a column per draft level. Thick lines: the target's own text. Point at a node for "
        "its probabilities and entropy.",
    )


if __name__ == "__main__":
    page()
