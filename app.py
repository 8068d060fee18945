"""The dashboard: ``streamlit run app.py [-- TRACE ... --profile FILE --sweep FOLDER --bench FILE]``.

This file draws the title and hands over to the sidebar and the pages in dashboard/. Logic lives in sim/.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

HERE = Path(__file__).parent
PAGES = {  # file in dashboard/: title, icon, the question that the page answers
    "recording": ("Recording", ":material/database:", "What was recorded, on what, and can it be trusted?"),
    "entropy": ("Entropy and acceptance", ":material/show_chart:", "Does the draft know when it is right?"),
    "lab": (
        "Policy lab",
        ":material/science:",
        "What would each policy have done on these very texts? Every cycle replayed, none estimated.",
    ),
    "explorer": (
        "Token explorer",
        ":material/account_tree:",
        "What does a policy draft here, what does it have verified, and what does the target take?",
    ),
    "compare": (
        "Compare",
        ":material/compare_arrows:",
        "Where do two policies, or two recordings, differ, and is the difference more than chance?",
    ),
    "pareto": ("Pareto", ":material/scatter_plot:", "Which settings does no other setting beat?"),
    "cost": ("Cost", ":material/timer:", "What does each part of a cycle take on this machine, and do predictions come true?"),
}
# a draft tree; drawn here, since an icon by name would be fetched from a server of others
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path d="M3 8h4l5-5M7 8l5 5M7 8h6" fill="none"
stroke="#0072B2" stroke-width="2" stroke-linecap="round"/></svg>"""
# two charts side by side need the width
NARROW_MARGINS = "<style>[data-testid=stMainBlockContainer] {padding: 3rem 2.5rem 4rem}</style>"
EMPTY = """No recording to show yet. Make one of the shipped model pair and open it (some minutes on two cores):

    python -m traces.record --out my_recording
    streamlit run app.py -- my_recording"""


def main() -> None:
    st.set_page_config(page_title="SpecReplay", page_icon=ICON, layout="wide")
    st.html(NARROW_MARGINS)
    pages = [
        st.Page(HERE / "dashboard" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "recording")
        for name, (title, icon, _) in PAGES.items()
    ]
    questions = {title: question for title, _, question in PAGES.values()}
    page = st.navigation(pages)
    st.title(page.title, anchor=False)  # before anything that takes time
    st.markdown(f"*{questions[page.title]}*")

    from dashboard.common import friendly  # behind the title: the first of these imports loads torch, which takes seconds
    from dashboard.garbage import set_aside
    from dashboard.sidebar import arguments, choose
    from dashboard.view import remember

    with friendly():
        view = choose(arguments(), HERE / "traces")
        if view is None:
            st.info(EMPTY)
            return
        remember(view)
        page.run()
        set_aside(page.title)


if __name__ == "__main__":
    main()
