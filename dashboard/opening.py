"""Recordings that are open: the first look at a large one takes a while, in the background, and the page says how far it is."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

import streamlit as st

from traces.recording import Recording, open_recording

HELD = 4
"""Recordings kept open at a time, over all sessions."""
LOOK = 0.1
"""Seconds between two looks at how far an opening is."""


class Opening:
    """A recording being opened. It goes on when the page is drawn anew meanwhile, and every session waits for the same one.

    done, of   shards read so far, of how many; both 0 while their checksums are compared
    recording  the open recording, or why it cannot be opened
    """

    def __init__(self, folder: str):
        self.done = self.of = 0
        self.recording: Future[Recording] = Future()
        threading.Thread(target=self._open, args=(folder,), daemon=True).start()

    def _open(self, folder: str) -> None:
        try:
            self.recording.set_result(open_recording(folder, on_shard=self._told))
        except BaseException as error:  # whoever waits is told
            self.recording.set_exception(error)

    def _told(self, done: int, of: int) -> None:
        self.done, self.of = done, of

    def failed(self) -> bool:
        """Whether it ended without a recording."""
        return self.recording.done() and self.recording.exception() is not None

    def says(self) -> str:
        """How far it is, in words."""
        if not self.of:
            return "Opening the recording: comparing its files with their checksums"
        return f"Opening the recording for the first time: {self.done} of {self.of} shards read."


@st.cache_resource(show_spinner=False)
def _openings() -> tuple[dict[tuple, Opening], threading.Lock]:
    """Those of all sessions, the oldest first."""
    return {}, threading.Lock()


def opened(folder: str, files: tuple) -> Recording:
    """The recording in a folder, opened when its ``files`` (`sim.finding.files_of`) are new; a bar shows how far that is.

    Raises UserError as `traces.recording.open_recording` does.
    """
    known, lock = _openings()
    key = (folder, files)
    bar = st.empty()
    while True:
        with lock:
            running = next((one for (where, _), one in known.items() if where == folder and not one.recording.done()), None)
            if key in known and not known[key].failed():  # what failed may have been mended
                opening = known[key] = known.pop(key)  # the last one used
                break
            if running is None:
                opening = known[key] = Opening(folder)
                for oldest in [one for one in known if known[one].recording.done()][: max(len(known) - HELD, 0)]:
                    del known[oldest]
                break
        bar.text("Opening the recording: waiting for its files as they were before")
        wait([running.recording])  # two at a time would delete each other's cache
    while not wait([opening.recording], LOOK).done:
        bar.progress(opening.done / max(opening.of, 1), text=opening.says())
    bar.empty()
    return opening.recording.result()
