"""Heads among others: requests that join a batch, and who is the same drafter as the one that was recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from live.fidelity import check_same_models
from live.pair import load_pair
from policies.errors import UserError
from tests.live.test_batcher import joins_as_it_replays
from tests.tiny_heads import NAMES
from traces.recording import open_recording


@pytest.fixture(scope="module")
def greedy(headed_recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The greedy texts of that recording."""
    from traces.slice import main

    out = tmp_path_factory.mktemp("greedy") / "trace"
    main([str(headed_recording), "--temperature", "0", "--out", str(out)])
    return out


@pytest.mark.parametrize("name", NAMES)
def test_requests_join_as_they_replay(greedy, headed_pair, name):
    joins_as_it_replays(headed_pair, greedy, name, "eagle3(total_tokens=30, depth=8, top_k=8)")


def test_heads_that_are_read_otherwise_are_others(headed_recording, headed_pair, tiny_pair, tiny_heads, tmp_path):
    """The same weights under another setting: neither fidelity nor a fill takes them for what was recorded, nor merges them."""
    from traces.merge import check_fit
    from traces.record import main

    about = open_recording(headed_recording).manifest
    check_same_models(headed_pair, about)
    others = [f"{tiny_pair.eagle3}(norm_before_residual=True)", tiny_heads["eagle1"], tiny_heads["medusa"]]
    other = load_pair(tiny_pair.target, [*others, f"{tiny_heads['dflash']}(block_size=4)"], "float64")
    for place in (0, 3):
        drafters = [*about["drafters"]]
        drafters[place] = drafters[place] | {"config_sha256": other.description["drafters"][place]["config_sha256"]}
        changed = about | {"drafters": drafters}
        with pytest.raises(UserError, match="is read otherwise than when it was recorded"):
            check_same_models(headed_pair, changed)
        with pytest.raises(UserError, match=f"drafter '{drafters[place]['name']}' under different settings"):
            check_fit(Path("one"), about, Path("two"), changed)
        copy = shutil.copytree(headed_recording, tmp_path / str(place))
        (copy / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="is read otherwise"):
            main(["--fill", str(copy), "--policy", "chain(k=12)"])
        old = about | {"drafters": [{k: v for k, v in one.items() if k != "config_sha256"} for one in drafters]}
        check_same_models(headed_pair, old)  # of an earlier version
        check_fit(Path("one"), about, Path("two"), old)
    moved = about | {"drafters": [about["drafters"][0] | {"captured_layers": [1, 2, 3]}, *about["drafters"][1:]]}
    with pytest.raises(UserError, match="is read otherwise"):
        check_same_models(headed_pair, moved)
