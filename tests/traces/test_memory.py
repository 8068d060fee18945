"""Memory that runs out: half as much side by side, within the shard, and on from where it failed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import live.model
import traces.capture
from live.eagle_network import EagleNetwork
from policies.errors import UserError
from traces.halving import Halving
from traces.record import main
from traces.recording import open_recording

QUICK = ("--max-new-tokens", "6", "--cover", "chain(k=3)", "--dtype", "float64")
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()])
def test_blocks_shrink_and_go_on_from_where_they_failed(error):
    tried, said, dropped = [], [], []
    halving = Halving(8, "texts", "buy more", said.append)

    def work(start: int, stop: int) -> list[int]:
        tried.append((start, stop))
        if stop - start > 3 and start < 14:
            raise error
        return list(range(start, stop))

    blocks = list(halving.blocks(17, work, lambda: dropped.append(len(tried))))
    assert tried == [(0, 8), (0, 4), (0, 2), *((i, i + 2) for i in range(2, 16, 2)), (16, 17)]
    assert sum(blocks, []) == list(range(17)) and dropped == [1, 2] and halving.size == 2
    assert said == ["memory ran out: going on with 4 texts at a time", "memory ran out: going on with 2 texts at a time"]


def test_one_alone_is_too_much():
    def work(start: int, stop: int) -> None:
        raise GPU

    with pytest.raises(UserError, match="memory ran out with texts one at a time: buy more$"):
        list(Halving(3, "texts", "buy more").blocks(3, work, lambda: None))


def test_other_errors_pass():
    def work(start: int, stop: int) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        list(Halving(4, "texts", "").blocks(4, work, lambda: None))


@pytest.fixture
def short_of_memory(monkeypatch):
    """Two texts at once run out within four tokens, more than three trees at their second level; how often, by kind."""
    run, grow, generate = live.model.CachedModel.run, EagleNetwork.grow, traces.capture._generate
    failures = {"texts": 0, "trees of the language model": 0, "trees of the head": 0}
    generating = []

    def fail(kind: str, error: Exception):
        failures[kind] += 1
        raise error

    def short_run(self, tokens, positions, mask, extra):
        if generating and self.rows == 2 and tokens.shape[1] == 1 and int(positions[0, 0]) % 4 == 0:
            fail("texts", GPU)
        if self.tree_size > 0 and self.rows > 3:
            fail("trees of the language model", CPU)
        return run(self, tokens, positions, mask, extra)

    def short_grow(self, parent, token, width):
        if len(parent) > 3:
            fail("trees of the head", GPU)
        return grow(self, parent, token, width)

    def told_generate(*everything):
        generating.append(True)
        try:
            return generate(*everything)
        finally:
            generating.clear()

    monkeypatch.setattr(traces.capture, "_generate", told_generate)
    monkeypatch.setattr(live.model.CachedModel, "run", short_run)
    monkeypatch.setattr(EagleNetwork, "grow", short_grow)
    return failures


def test_a_recording_goes_on_with_less(tiny_pair, tmp_path, capsys, request):
    main(tiny_pair.record(tmp_path / "whole", *QUICK))
    whole = open_recording(tmp_path / "whole")
    failures = request.getfixturevalue("short_of_memory")
    capsys.readouterr()
    main(tiny_pair.record(tmp_path / "short", *QUICK))
    told = capsys.readouterr().err
    short = open_recording(tmp_path / "short", verify=True)
    pairs = len([plan for plan in short.plans if len(plan.sequences) == 2])
    assert failures["texts"] == pairs  # once for each shard of two, which begins with both again
    assert told.count("going on with 1 texts at a time") == failures["texts"]
    grown = failures["trees of the language model"] + failures["trees of the head"]
    assert failures["trees of the head"] > 0 and told.count("positions at a time") == grown >= len(short.plans)
    plans = [json.loads((tmp_path / name / "manifest.json").read_text())["plan"] for name in ("whole", "short")]
    assert plans[0] == plans[1] and short.complete
    for one, two in zip(whole.sequences(), short.sequences(), strict=True):
        assert one == two
    assert short.arrays.keys() == whole.arrays.keys()
    for name, values in whole.arrays.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(short.arrays[name], values, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(short.arrays[name], values, err_msg=name)


def test_a_text_that_does_not_fit_alone(tiny_pair, tmp_path, refused, monkeypatch):
    def never(*everything):
        raise CPU

    monkeypatch.setattr("traces.capture._generate", never)
    told = refused(lambda: main(tiny_pair.record(tmp_path / "trace", *QUICK)))
    assert "memory ran out with texts one at a time" in told and "--resume" in told and "--dtype" in told
    assert json.loads((tmp_path / "trace" / "manifest.json").read_text())["shards"] == {}
