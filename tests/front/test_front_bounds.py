"""Every number of a configuration is bounded: what --check calls sound can be run."""

import typing

import pytest
from pydantic import ValidationError

from headway.hosts.envoy.config import EppConfig, ObjectiveSpec
from headway.hosts.gateway.config import GatewayConfig

SPECS = sorted(
    {*GatewayConfig.tables.values(), *EppConfig.tables.values(), ObjectiveSpec},
    key=lambda spec: spec.__name__,
)
#: A number that is not used as one: any is as good as another.
FREE = {("PolicySpec", "seed")}


def numbers(spec, kind):
    """Yield the keys of a table that take a number of a kind."""
    for name, field in spec.model_fields.items():
        kinds = typing.get_args(field.annotation) or (field.annotation,)
        if (
            kind in {getattr(each, "__origin__", each) for each in kinds}
            and (spec.__name__, name) not in FREE
        ):
            yield name


CASES = [
    pytest.param(spec, key, value, id=f"{spec.__name__}.{key}")
    for spec in SPECS
    for kind, value in ((float, 1e300), (int, 10**30))
    for key in numbers(spec, kind)
]


def test_there_are_numbers_of_every_sort():
    keys = {(case.values[0].__name__, case.values[1]) for case in CASES}
    assert {
        ("LimitsSpec", "queue_timeout_s"),
        ("LimitsSpec", "buffer_bytes"),
        ("HealthSpec", "interval_s"),
    } <= keys
    assert len(keys) > 40


@pytest.mark.parametrize(("spec", "key", "value"), CASES)
def test_a_number_beyond_all_measure_is_refused(spec, key, value):
    with pytest.raises(ValidationError) as error:
        spec.model_validate({key: value})
    assert any(each["loc"][:1] == (key,) for each in error.value.errors())
