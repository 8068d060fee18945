"""Record, replay, live decoding and fidelity, end to end, over architectures and both kinds of drafters, in float64."""

from __future__ import annotations

import json

import pytest

from live.fidelity import check_policy, check_texts
from live.pair import load_pair
from policies.registry import load_policy
from tests.live.families import POLICIES, QUICK, SLOW, write_pair
from traces.record import main as record
from traces.recording import open_recording


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(family, marks=pytest.mark.long) for family in SLOW)])
def test_fidelity_of_every_architecture(family, tmp_path):
    target, eagle3, draft = write_pair(family, tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the cat sat", "once upon a time a dog ran home")))
    trace = str(tmp_path / "trace")
    models = ["--target", target, "--draft", eagle3, "--draft", draft, "--dtype", "float64"]
    size = ["--max-new-tokens", "24", "--batch", "2", "--top-m", "8", "--positions", "16"]
    cover = [word for spec in POLICIES for word in ("--cover", spec)]
    record([*models, "--prompts", f"story={prompts}", *size, *cover, "--out", trace])
    recording = open_recording(trace, verify=True)
    pair = load_pair(target, [eagle3, draft], "float64")
    assert check_texts(recording, pair, exact=True)["identical"] == 2
    cycles = {"eagle3": 0, "draft": 0}
    for drafter in cycles:
        for spec in POLICIES:
            report = check_policy(recording, pair, load_policy(spec), drafter, 1000)
            assert report.identical == report.cycles > 0 and not report.notes
            cycles[drafter] += report.cycles
    plain = len(POLICIES) * 46  # cycles of plain decoding: 2 texts of 23 tokens behind prefill
    assert plain >= cycles["eagle3"] > cycles["draft"]  # trained on nothing, it is mostly wrong
    assert cycles["draft"] < 0.75 * plain  # right often enough to prove something
