"""Policies by name, by spec, or from a module of one's own."""

import doctest
import random
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest

from headway.core import registry as registry_module
from headway.core.errors import ConfigError
from headway.core.registry import Registry, split_spec
from headway.core.settings import Settings, setting


@dataclass(frozen=True, slots=True)
class PatientSettings(Settings):
    hold_s: float = setting(0.1, "how long to hold", unit="s", at_least=0.0)


class Base:
    Settings: ClassVar[type[Settings]] = Settings
    name: ClassVar[str] = ""

    def __init__(self, settings, rng):
        self.settings, self.rng = settings, rng


class Patient(Base):
    Settings = PatientSettings


@pytest.fixture
def policies():
    registry = Registry("policy", Base)
    registry.register("patient")(Patient)
    return registry


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("their_package_mine")
    module.Mine = type("Mine", (Patient,), {})
    module.Other = dict
    module.instance = Patient(PatientSettings(), None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_spec_is_a_name():
    assert split_spec("staggered") == ("staggered", {})


def test_a_spec_is_a_name_and_settings():
    assert split_spec("stall-free:token_budget=2048:x=1") == (
        "stall-free",
        {"token_budget": "2048", "x": "1"},
    )


def test_a_spec_is_a_module_and_class_and_settings():
    assert split_spec("my.mod:Mine:hold_s=0.1") == ("my.mod:Mine", {"hold_s": "0.1"})


def test_spaces_around_do_not_matter():
    assert split_spec(" a : x = 1 ".replace("a ", "a")) == ("a", {"x": "1"})


@pytest.mark.parametrize("spec", ["", "  ", ":x=1"])
def test_a_spec_without_a_name(spec):
    with pytest.raises(ConfigError, match=r"names no policy$"):
        split_spec(spec)


def test_settings_come_last():
    with pytest.raises(ConfigError, match=r"settings come last, as name=value; 'b' is not one$"):
        split_spec("a:x=1:b")


def test_create_by_name(policies):
    rng = random.Random(0)
    policy = policies.create("patient:hold_s=0.5", rng)
    assert isinstance(policy, Patient)
    assert policy.settings == PatientSettings(hold_s=0.5)
    assert policy.rng is rng
    assert policy.name == "patient"


def test_names_in_order_of_registration(policies):
    policies.register("another")(type("Another", (Base,), {}))
    assert policies.names() == ["patient", "another"]


def test_no_name_twice(policies):
    with pytest.raises(ConfigError, match=r"^policy 'patient' is registered twice$"):
        policies.register("patient")(Base)


def test_an_unknown_name(policies):
    with pytest.raises(ConfigError, match=r"^unknown policy 'patiant': did you mean 'patient'"):
        policies.find("patiant")


def test_an_unknown_setting_names_policy_and_setting(policies):
    with pytest.raises(ConfigError, match=r"^policy patient: unknown setting 'holds': did you mean 'hold_s'"):
        policies.find("patient:holds=1")


def test_a_policy_of_ones_own_needs_no_registration(policies, own_module):
    policy = policies.create("their_package_mine:Mine:hold_s=2", random.Random(0))
    assert isinstance(policy, own_module.Mine)
    assert policy.settings.hold_s == 2.0
    assert policies.names() == ["patient"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such_module_at_all:Mine",
            "policy 'no_such_module_at_all:Mine': cannot import 'no_such_module_at_all'",
        ),
        (
            "their_package_mine:Yours",
            "policy 'their_package_mine:Yours': module 'their_package_mine' has no 'Yours'",
        ),
        ("their_package_mine:", "policy 'their_package_mine:': module 'their_package_mine' has no ''"),
        ("their_package_mine:Other", "policy 'their_package_mine:Other' is not a subclass of Base"),
        ("their_package_mine:instance", "policy 'their_package_mine:instance' is not a subclass of Base"),
        (":Mine", "policy ':Mine': cannot import ''"),
        (".mine:Mine", "policy '.mine:Mine': cannot import '.mine'"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(policies, own_module, spec, message):
    with pytest.raises(ConfigError) as caught:
        policies.find(spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_examples_hold():
    assert doctest.testmod(registry_module).failed == 0
