"""Which model a request is for, from what the engines list and what the configuration says."""

import asyncio
import json
from dataclasses import dataclass, field

import pytest

from headway.front.config import DoorSpec
from headway.front.errors import Refusal
from headway.front.model_catalog import MOST_MODELS, ModelCard, ModelCatalog, base_names, read_models
from headway.front.model_field import with_model
from headway.front.requests import read_call


@dataclass
class Engine:
    models: dict[str, ModelCard] = field(default_factory=dict)
    asked_for_models: bool = True


def lists(*names, adapters=(), length=1000):
    """An engine with base models, the first of which has these adapters."""
    cards = [ModelCard(id=name, owned_by="vllm", max_model_len=length) for name in names]
    cards += [ModelCard(id=name, parent=names[0], root=f"/loras/{name}") for name in adapters]
    return Engine({card.id: card for card in cards})


class World:
    def __init__(self, *engines, models=(), unknown="refuse"):
        self.engines = list(engines)
        self.now = 100.0
        self.asked = 0
        self.loads = {}  # what an engine lists from the next question on
        self.catalog = ModelCatalog(
            DoorSpec(models=models, unknown_models=unknown),
            lambda: self.engines,
            self._ask,
            clock=lambda: self.now,
        )

    async def _ask(self):
        self.asked += 1
        for number, engine in self.loads.items():
            self.engines[number] = engine
        self.catalog.changed()

    def resolve(self, model):
        return asyncio.run(self.catalog.resolve(model))


@pytest.mark.parametrize("model", [None, "", "default"])
def test_no_model_is_the_first_base_model_of_the_first_engine(model):
    assert World(lists("a", adapters=["sql"]), lists("b")).resolve(model) == "a"


def test_default_is_a_model_like_others_where_an_engine_lists_it():
    assert World(lists("a"), lists("default")).resolve("default") == "default"


def test_a_listed_model_or_adapter_is_what_the_policy_places_by():
    world = World(lists("a", adapters=["sql"]), lists("b"))
    assert [world.resolve(model) for model in ("a", "b", "sql")] == ["a", "b", "sql"]
    assert world.asked == 0


def test_an_unknown_model_has_the_engines_asked_again_and_is_served_if_they_know_it_by_now():
    world = World(lists("a"))
    world.loads = {0: lists("a", adapters=["sql"])}
    assert world.resolve("sql") == "sql"
    assert world.asked == 1


def test_an_unknown_model_is_refused_and_engines_are_asked_once_a_second_at_most():
    world = World(lists("a"))
    for at_s in (0.0, 0.1, 0.9, 1.0, 1.5, 2.0):
        world.now = 100.0 + at_s
        with pytest.raises(Refusal) as refused:
            world.resolve(f"nonsense-{at_s}")
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert world.asked == 3


def test_many_engines_are_asked_at_a_rate_that_does_not_grow_with_them():
    world = World(*(lists("a") for _ in range(500)))
    for second in range(11):
        world.now = 100.0 + second
        with pytest.raises(Refusal):
            world.resolve("nonsense")
    assert world.asked == 3  # 500 engines, 100 a second: every 5 s


def test_passed_on_an_unknown_model_may_go_to_any_engine():
    assert World(lists("a"), unknown="pass-on").resolve("nonsense") is None


def test_an_engine_that_lists_nothing_serves_what_it_is_asked_for():
    assert World(lists("a"), Engine()).resolve("whatever") == "whatever"


def test_before_any_engine_was_asked_no_model_is_refused():
    assert World(Engine(asked_for_models=False)).resolve("a") == "a"


def test_an_engine_that_never_came_up_does_not_make_names_known():
    with pytest.raises(Refusal):
        World(lists("a"), Engine(asked_for_models=False)).resolve("b")


def test_configured_names_are_all_there_are():
    world = World(lists("a"), models=("a", "alias"))
    assert world.resolve("a") == "a"
    assert world.resolve("alias") is None  # no engine lists it: any may serve it
    assert world.resolve(None) == "a"
    with pytest.raises(Refusal):
        World(lists("a", "b"), models=("a",)).resolve("b")


def test_lists_are_merged_and_an_adapter_has_its_base_model_s_length():
    world = World(lists("a", adapters=["sql"], length=1000), lists("a", "b", length=2000))
    assert world.catalog.lengths() == {"a": 2000, "sql": 1000, "b": 2000}
    assert world.catalog.cards()["sql"].described() == {
        "id": "sql",
        "object": "model",
        "created": 0,
        "owned_by": "headway",
        "root": "/loras/sql",
        "parent": "a",
    }


def test_base_models_are_those_without_a_parent():
    assert base_names(lists("a", "alias", adapters=["sql"]).models.values()) == {"a", "alias"}
    assert base_names([ModelCard(id="x", parent="gone")]) == {"x"}


def test_an_engine_s_list_is_read_as_far_as_it_makes_sense():
    told = {"data": [{"id": "a", "max_model_len": "long", "owned_by": 7, "parent": None, "created": 1.5}]}
    assert read_models(json.dumps(told).encode()) == {"a": ModelCard(id="a")}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"data": 7}',
        b'{"data": [{}]}',
        b"[" * 100_000,
        json.dumps({"data": [{"id": str(n)} for n in range(MOST_MODELS + 1)]}).encode(),
        b" " * (5 << 20) + b'{"data": []}',
    ],
)
def test_what_is_no_list_or_too_long_a_list_is_not_read(body):
    assert read_models(body) is None


def test_default_in_a_body_becomes_the_model_s_name_and_all_else_stays():
    body = b'{"model": "default", "messages": [{"role": "user", "content": "hi"}], "seed": 1.50}'
    call = with_model(read_call("/v1/chat/completions", body), "a")
    assert call.model == "a"
    assert json.loads(call.body) == json.loads(body) | {"model": "a"}
    assert b"1.50" in call.body


@pytest.mark.parametrize(("named", "model"), [("a", "a"), ("default", None), ("other", "a")])
def test_a_body_that_names_a_model_is_left_as_it_came(named, model):
    body = json.dumps({"model": named, "messages": [{"role": "user", "content": "hi"}]}).encode()
    call = read_call("/v1/chat/completions", body)
    assert with_model(call, model) is call
