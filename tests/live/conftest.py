"""Settings of the model tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.tiny_pair import TinyPair

if TYPE_CHECKING:
    from live.pair import Pair


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models are faster on one thread, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def headed_pair(tiny_pair: TinyPair, tiny_heads) -> Pair:
    """The tiny target with four kinds of heads, which read different streams of it, in float64."""
    from live.pair import load_pair

    return load_pair(tiny_pair.target, [tiny_pair.eagle3, *tiny_heads.values()], "float64")


@pytest.fixture(scope="session")
def headed_recording(tiny_pair: TinyPair, tiny_heads, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy and sampled texts of it in one recording. Read it; copy it before you change it."""
    from traces.record import main

    out = tmp_path_factory.mktemp("heads") / "trace"
    drafts = [word for folder in (tiny_pair.eagle3, *tiny_heads.values()) for word in ("--draft", folder)]
    groups = ["--temperature", "0", "--temperature", "1", "--top-p", "0.95", "--seed", "4", "--limit", "2", "--top-m", "8"]
    size = ["--batch", "2", "--max-new-tokens", "32", "--dtype", "float64"]
    main(["--target", tiny_pair.target, *drafts, "--prompts", *tiny_pair.prompts, *size, *groups, "--out", str(out)])
    return out
