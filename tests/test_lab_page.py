"""The dashboard's policy lab, on a small made-up recording: it shows what the simulator computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from policies.registry import load_policy
from sim.bounds import place
from sim.metrics import replay_rows
from sim.setting import Setting
from sim.trial import run_trial
from tests.app_pages import by_key, captions, errors, open_page, table_with
from tests.made_up_recording import write_profile, write_recording
from traces.costs import load_profile
from traces.recording import open_recording


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recording(tmp_path_factory.mktemp("recordings") / "trace", {"math": 6.0, "story": 3.0})


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    return partial(open_page, monkeypatch)


def test_lab_replays_what_replay_rows_replays(recorded: Path, start):
    page = start("lab", recorded, study="chain(k=2)", against="chain(k=5)")
    table = table_with(page, "policy").set_index("policy")
    assert errors(page) == "" and list(table.index) == ["chain(k=2)", "chain(k=5)"] and "speedup" not in table.columns
    recording = open_recording(recorded)
    for spec in table.index:
        mean = replay_rows(recording, load_policy(spec))[-1]
        figures = ["tau", "kept", "levels", "coverage"]
        assert table.loc[spec][figures].to_list() == pytest.approx([getattr(mean, name) for name in figures])
    by_key(page.button_group, "of").set_value("story").run()
    story = replay_rows(recording, load_policy("chain(k=2)"))[1]
    assert story.domain == "story" and table_with(page, "policy")["tau"][0] == pytest.approx(story.tau)


def test_turning_a_parameter_rewrites_the_policy_and_the_address(recorded: Path, start):
    page = start("lab", recorded, study="chain(k=2)", against="autoregressive")
    by_key(page.number_input, "turn_chain_k").set_value(3).run()
    assert errors(page) == "" and page.query_params["study"] == "chain(k=3)"
    assert table_with(page, "policy")["policy"].to_list() == ["chain(k=3)", "autoregressive"]
    assert any("--policy 'chain(k=3)'" in code.value for code in page.code)
    by_key(page.number_input, "turn_chain_k").set_value(5).run()  # the default again: nothing to write
    assert page.query_params["study"] == "chain"
    by_key(page.number_input, "turn_chain_k").set_value(-1).run()
    assert errors(page) == "" and page.toast and page.query_params["study"] == "chain"


def test_a_wrong_policy_gets_a_sentence_and_the_others_are_replayed(recorded: Path, start):
    page = start("lab", recorded, study="eagel3", against="autoregressive")
    assert "unknown policy 'eagel3'" in errors(page) and "eagle3" in errors(page)
    assert table_with(page, "policy")["policy"].to_list() == ["autoregressive"]
    page = start("lab", recorded, study="eagle3", against="chain")
    assert "Not ranked" in captions(page)  # the recording's trees are narrower than EAGLE-3's


def test_profile_prices_and_a_foreign_one_is_refused(recorded: Path, start, tmp_path: Path):
    page = start("lab", recorded, "--profile", write_profile(tmp_path / "profile.json"), study="chain", against="autoregressive")
    chain = table_with(page, "policy").set_index("policy").loc["chain"]
    tau = [row.tau for row in replay_rows(open_recording(recorded), load_policy("chain"))]
    cycle_ms = 5 * 1.0 + 4.6  # five levels, the first of them the catch-up; six verified tokens
    assert chain["ms_per_token"] == pytest.approx(np.mean([cycle_ms / each for each in tau[:-1]]))
    assert chain["speedup"] == pytest.approx(5.0 * tau[-1] / cycle_ms)
    other = write_profile(tmp_path / "other.json", target_hash="99" * 32)
    page = start("lab", recorded, "--profile", other, study="chain", against="autoregressive")
    assert "measured with the target" in errors(page)
    assert "speedup" not in table_with(page, "policy").columns


def test_lab_batches_and_pipelines_as_replay_does(recorded: Path, start, tmp_path: Path):
    path = write_profile(tmp_path / "profile.json", batch=2)
    cost = load_profile(path).cost("eagle3")
    recording, policy = open_recording(recorded), load_policy("chain(k=2)")
    query = {"study": "chain(k=2)", "against": "autoregressive"}
    for chosen in ({"batch": 2, "ragged": "sum"}, {"execution": "pipelined"}):
        page = start("lab", recorded, "--profile", path, **query, **{name: str(value) for name, value in chosen.items()})
        row = table_with(page, "policy").set_index("policy").loc["chain(k=2)"]
        sums = run_trial(recording, policy, Setting("eagle3", **chosen), cost)
        assert errors(page) == "" and row["ms_per_token"] == pytest.approx(sums.mean("ms_per_token"))
        assert ("tokens_per_second" in row) == ("batch" in chosen)
        option, value = next(iter(chosen.items()))
        assert any(f"--{option} {value} --policy" in code.value or f"--{option} {value} --" in code.value for code in page.code)
    assert "an estimate" in captions(page)  # an EAGLE head would run ahead on features of its own


def test_beside_a_policy_that_decides_for_the_batch_the_lab_prices_fixed_groups(recorded: Path, start, tmp_path: Path):
    path, query = write_profile(tmp_path / "profile.json", batch=2), {"study": "chain(k=2)", "batch": "2"}
    cost, recording, policy = load_profile(path).cost("eagle3"), open_recording(recorded), load_policy("chain(k=2)")
    speeds = set()
    for against, schedule in (("autoregressive", "joining"), ("tetris", "fixed")):
        page = start("lab", recorded, "--profile", path, against=against, **query)
        row = table_with(page, "policy").set_index("policy").loc["chain(k=2)"]
        sums = run_trial(recording, policy, Setting("eagle3", 2, schedule=schedule), cost)
        assert errors(page) == "" and row["ms_per_token"] == pytest.approx(sums.mean("ms_per_token"))
        assert row["tokens_per_second"] == pytest.approx(sums.mean("tokens_per_second"))
        speeds.add(row["tokens_per_second"])
        assert f"Schedule {schedule}" in captions(page)
        told = [code.value for code in page.code if "sim.replay" in code.value]
        assert len(told) == 1 and ("--schedule fixed" in told[0]) == (schedule == "fixed")
    assert len(speeds) == 2, "the texts must tell the schedules apart"


def test_commands_name_files_as_one_types_them_here(recorded: Path, start, monkeypatch):
    monkeypatch.chdir(recorded.parent)
    path = write_profile(recorded.parent / "its profile.json")
    page = start("lab", recorded, "--profile", path, study="chain(k=2)", against="autoregressive")
    told = [code.value for code in page.code if "sim.replay" in code.value]
    assert errors(page) == "" and f"sim.replay {recorded.name} " in told[0] and "--profile 'its profile.json'" in told[0]


def test_a_profile_of_other_models_is_a_what_if(recorded: Path, start):
    page = start("lab", recorded, study="chain(k=2)", against="autoregressive")
    by_key(page.sidebar.selectbox, "profile").set_value("what if: h100_llama-3.1-8b").run()
    assert errors(page) == "" and "speedup" in table_with(page, "policy").columns
    assert "analytic" in captions(page) and "acceptance that of made-up" in captions(page)
    assert any("--other-models" in code.value and "live.bench" not in code.value for code in page.code)


def test_lab_places_a_policy_and_exports_it(recorded: Path, start, tmp_path: Path):
    profile = write_profile(tmp_path / "profile.json")
    query = {"study": "chain(k=2)", "against": "autoregressive", "bound": "true", "engine": "vllm"}
    page = start("lab", recorded, "--profile", profile, **query)
    table = table_with(page, "of_plain").set_index("name")
    assert errors(page) == "" and "Scored on 2 of the texts" in captions(page)
    recording, cost = open_recording(recorded), load_profile(profile).cost("eagle3")
    lines = place(recording, [load_policy("chain(k=2)")], cost, "eagle3").lines
    assert list(table.index) == [line.name for line in lines]
    assert table["ms_per_token"].dropna().to_list() == [line.ms_per_token for line in lines if line.ms_per_token is not None]
    assert table.loc["[least time possible]"]["ms_per_token"] <= table["ms_per_token"].min()
    assert any("vllm serve" in code.value and '"num_speculative_tokens": 2' in code.value for code in page.code)
    page = start("lab", recorded, study="chain(k=2)", against="autoregressive", bound="true")
    assert errors(page) == "" and "Choose a hardware profile" in captions(page)
    assert "ms_per_token" not in table_with(page, "of_plain").columns
