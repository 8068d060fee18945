"""Analytic profiles: shapes counted by hand, the roofline's two sides, the shipped files, the paper's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policies.errors import UserError
from traces.analytic import FOLDER, SHIPPED, analytic_profile, main
from traces.costs import check_profile, load_profile
from traces.roofline import Machine, dflash_context_shape, dflash_shape, eagle1_shape, eagle3_shape, medusa_shape, target_shape

MODELS = json.loads((FOLDER / "sources" / "models.json").read_text())


def test_shapes_have_the_published_sizes():
    published = {"llama-3.1-8b": 8.030e9, "vicuna-13b": 13.016e9, "llama-3.3-70b": 70.554e9}
    for name, size in published.items():
        assert target_shape(MODELS[name]["config"]).stored == pytest.approx(size, rel=1e-3)


def test_an_eagle3_head_by_hand():
    config = {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 50}  # fmt: skip
    shape = eagle3_shape(config, 30)  # keys are 4 wide: q 16 x 8, k and v 16 x 4, o 8 x 8, three of 8 x 20, head 8 x 30
    assert shape.parameters == 128 + 2 * 64 + 64 + 480 + 240 and shape.cache == 8 and shape.layers == 1


def test_other_heads_by_hand():
    config = {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 50}  # fmt: skip
    eagle = eagle1_shape(config)  # fc 16 x 8, q and o 8 x 8, k and v 8 x 4, three of 8 x 20, the target's head 8 x 50
    assert eagle.parameters == 128 + 2 * 64 + 2 * 32 + 480 + 400 and eagle.cache == 8 and eagle.layers == 1
    medusa = medusa_shape(config)  # a block 8 x 8, a matrix 8 x 50
    assert medusa.parameters == 64 + 400 and medusa.cache == medusa.layers == 0
    dflash = dflash_shape(config, layers=3)  # each q and o 8 x 8, k and v 8 x 4, three of 8 x 20
    assert dflash.parameters == 3 * (2 * 64 + 2 * 32 + 480) + 400 and dflash.cache == 8 and dflash.layers == 3
    context = dflash_context_shape(config, layers=3, streams=5)  # fc 40 x 8, k and v 8 x 4 of each layer
    assert context.parameters == 320 + 3 * 2 * 32 and context.cache == context.layers == 0


def test_drafters_of_each_kind(tmp_path: Path, capsys):
    """A level of Medusa heads costs the same whatever its width and context, one of a DFlash block nothing: the block is run when
    trees begin; the manifest's kinds are named."""
    out = tmp_path / "p.json"
    drafts = ["--draft", "eagle3", "--draft", "old=eagle", "--draft", "heads=medusa", "--draft", "block=dflash"]
    main(["--hardware", "l4", "--model", "llama-3.1-8b", *drafts, "--out", str(out)])
    profile = load_profile(out)
    assert [drafter["kind"] for drafter in profile.content["drafters"]] == ["eagle3", "eagle", "medusa", "dflash"]
    one = profile.cost("heads")
    assert float(one.draft_ms(1, 0, 4)) == float(one.draft_ms(32, 2048, 4)) == float(one.catch_up_ms(16, 512, 4))
    block = profile.cost("block")
    assert float(block.draft_ms(32, 2048, 4)) == 0 and float(block.catch_up_ms(1, 512, 4)) > 2 * float(one.catch_up_ms(1, 512, 4))
    more = [float(block.catch_up_ms(n, 512, 64)) for n in (1, 16)]  # accepted tokens pass no layer
    assert more[0] < more[1] < 1.1 * more[0]
    assert float(profile.cost("old").draft_ms(32, 2048, 64)) > 1.5 * float(profile.cost("old").draft_ms(1, 0, 1))


def test_both_sides_of_the_roofline():
    shape = target_shape(MODELS["llama-3.1-8b"]["config"])
    machine = Machine(1000, 100, bandwidth_share=1.0, compute_share=1.0)
    memory = (shape.parameters + 32 * 2048) * 2 / 1e12 * 1e3
    assert machine.pass_ms(shape, 1, 0) == pytest.approx(memory, rel=1e-6)  # one token reads all weights
    many = machine.pass_ms(shape, 4000, 0)
    assert many == pytest.approx(2 * 4000 * (shape.parameters + 32 * 8192 * 4000) / 1e14 * 1e3, rel=1e-6)  # multiplying decides
    assert Machine(1e9, 1e9, launch_us=5).pass_ms(shape, 1, 0) == pytest.approx(32 * 0.005)  # the host decides
    two = Machine(1000, 100, 2, 10, bandwidth_share=1.0, compute_share=1.0).pass_ms(shape, 1, 0)
    assert two == pytest.approx(memory / 2 + 64 * 0.01)


