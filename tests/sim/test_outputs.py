"""Files that commands write: what stands at their place is replaced, but a link or a pipe stays what it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from policies.errors import UserError
from sim.outputs import check_writable, write_text


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    check_writable(tmp_path / "link")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "after"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_pipe_is_written_to(tmp_path):
    """As /dev/stdout and /dev/null are: for root, who may replace them, that would be the end of them."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR)  # so that writing waits for no reader
    try:
        check_writable(pipe)
        write_text(pipe, "figures")
        assert os.read(held, 100) == b"figures" and pipe.is_fifo()
    finally:
        os.close(held)


def test_what_cannot_be_written_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(UserError, match="cannot write"):
            check_writable(Path(path))
    check_writable(None, tmp_path / "file")
