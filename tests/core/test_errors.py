"""Every error has an owner, and an unknown name comes with the nearest known one."""

import doctest

import pytest

from headway.core import errors
from headway.core.errors import ConfigError, EngineError, HeadwayError, InvariantError, unknown_name


@pytest.mark.parametrize("error", [ConfigError, EngineError, InvariantError])
def test_one_base_catches_them_all(error):
    assert issubclass(error, HeadwayError)


def test_owners_do_not_mix():
    owners = [ConfigError, EngineError, InvariantError]
    assert not any(issubclass(a, b) for a in owners for b in owners if a is not b)


def test_a_misspelt_name_is_told_the_nearest_one():
    error = unknown_name("policy", "stagerred", ["staggered", "random"])
    assert isinstance(error, ConfigError)
    assert str(error) == "unknown policy 'stagerred': did you mean 'staggered'? (known: random, staggered)"


def test_a_name_like_no_other_is_told_all():
    assert str(unknown_name("preset", "xyzzy", ["b", "a"])) == "unknown preset 'xyzzy': (known: a, b)"


def test_nothing_known():
    assert str(unknown_name("preset", "x", [])) == "unknown preset 'x': (known: none)"


def test_the_place_comes_first():
    error = unknown_name("key", "nmae", ["name"], where="cluster.toml")
    assert str(error) == "cluster.toml: unknown key 'nmae': did you mean 'name'? (known: name)"


def test_messages_are_one_line():
    assert "\n" not in str(unknown_name("policy", "x", [f"policy-{n}" for n in range(50)]))


def test_the_examples_hold():
    assert doctest.testmod(errors).failed == 0