def test_shipped_profiles_are_what_the_command_makes(tmp_path: Path, capsys):
    main(["--shipped", str(tmp_path)])
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(f"{gpu}_{model}.json" for gpu in SHIPPED for model in MODELS)
    for name in made:
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), f"{name}: run python -m traces.analytic --shipped"
        assert load_profile(FOLDER / name).content["kind"] == "analytic"


def test_as_few_devices_as_hold_the_model():
    def devices(hardware: str, model: str) -> int:
        return load_profile(FOLDER / f"{hardware}_{model}.json").content["method"]["devices"]

    assert [devices(gpu, "llama-3.1-8b") for gpu in SHIPPED] == [1, 1, 1, 1, 1]
    assert [devices(gpu, "vicuna-13b") for gpu in SHIPPED] == [1, 1, 1, 2, 2]
    assert [devices(gpu, "llama-3.3-70b") for gpu in SHIPPED] == [2, 2, 2, 8, 8]


def test_a_draft_model_of_ones_own(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama-3.1-8b"]["config"] | {"num_hidden_layers": 4}))
    (tmp_path / "gpu.json").write_text(json.dumps({"bandwidth_gb_s": 500, "bf16_tflop_s": 50, "memory_gb": 40}))
    words = ["--hardware", str(tmp_path / "gpu.json"), "--model", "vicuna-13b", "--out", str(tmp_path / "p.json")]
    main([*words, "--draft", f"small={tmp_path / 'config.json'}", "--draft", "eagle3"])
    profile = load_profile(tmp_path / "p.json")
    assert profile.drafters == ["small", "eagle3"]
    assert float(profile.cost("small").draft_ms(1, 512, 1)) > float(profile.cost("eagle3").draft_ms(1, 512, 1))


def test_it_fits_recordings_of_its_size_only():
    profile = analytic_profile("h100", "llama-3.1-8b")
    check_profile(profile, {"target": {"id": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "parameters": 8030261248}, "drafters": []})
    with pytest.raises(UserError, match="is of meta-llama/Llama-3.1-8B-Instruct .8.03 billion.*made with reference .0.0104"):
        check_profile(profile, {"target": {"id": "reference", "parameters": 10426624}, "drafters": []})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "tpu", "--model", "vicuna-13b"], "hardware 'tpu' is none of a100"),
        (["--hardware", "a100", "--model", "gpt-9"], "model 'gpt-9' is none of llama-3.1-8b"),
        (["--hardware", "a100"], "give --hardware, --model and --out"),
        (["--shipped", "/nowhere/at-all"], "there is no folder"),
    ],
)
def test_refusals(tmp_path, refused, words, message):
    assert message in refused(lambda: main([*words, "--out", str(tmp_path / "p.json")]))
    assert not list(tmp_path.iterdir())


def test_mixtures_of_experts_are_refused():
    with pytest.raises(UserError, match="mixture of experts"):
        target_shape(MODELS["llama-3.1-8b"]["config"] | {"num_local_experts": 8})


def test_the_papers_speedups_come_out_but_for_one_model():
    from benchmarks.paper_table import check

    for row in check():
        if row.model == "Vicuna 13B":  # verification would have to cost a quarter more than the roofline says
            assert 0.1 < row.mean < 0.25 and 1.15 < row.verify < 1.35
        else:
            assert abs(row.mean) < 0.1, row


def test_which_assumption_fails():
    """As many reads of the cache as the other models ask for bring the one that misses home, and break none."""
    from benchmarks.paper_table import check, explain, failing, reads_of_others

    rows = check()
    assert failing(rows) == ["Vicuna 13B"] and all(row.reads > 5 for row in rows)
    again = check(reads_of_others(rows))
    assert failing(again) == [] and max(abs(row.mean) for row in again) < 0.05
    assert "reads the cache once" in explain(rows, failing(rows))[0]
