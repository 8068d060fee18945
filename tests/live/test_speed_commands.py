"""The commands that print live figures: what they count and what they conclude. They assert no times."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import live_speed, long_context, loop_time
from benchmarks.live_speed import ASSISTED, LOOKED_UP, PLAIN
from live.bench import at_temperature, chosen_texts, plain_told, predict
from policies.errors import UserError
from policies.registry import load_policy
from tests.sim.many_texts import content as priced
from traces.costs import Profile
from traces.recording import open_recording

OURS = ("eagle3: chain(k=2)", "draft: chain(k=2)", "suffix: chain(k=2)", "suffix+draft: chain(k=2)")


def test_everyone_races(tiny_recording, tmp_path, capsys):
    out = tmp_path / "speed.json"
    contenders = [word for name in OURS for word in ("--contender", name)]
    live_speed.main([str(tiny_recording), "--texts", "1", "--rounds", "2", *contenders, "--json", str(out)])
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    everyone = {*PLAIN, *ASSISTED, *LOOKED_UP, *OURS}
    assert set(found["figures"]) == everyone and all(name in told for name in everyone)
    for by_domain in found["figures"].values():
        assert set(by_domain) == {"story", "math"}
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in by_domain.values())
    assert set(found["overhead"]) == set(OURS) and all(0 < share < 1 for share in found["overhead"].values())
    assert found["predicted"][OURS[0]]["tau"] >= 1 and "Fastest: " in told


def test_nobody_decodes_at_a_disadvantage(tiny_recording, pair64):
    """Inference mode is worth a tenth of a small model's token: ours and the baselines all have it."""
    ours = [("eagle3", load_policy("chain(k=2)"))]
    contenders = live_speed.everyone(open_recording(tiny_recording), pair64, ours, {"eagle3": None})
    for name, decode in contenders.items():
        modes: list[bool] = []
        hook = pair64.model.register_forward_pre_hook(lambda *_, modes=modes: modes.append(torch.is_inference_mode_enabled()))
        decode(0)
        hook.remove()
        assert modes and all(modes), name


def test_with_a_profile_all_decide_and_are_predicted_by_it(tiny_recording, tmp_path, monkeypatch):
    """Live decoding under other prices than the prediction's would be another policy."""
    from live import contenders

    own = {name: {"draft": priced()[name]["made-up"]} for name in ("draft", "catch_up")}
    profile = Profile(priced(**own))
    profile.save(tmp_path / "p.json")
    seen, decoder_of = {}, contenders.decoder_of

    def watched(recording, pair, policy, drafter, cost):
        seen.setdefault(drafter, []).append(cost)
        return decoder_of(recording, pair, policy, drafter, cost)

    monkeypatch.setattr(contenders, "decoder_of", watched)
    words = [word for name in OURS[1:] for word in ("--contender", name)]
    out = tmp_path / "speed.json"
    words += ["--profile", str(tmp_path / "p.json"), "--json", str(out)]
    live_speed.main([str(tiny_recording), "--texts", "1", "--rounds", "1", *words])
    found = json.loads(out.read_text())["predicted"]
    recording = open_recording(tiny_recording)
    texts = chosen_texts(recording, 1, at_temperature(recording, 0.0))  # those that were decoded
    assert set(seen) == {"draft", "suffix", "suffix+draft"}
    for drafter, costs in seen.items():
        assert len(costs) == 2 and None not in costs  # the race, and the breakdown
        rows = predict(recording, load_policy("chain(k=2)"), drafter, profile.cost(drafter), texts)
        told = {"tau": rows[-1].tau, "speedup": plain_told(rows) / rows[-1].ms_per_token}
        assert found[f"{drafter}: chain(k=2)"] == told


def test_hugging_face_is_counted_without_its_first_cycle(tiny_recording, pair64):
    """Tokens after the prefill's, at most as many as the text has."""
    recording = open_recording(tiny_recording)
    everyone = live_speed.everyone(recording, pair64, [], {})
    for name, decode in everyone.items():
        tokens, ms = decode(0)
        whole = int(recording.length[0]) - 1
        assert (tokens == whole if name in PLAIN else 0 <= tokens <= whole) and ms >= 0


def verdicts(fast: dict[str, float], hugging_face: float = 1.0, overhead: float = 0.1) -> list[str]:
    ms = {"plain loop": {"a": 10.0, "b": 12.0}, "HF assisted": {"a": 10.0 / hugging_face, "b": 12.0}, "eagle3: x": fast}
    mean = {name: sum(cells.values()) / 2 for name, cells in ms.items()}
    return live_speed.verdicts(ms, mean, ms["plain loop"], 11.0, {"eagle3: x": overhead}, ["a", "b"])


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        (({"a": 5.0, "b": 10.0},), []),
        (({"a": 4.0, "b": 12.5},), [2, 3]),
        (({"a": 9.0, "b": 9.0},), [0, 1]),
        (({"a": 5.0, "b": 10.0}, 2.5), [3]),
        (({"a": 5.0, "b": 10.0}, 1.0, 0.2), [4]),
    ],
)
def test_verdicts(figures, missed):
    first, *lines = verdicts(*figures)
    assert first == "Fastest: eagle3: x"
    assert [index for index, line in enumerate(lines) if line.split()[0] == "NO"] == missed


@pytest.mark.parametrize("text", ["chain(k=3)", "eagle3:chain"])
def test_contenders_name_their_drafter(text):
    with pytest.raises(UserError, match="DRAFTER: POLICY"):
        live_speed.split_contender(text)


def test_long_context(capsys):
    options = ["--context", "40", "--context", "70", "--cycles", "1", "--layers", "3", "--policy", "chain(k=2)"]
    long_context.main(options)
    told = capsys.readouterr().out
    assert "chain(k=2)" in told and "40" in told and "70" in told
    with pytest.raises(UserError, match="--context"):
        long_context.main(["--context", "1"])


def test_the_loop_alone(pair64, capsys):
    """Graphs that do nothing still make whole cycles: every policy asks for its levels."""
    loop_time.main(["--policy", "chain(k=3)", "--policy", "autoregressive", "--cycles", "2", "--rounds", "2"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in table[-2:]] == ["chain(k=3)", "autoregressive"] and all(float(row[1]) > 0 for row in table[-2:])
    decoder = loop_time.decoder_of(pair64, load_policy("chain(k=3)"), None)
    assert loop_time.cycle_ms(decoder, 2) > 0 and decoder.drafter.network._slots == 3
    with pytest.raises(UserError, match="--rounds of 2 or more"):
        loop_time.main(["--policy", "eagle3", "--rounds", "1"])
