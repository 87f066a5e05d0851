"""Intervals over a few seeds."""

import math

import pytest

from headway.report.confidence import estimate


def test_three_values_use_students_t_not_the_normal_limit():
    mean, half_width = estimate([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(4.303 * 1.0 / math.sqrt(3))


def test_one_value_has_no_interval():
    assert estimate([5.0]) == (5.0, None)
    assert estimate([5.0]).interval is None


def test_no_value_is_nan():
    assert math.isnan(estimate([]).mean)


def test_many_values_approach_the_normal_limit():
    _, half_width = estimate([0.0, 1.0] * 50)
    assert half_width == pytest.approx(1.96 * 0.5025 / 10, rel=1e-3)
