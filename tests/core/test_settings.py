"""A setting is declared once: the declaration validates, parses text and documents."""

from dataclasses import dataclass
from typing import Literal

import pytest

from headway.core.errors import ConfigError
from headway.core.settings import SettingDoc, Settings, setting


@dataclass(frozen=True, slots=True)
class Oven(Settings):
    heat_k: float = setting(450.0, "how hot", unit="K", at_least=0.0, at_most=600.0)
    loaves: int = setting(4, "how many at once", unit="loaves", at_least=1)
    fan: bool = setting(False, "whether air is blown")
    mode: Literal["top", "bottom"] = setting("top", "where the heat comes from")
    until_s: float | None = setting(None, "when to stop", unit="s", at_least=0.0)


@dataclass(frozen=True, slots=True)
class SteamOven(Oven):
    steam: float = setting(0.5, "share of steam", at_least=0.0, at_most=1.0)


def parse(**texts):
    return Oven.parse(texts, where="policy oven")


def test_nothing_said_is_the_defaults():
    assert parse() == Oven(heat_k=450.0, loaves=4, fan=False, mode="top", until_s=None)


def test_text_becomes_values():
    oven = parse(heat_k="500", loaves="2", fan="True", mode="bottom", until_s="1.5")
    assert oven == Oven(heat_k=500.0, loaves=2, fan=True, mode="bottom", until_s=1.5)
    assert isinstance(oven.heat_k, float)


def test_none_is_said_in_any_case():
    assert parse(until_s="None").until_s is None
    assert parse(until_s="none").until_s is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("loafs", "1", "policy oven: unknown setting 'loafs': did you mean 'loaves'?"),
        ("loaves", "2.5", "policy oven: loaves must be a whole number, got '2.5'"),
        ("loaves", "", "policy oven: loaves must be a whole number, got ''"),
        ("loaves", "0", "policy oven: loaves must be at least 1, got 0"),
        ("heat_k", "warm", "policy oven: heat_k must be a number, got 'warm'"),
        ("heat_k", "-1", "policy oven: heat_k must be at least 0, got -1.0"),
        ("heat_k", "601", "policy oven: heat_k must be at most 600, got 601.0"),
        ("heat_k", "nan", "policy oven: heat_k must be at least 0, got nan"),
        ("heat_k", "inf", "policy oven: heat_k must be at most 600, got inf"),
        ("heat_k", "none", "policy oven: heat_k must be a number, got 'none'"),
        ("fan", "yes", "policy oven: fan must be true or false, got 'yes'"),
        ("mode", "left", "policy oven: mode must be one of top, bottom, got 'left'"),
        ("until_s", "-1", "policy oven: until_s must be at least 0, got -1.0"),
    ],
)
def test_bad_text_is_one_clear_line(name, text, message):
    with pytest.raises(ConfigError) as caught:
        parse(**{name: text})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_bounds_are_inclusive():
    assert parse(heat_k="0").heat_k == 0.0
    assert parse(heat_k="600").heat_k == 600.0


@pytest.mark.parametrize(
    "bad", [{"loaves": 2.0}, {"loaves": True}, {"fan": 1}, {"mode": "left"}, {"heat_k": "9"}]
)
def test_code_is_checked_as_text_is(bad):
    with pytest.raises(ConfigError, match=f"^{next(iter(bad))} must be "):
        Oven(**bad)


def test_a_whole_number_will_do_for_a_number():
    assert Oven(heat_k=300).heat_k == 300


def test_docs_are_the_declarations_in_order():
    docs = Oven.docs()
    assert [doc.name for doc in docs] == ["heat_k", "loaves", "fan", "mode", "until_s"]
    assert docs[0] == SettingDoc("heat_k", 450.0, "K", "how hot")


def test_settings_are_inherited():
    oven = SteamOven.parse({"loaves": "1", "steam": "0.25"}, where="policy steam")
    assert (oven.loaves, oven.steam) == (1, 0.25)
    assert [doc.name for doc in SteamOven.docs()][-1] == "steam"
