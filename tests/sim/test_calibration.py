"""Calibration arithmetic against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from sim.calibration import area_under_curve, calibration, calibration_lines

metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture(params=[0, 1])
def nodes(request) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(request.param)
    chance = numbers.beta(0.5, 1.5, 3000).round(2 + request.param)  # rounding makes ties
    return chance, numbers.random(3000) < chance**1.3


def test_against_scikit_learn(nodes):
    from sklearn.calibration import calibration_curve

    chance, accepted = nodes
    found = calibration(chance, accepted)
    assert found.auc == pytest.approx(metrics.roc_auc_score(accepted, chance), abs=1e-12)
    safe = np.clip(chance, 1e-7, 1 - 1e-7)
    assert found.log_loss == pytest.approx(metrics.log_loss(accepted, safe), rel=1e-9)
    inner = chance + 1e-9  # scikit-learn puts what lies on an edge into the lower bin
    true, predicted = calibration_curve(accepted, np.clip(inner, 0, 1), n_bins=10)
    assert [one["accepted"] for one in found.bins] == pytest.approx(true.tolist())
    assert [one["expected"] for one in found.bins] == pytest.approx(predicted.tolist(), abs=1e-6)
    weight = np.array([one["nodes"] for one in found.bins]) / found.nodes
    assert found.ece == pytest.approx(float((weight * np.abs(true - predicted)).sum()), abs=1e-6)


def test_perfect_and_hopeless_estimates():
    accepted = np.array([True, False, True, False])
    assert calibration(accepted.astype(float), accepted).ece == 0.0
    assert calibration(accepted.astype(float), accepted).auc == 1.0
    wrong = calibration(1.0 - accepted, accepted)
    assert (wrong.ece, wrong.auc) == (1.0, 0.0) and wrong.log_loss > 10
    assert area_under_curve(np.array([0.3, 0.3, 0.3]), np.array([True, False, True])) == 0.5
    assert calibration(np.array([0.2]), np.array([True])).auc is None
    assert len(calibration_lines({"one": wrong})) == 2
