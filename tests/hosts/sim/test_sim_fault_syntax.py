"""How faults are written."""

import pytest

from headway.core.errors import ConfigError
from headway.hosts.sim.faults import Fault, parse_fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("die:prefill-1@12.5", Fault(12.5, "prefill-1", "die")),
        ("hang:decode-0@3", Fault(3.0, "decode-0", "hang")),
        ("slow:prefill-0@10x3", Fault(10.0, "prefill-0", "slow", 3.0)),
        (" recover:engine-0@1e2 ", Fault(100.0, "engine-0", "recover")),
    ],
)
def test_faults_as_written(text, fault):
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("die prefill-1", "write kind:instance@seconds"),
        ("dye:prefill-1@1", "did you mean 'die'"),
        ("die:prefill-1@soon", "'soon' is not a number"),
        ("die:prefill-1@-1", "at least 0 s"),
        ("die:prefill-1@inf", "at least 0 s"),
        ("die:prefill-1@1x2", "slow needs a factor"),
        ("slow:prefill-1@1", "slow needs a factor"),
        ("slow:prefill-1@1x0", "factor must be positive"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_fault(text)
    assert "\n" not in str(caught.value)


def test_a_fault_made_in_code_is_checked_as_well():
    with pytest.raises(ConfigError, match="did you mean 'hang'"):
        Fault(1.0, "engine-0", "hung")
