import numpy as np
import pytest

from hq_plugin.explore.calibration import Calibration


def test_a_constant_factor_is_found_and_holds_beyond_what_was_measured() -> None:
    predicted = np.geomspace(1e-3, 1e-1, 60)
    calibration = Calibration(predicted.tolist(), (3 * predicted).tolist())
    assert calibration.policies >= 50
    for value in (1e-5, 1e-2, 10.0):
        assert calibration(value) == pytest.approx(3 * value, rel=1e-6)


def test_expectations_never_fall_where_predictions_rise() -> None:
    rng = np.random.RandomState(0)
    predicted = np.geomspace(1e-4, 1, 200)
    calibration = Calibration(predicted.tolist(), (predicted * np.exp(rng.normal(0, 2, 200))).tolist())
    expected = [calibration(value) for value in np.geomspace(1e-5, 10, 300)]
    assert np.diff(expected).min() >= -1e-12  # the last digits of what is flat may differ


def test_outliers_do_not_count_and_little_is_nothing() -> None:
    predicted = [0.01] * 9 + [0.0, 0.01]
    measured = [0.02] * 9 + [0.3, float("inf")]
    assert Calibration(predicted, measured)(0.01) == pytest.approx(0.02)
    few = Calibration([0.01, 0.02], [0.5, 0.5])
    assert few.policies == 0
    assert few(0.01) == 0.01


def test_few_policies_that_are_far_apart_are_taken_together() -> None:
    predicted = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    calibration = Calibration(predicted, [2 * value for value in predicted])
    assert calibration.policies == 5
    assert calibration(1e-3) == pytest.approx(2e-3)
