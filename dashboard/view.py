"""What the sidebar chose to look at: a recording, a drafter, the texts, a machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import streamlit as st
import torch

from policies.errors import UserError
from sim.finding import digest_of, key_of
from sim.setting import Setting
from sim.trial import texts_at
from sim.walkthrough import some_texts
from traces.costs import CostModel, Profile, check_profile
from traces.recording import Recording

MOST_REPLAYED, MOST_DRAFTED = 12_000, 6_000
"""Positions replayed, and positions drafted on one by one, while one waits: about half a second each."""
CORES = len(os.sched_getaffinity(0))
"""For what takes longer."""


@dataclass(frozen=True)
class View:
    """What the sidebar chose.

    name         of the recording, as the sidebar shows it
    temperature  of the texts to look at; None: all texts have the same
    others       the other recordings at hand, by name
    sweeps, benches  files named on the command line
    anywhere     whether typed paths may leave the folder that the app was started in
    whole        look at every text, however many there are
    """

    recording: Recording
    name: str
    drafter: str
    temperature: float | None
    profile: Profile | None
    others: dict[str, Path]
    sweeps: tuple[Path, ...] = ()
    benches: tuple[Path, ...] = ()
    anywhere: bool = False
    whole: bool = False

    @cached_property
    def key(self) -> str:
        """What results about this recording, drafter, temperature and choice of texts are remembered under."""
        return f"{key_of(self.recording)} {self.drafter} {self.temperature} {self.whole}"

    @cached_property
    def priced_key(self) -> str:
        """The same for results of policies that may look at what time costs."""
        return f"{self.key} {digest_of(self.profile) if self.profile else ''}"

    @cached_property
    def setting(self) -> Setting:
        """How policies are replayed: one request at a time."""
        return Setting(self.drafter, temperature=self.temperature)

    @cached_property
    def every_text(self) -> np.ndarray:
        """Indices int64 of all texts at the temperature."""
        chosen = texts_at(self.recording, self.temperature)
        return np.arange(len(self.recording.length)) if chosen is None else chosen.numpy()

    @cached_property
    def texts(self) -> np.ndarray:
        """Those to look at: of a large recording as many as can be replayed while one waits."""
        return self.every_text if self.whole else some_texts(self.recording, self.every_text, MOST_REPLAYED)

    @cached_property
    def few_texts(self) -> np.ndarray:
        """As many of these as can be drafted on at every position while one waits."""
        return self.texts if self.whole else some_texts(self.recording, self.texts, MOST_DRAFTED)

    @cached_property
    def what_if(self) -> bool:
        """Whether the profile is of other models than the recording's."""
        try:
            if self.profile is not None:
                check_profile(self.profile, self.recording.manifest)
        except UserError:
            return True
        return False

    def cost(self, policy: str) -> CostModel | None:
        """The cost model of the chosen profile, with the named policy's own overhead where it was measured."""
        return None if self.profile is None else self.profile.cost(self.drafter, policy)


def remember(view: View) -> None:
    """Make the view known to the pages. What is small enough to wait for is computed on one core: several would wait for one
    another, and on a busy machine for longer than they compute."""
    torch.set_num_threads(CORES if view.whole else 1)
    st.session_state["view"] = view


@contextmanager
def every_core() -> Iterator[None]:
    """Inside, a long computation takes every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def current() -> View:
    """The view that app.py has put together for this run."""
    return st.session_state["view"]


def says_which_texts(view: View, texts: np.ndarray | None = None) -> str:
    """Which texts a figure is about, where that is not every text; intervals are as wide as these few make them."""
    texts = view.texts if texts is None else texts
    if len(texts) == len(view.every_text):
        return ""
    held, every = (int(view.recording.length[some].sum()) for some in (texts, view.every_text))
    return (
        f"{len(texts):,} of {len(view.every_text):,} texts, evenly spread over each domain "
        f"({held:,} of {every:,} positions); intervals are for so many."
    )
