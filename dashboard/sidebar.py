"""The sidebar: what the command line and the reader choose to look at."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import streamlit as st

from dashboard.common import escaped, friendly
from dashboard.opening import opened
from dashboard.view import View, says_which_texts
from policies.errors import UserError
from sim.finding import files_of, found_profiles, key_of, other_profiles, profile_for, recordings_in
from sim.opening import open_profile
from traces.costs import Profile
from traces.recording import Recording

USAGE = "start with `streamlit run app.py -- TRACE ... --profile FILE --sweep FOLDER --bench FILE`"


def arguments() -> argparse.Namespace:
    """The command line. Raises UserError for options that are not there."""
    parser = argparse.ArgumentParser(prog="streamlit run app.py --", add_help=False, exit_on_error=False)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    for option in ("--profile", "--sweep", "--bench"):
        parser.add_argument(option, action="append", default=[], type=Path)
    parser.add_argument("--anywhere", action="store_true")
    try:
        options, unknown = parser.parse_known_args(sys.argv[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"{error}: {USAGE}") from None
    if unknown:
        raise UserError(f"unknown option {unknown[0]}: {USAGE}")
    return options


def choose(options: argparse.Namespace, shipped: Path) -> View | None:
    """What the sidebar says to look at; None without any recording. Everything chosen here stays in the URL.

    :param shipped: where the shipped samples/ and profiles/ lie.
    """
    given = bool(options.traces)
    found = [folder for trace in options.traces or [shipped / "samples"] for folder in recordings_in(trace, given=given)]
    folders = {str(folder) if given else folder.name: folder for folder in found}
    if not folders:
        return None
    side = st.sidebar
    name = side.selectbox("Recording", list(folders), key="recording", bind="query-params")
    folder = folders[name]
    recording = opened(str(folder), files_of(folder))
    drafter = side.selectbox("Drafter", recording.drafters, key="drafter", bind="query-params")
    temperature = choose_temperature(recording)
    whole = choose_texts(recording, drafter, temperature)
    profile = None
    with friendly():
        profile = choose_profile(recording, drafter, folder, options.profile, shipped / "profiles")
    others = {other: path for other, path in folders.items() if other != name}
    sweeps, benches = tuple(options.sweep), tuple(options.bench)
    return View(recording, name, drafter, temperature, profile, others, sweeps, benches, options.anywhere, whole)


def choose_temperature(recording: Recording) -> float | None:
    """One of the recorded temperatures; None when there is a single one."""
    known = sorted({round(float(value), 4) for value in recording.temperature})
    if len(known) < 2:
        return None
    return st.sidebar.selectbox("Temperature", known, key="temperature", bind="query-params")


def choose_texts(recording: Recording, drafter: str, temperature: float | None) -> bool:
    """Whether to look at every text of a large recording, or at as many as can be replayed while one waits."""
    sample = View(recording, "", drafter, temperature, None, {})
    if len(sample.texts) == len(sample.every_text):
        return False
    whole = st.sidebar.toggle("Look at every text", key="every", bind="query-params")
    st.sidebar.caption("Every text: the first look takes a while." if whole else says_which_texts(sample))
    return whole


def choose_profile(recording: Recording, drafter: str, folder: Path, given: list[Path], shipped: Path) -> Profile | None:
    """The profile chosen in the sidebar; raises UserError when it does not fit the recording.

    Behind those of the recording's own models stand the shipped ones of other models: they answer "what if".
    """
    fitting, foreign = profiles_at_hand(str(folder), str(files_of(folder)), drafter, shipped, recording)
    names = {os.path.relpath(path): path for path in [*given, *fitting]}
    what_if = {f"what if: {path.stem}": path for path in foreign}
    if not names:
        st.sidebar.caption(
            "For predicted times measure this machine with `python -m traces.profile --out profile.json`, "
            "then open the dashboard with `--profile profile.json`."
        )
    choices = [*names, "none", *what_if]
    name = st.sidebar.selectbox("Hardware profile", choices, key="profile", bind="query-params")
    if name == "none":
        return None
    other_models = name in what_if
    path = what_if[name] if other_models else names[name]
    changed = path.stat().st_mtime_ns if path.exists() else 0
    profile = profile_at(str(path), changed, drafter, other_models, key_of(recording), recording)
    if other_models:
        about = f"{profile.machine}, {profile.content.get('kind', 'measured')}, with the models of another pair: a what-if."
        st.sidebar.caption(escaped(about))
        return profile
    st.sidebar.caption(escaped(profile.machine))
    return profile


@st.cache_resource(max_entries=20, show_spinner=False)
def profile_at(path: str, changed: int, drafter: str, other_models: bool, key: str, _recording: Recording) -> Profile:
    """The profile in a file, read again when the file has ``changed``. Raises UserError when it does not fit the recording."""
    if other_models:
        return open_profile(path, _recording, drafter, other_models=True)
    return profile_for(path, _recording, drafter)


@st.cache_data(max_entries=20, show_spinner=False)
def profiles_at_hand(
    folder: str, files: str, drafter: str, shipped: Path, _recording: Recording
) -> tuple[list[Path], list[Path]]:
    fitting = found_profiles(Path(folder), shipped, _recording, drafter)
    return fitting, other_profiles(shipped, fitting, drafter)
