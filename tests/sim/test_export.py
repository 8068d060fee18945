"""Settings in the engines' words, and what each engine cannot be told."""

from __future__ import annotations

import json

import pytest

from policies.registry import load_policy
from sim.export import exported, main, parse_tiers, shape_of
from tests.sim.many_texts import write_many

EAGLE, LM = {"kind": "eagle3", "id": "org/head"}, {"kind": "lm", "id": "org/small"}
TARGET = {"id": "org/big"}


def exports(spec, drafter, rates=(0.9, 0.5, 0.25), **tiers):
    shapes = {int(upto[1:]): shape_of(load_policy(tier)) for upto, tier in tiers.items()}
    return {one.engine: one for one in exported(shape_of(load_policy(spec)), drafter, TARGET, list(rates), shapes)}


def test_a_tree_of_an_eagle_head():
    found = exports("eagle3(total_tokens=24, depth=3, top_k=8)", EAGLE)
    options = found["sglang"].options  # both count the root, and levels
    assert options["speculative-num-steps"] == 3 and options["speculative-eagle-topk"] == 8
    assert options["speculative-num-draft-tokens"] == 24 and options["speculative-algorithm"] == "EAGLE3"
    assert not found["sglang"].cannot
    trt = found["tensorrt-llm"].options
    assert (trt["max_draft_len"], trt["dynamic_tree_max_topK"], trt["max_total_draft_tokens"]) == (3, 8, 23)
    assert found["vllm"].options["num_speculative_tokens"] == 3 and "is a tree" in found["vllm"].cannot[0]
    assert found["vllm"].options["synthetic"]["synthetic_acceptance_rates"] == [0.9, 0.5, 0.25]
    assert "no EAGLE heads" in found["transformers"].cannot[0] and not found["transformers"].options


def test_a_chain_of_a_draft_model():
    found = exports("chain(k=3)", LM)
    assert found["sglang"].options["speculative-num-draft-tokens"] == 4 and found["sglang"].options["speculative-eagle-topk"] == 1
    assert found["sglang"].options["speculative-algorithm"] == "STANDALONE"
    assert found["transformers"].options["num_assistant_tokens"] == 3
    assert found["transformers"].options["assistant_confidence_threshold"] == 0.0
    assert json.loads(found["vllm"].command.split("--speculative-config ")[1].strip("'"))["num_speculative_tokens"] == 3


def test_a_dflash_drafter():
    drafter = {"kind": "dflash", "id": "org/block", "levels": 7}
    whole = exports("chain(k=9)", drafter, (0.6, 0.3))
    assert whole["sglang"].options == {
        "speculative-algorithm": "DFLASH",
        "speculative-draft-model-path": "org/block",
        "speculative-num-draft-tokens": 8,  # the root's place among them
    }
    assert (whole["vllm"].options["method"], whole["vllm"].options["num_speculative_tokens"]) == ("dflash", 7)
    told = "speculative_config=DFlashDecodingConfig(max_draft_len=7, speculative_model='org/block')"
    assert whole["tensorrt-llm"].command == told
    assert "no DFlash drafters" in whole["transformers"].cannot[0]
    assert not any("block_size" in line for one in whole.values() for line in one.cannot)
    short = exports("chain(k=3)", drafter, (0.6, 0.3), _4="chain(k=2)")
    # up to four requests the table of vLLM and the schedule of TensorRT-LLM draft less
    warned = {"sglang": ("3", "4"), "vllm": ("2 or 3", "3 or 4"), "tensorrt-llm": ("2 or 3", "3 or 4")}
    for engine, (places, sizes) in warned.items():
        (masked,) = [line for line in short[engine].cannot if "masks" in line]
        assert masked.startswith(f"it masks the {places} places") and masked.endswith(f"block_size=N)' tells, N = {sizes}")
    deep = exports("chain(k=7)", drafter, (0.6, 0.3), _4="chain(k=2)")
    assert any("masks the 2 places" in line for line in deep["vllm"].cannot)
    assert not any("masks" in line for line in deep["sglang"].cannot)
    anchored = exports("chain(k=3)", drafter | {"block_size": 7}, (0.6, 0.3))["vllm"].cannot
    assert any("masks the 3 places" in line and "N = 3" in line for line in anchored)  # the root's place drafts, too
    assert any("one length" in line for line in short["sglang"].cannot)
    tree = exports("eagle3(total_tokens=24, depth=8, top_k=8)", drafter, (0.6, 0.3))
    assert tree["sglang"].options["speculative-num-draft-tokens"] == 8 and "one path" in tree["sglang"].cannot[0]
    assert "use_dynamic_tree" not in tree["tensorrt-llm"].options and tree["tensorrt-llm"].options["max_draft_len"] == 7


