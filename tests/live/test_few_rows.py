"""The turned product of few rows is the linear layer's, and is left alone where it does not pay or is not wanted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from live import few_rows
from live.few_rows import FEW, WIDE, FewRowsLinear, quicken

WORTH_IT = few_rows.worth_it


@pytest.fixture(autouse=True)
def worth_it(monkeypatch):
    """On whatever processor the tests run."""
    monkeypatch.setattr(few_rows, "worth_it", lambda: True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [96, WIDE])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 8), (3, 1), (1, 32), (5, 20)])
def test_the_product_is_the_same(shape, outputs, bias):
    torch.manual_seed(0)
    layer = nn.Linear(64, outputs, bias=bias)
    values = torch.randn(*shape, 64)
    with torch.inference_mode():
        expected = layer(values)
        found = quicken(layer)(values)
    assert type(layer) is FewRowsLinear and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if shape[0] * shape[1] not in FEW or (shape == (1, 1) and outputs < WIDE):
        assert torch.equal(found, expected)


def test_float64_and_training_go_the_usual_way(monkeypatch):
    layer, values = quicken(nn.Linear(8, 8)), torch.randn(4, 8)
    monkeypatch.setattr(torch, "addmm", None)  # calling it would fail
    layer(values).sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        layer.double()(values.double())
        with pytest.raises(TypeError):
            layer.float()(values)


def test_only_plain_layers_are_quickened():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2), nn.Linear(2, 2, device="meta"))
    names = list(model.state_dict())
    assert [type(part) for part in quicken(model)] == [FewRowsLinear, Own, nn.Linear] and list(model.state_dict()) == names


@pytest.mark.parametrize("maker, quicker", [("GenuineIntel", False), ("AuthenticAMD", True), (None, True)])
def test_intels_processors_keep_their_own_product(monkeypatch, tmp_path, maker, quicker):
    told = tmp_path / "cpuinfo"
    if maker:
        told.write_text(f"processor : 0\nvendor_id : {maker}\n")
    monkeypatch.setattr(few_rows, "Path", lambda _: told)
    monkeypatch.setattr(few_rows, "worth_it", WORTH_IT.__wrapped__)
    assert type(quicken(nn.Linear(2, 2))) is (FewRowsLinear if quicker else nn.Linear)
