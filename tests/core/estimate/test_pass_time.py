import pytest

from headway.core.errors import ConfigError
from headway.core.estimate.pass_time import PassTime


def test_it_knows_nothing_before_the_first_pass():
    belief = PassTime()
    assert belief.mean_s is None
    assert belief.quantile_s(0.9) is None


def test_one_pass_is_enough_for_a_mean():
    belief = PassTime()
    belief.observe(0.25)
    assert belief.mean_s == 0.25


def test_a_stray_slow_pass_does_not_move_it():
    belief = PassTime(window=16)
    for _ in range(15):
        belief.observe(0.100)
    belief.observe(30.0)
    assert belief.mean_s == pytest.approx(0.100)
    assert belief.quantile_s(1.0) == 30.0


def test_it_follows_a_lasting_change_within_its_window():
    belief = PassTime(window=16)
    for duration_s in [0.100] * 50 + [0.300] * 16:
        belief.observe(duration_s)
    assert belief.mean_s == pytest.approx(0.300)


def test_quantiles_are_those_of_the_window():
    belief = PassTime(window=10)
    for ms in range(1, 21):
        belief.observe(ms / 1000)
    assert belief.quantile_s(0.0) == 0.011
    assert belief.quantile_s(0.5) == 0.015
    assert belief.quantile_s(0.9) == 0.019


def test_a_clock_that_ran_backwards_is_no_measurement():
    belief = PassTime()
    belief.observe(-1.0)
    belief.observe(0.0)
    assert belief.mean_s is None


@pytest.mark.parametrize("bad", [{"window": 0}, {"trim": 0.5}, {"trim": -0.1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        PassTime(**bad)