def test_what_stands_behind_a_name_is_no_part_of_it():
    block = {"kind": "dflash", "id": "/models/my block(block_size=4)", "levels": 3}
    found = exports("chain(k=3)", block)
    assert "--speculative-draft-model-path '/models/my block' " in found["sglang"].command
    assert found["vllm"].options["model"] == found["tensorrt-llm"].options["speculative_model"] == "/models/my block"
    assert not any("recorded as" in line for one in found.values() for line in one.cannot)
    head = exports("chain(k=3)", EAGLE | {"id": "org/head(revision='abc', layers=[1, 2, 3])"})
    assert head["vllm"].options["model"] == "org/head"
    for engine in ("sglang", "vllm", "tensorrt-llm"):
        (said,) = [line for line in head[engine].cannot if "recorded as" in line]
        assert said.startswith("org/head was recorded as org/head(revision='abc', layers=[1, 2, 3]):")


def test_heads_of_other_kinds():
    medusa = exports("chain(k=9)", {"kind": "medusa", "id": "org/heads", "levels": 4}, (0.6, 0.3))
    served = json.loads(medusa["vllm"].command.split("--speculative-config ")[1].strip("'"))
    assert (served["method"], served["num_speculative_tokens"]) == ("medusa", 4)  # no more than there are heads
    assert all(not medusa[one].options and "Medusa" in medusa[one].cannot[0] for one in ("sglang", "tensorrt-llm", "transformers"))
    assert "output matrices" in medusa["vllm"].cannot[0]  # which reference/medusa has not
    heads = {"kind": "medusa", "id": "org/heads", "levels": 4}
    for spec in ("eagle3(total_tokens=60, depth=8, top_k=10)", "chain(k=9)"):  # nor in a tree, nor in any tier
        options = exports(spec, heads, (0.6, 0.3), _1="chain(k=9)", _8="chain(k=2)")["vllm"].options
        assert options["num_speculative_tokens"] == 4
        assert options["num_speculative_tokens_per_batch_size"] == [[1, 1, 4], [2, 8, 2]]
    eagle = exports("eagle3(total_tokens=24, depth=3, top_k=8)", {"kind": "eagle", "id": "org/head"})
    assert eagle["sglang"].options["speculative-algorithm"] == "EAGLE" and eagle["vllm"].options["method"] == "eagle"
    assert all(not eagle[one].options and "EAGLE" in eagle[one].cannot[0] for one in ("tensorrt-llm", "transformers"))


def test_tiers_by_batch():
    found = exports("chain(k=5)", LM, _4="chain(k=5)", _16="chain(k=2)", _64="autoregressive")
    assert found["vllm"].options["num_speculative_tokens_per_batch_size"] == [[1, 4, 5], [5, 16, 2], [17, 64, 0]]
    assert found["tensorrt-llm"].options["draft_len_schedule"] == {4: 5, 16: 2, 64: 0}
    steps = {first: one["candidate_steps"] for first, one in found["sglang"].files["adaptive.json"].items()}
    assert steps == {"1": [5], "5": [2], "17": [0]}
    assert "no tiers by batch" in found["transformers"].cannot[0]
    trees = exports("eagle3", EAGLE, _4="eagle3", _64="chain(k=2)")
    assert "only chains can change with the batch" in trees["sglang"].cannot[0]


def test_rules_of_their_own_are_said_to_be_lost():
    found = exports("static(tree=eagle1)", EAGLE)
    assert not found["sglang"].options and "options hold chains" in found["sglang"].cannot[0]
    assert "options hold chains" in found["tensorrt-llm"].cannot[0]


def test_plain_decoding_sets_nothing():
    found = exports("autoregressive", LM, rates=())
    assert not any(one.options for one in found.values())


def test_the_command(tmp_path, capsys):
    trace = write_many(tmp_path / "trace")
    main([str(trace), "--policy", "chain(k=2)", "--engine", "vllm", "--json", str(tmp_path / "e.json")])
    content = json.loads((tmp_path / "e.json").read_text())
    rates = content["engines"]["vllm"]["options"]["synthetic"]["synthetic_acceptance_rates"]
    assert len(rates) == 2 and 1 > rates[0] > rates[1] > 0
    assert rates == pytest.approx(content["accepted_by_depth"], abs=1e-6)
    assert "vllm serve" in capsys.readouterr().out
    main([str(trace), "--policy", "chain(k=9)", "--engine", "vllm"])  # deeper than it was recorded
    assert "so that neither tau nor rates hold: draft what is missing with python -m traces.record" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["8", "x=chain", "0=chain", "8="])
def test_tiers_that_cannot_be_read(word, refused):
    assert "cannot read the tier" in refused(lambda: parse_tiers([word]))
    assert "two tiers end at 8" in refused(lambda: parse_tiers(["8=chain", "8=eagle3"]))
