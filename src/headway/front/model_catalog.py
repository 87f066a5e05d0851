"""Knows which models the engines serve, and decides which model a request is for.

Engines list base models and adapters at `/v1/models`. They are asked when they come up, every `REFRESH_S`
after that, and at once when a client names a model that no engine listed: adapters are loaded at run time.

Rule 1  (default)   no model, an empty one and "default" mean the first base model of the first engine.
Rule 2  (known)     a model that an engine lists is placed on engines that list it.
Rule 3  (silent)    an engine that lists nothing serves whatever it is asked for.
Rule 4  (unknown)   for any other name the engines are asked again, at most once a second. If it is still
                    unknown, `[server] unknown_models` decides: "refuse" (404), or "pass-on" to any engine.
Rule 5  (names)     `[server] models`, if set, are all the names that clients may use. One that no engine
                    lists is placed on any engine.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from headway.front.config import DoorSpec
from headway.front.errors import model_not_found

__all__ = ["REFRESH_S", "ModelCard", "ModelCatalog", "base_names", "read_models", "same_models"]

#: How often an engine is asked for its models.
REFRESH_S = 10.0
#: The name that SGLang's clients use for "whatever is served".
DEFAULT = "default"
#: A larger list of models is not read.
MOST_BYTES, MOST_MODELS, LONGEST_NAME = 4 << 20, 10_000, 1024
#: An unknown name has every engine asked; the interval grows with the engines, so that this many are asked a
#: second at most.
MOST_ASKED_PER_S = 100
#: A request with an unknown name waits this long for the answers.
PATIENCE_S = 1.0


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model as an engine lists it. `parent`: the base model of an adapter; None: it is a base model.

    `max_model_len`: the longest prompt and output together, in tokens; None: unknown.
    """

    id: str
    created: int = 0
    owned_by: str = "headway"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None

    def described(self) -> dict[str, object]:
        """Return the model as `/v1/models` lists it; what the engine did not state is left out."""
        told: dict[str, object] = {"id": self.id, "object": "model", "created": self.created}
        told["owned_by"] = self.owned_by
        for name in ("root", "parent", "max_model_len"):
            if getattr(self, name) is not None:
                told[name] = getattr(self, name)
        return told


class _Listed(msgspec.Struct):
    id: str
    created: Any = None
    owned_by: Any = None
    root: Any = None
    parent: Any = None
    max_model_len: Any = None


class _List(msgspec.Struct):
    data: list[_Listed]


_decode = msgspec.json.Decoder(_List).decode


def read_models(body: bytes) -> dict[str, ModelCard] | None:
    """Read an engine's `/v1/models`; None when it is no list of models, or too large a one."""
    if len(body) > MOST_BYTES:
        return None
    try:
        listed = _decode(body).data
    except (msgspec.DecodeError, RecursionError):
        return None
    if len(listed) > MOST_MODELS:
        return None
    cards = (_card(each) for each in listed if 0 < len(each.id) <= LONGEST_NAME)
    return {card.id: card for card in cards}


def _card(listed: _Listed) -> ModelCard:
    return ModelCard(
        id=listed.id,
        created=listed.created if type(listed.created) is int else 0,
        owned_by=_text(listed.owned_by) or "headway",
        root=_text(listed.root),
        parent=_text(listed.parent),
        max_model_len=_positive(listed.max_model_len),
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= LONGEST_NAME else None


def _positive(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 40 else None


def same_models(one: Mapping[str, ModelCard], other: Mapping[str, ModelCard]) -> bool:
    """Return whether two lists tell of the same models. vLLM says "created now" each time it is asked."""
    return one.keys() == other.keys() and all(
        msgspec.structs.replace(other[name], created=card.created) == card for name, card in one.items()
    )


def base_names(models: Iterable[ModelCard]) -> frozenset[str]:
    """Return the names of those that are no adapters; of all, if all name a parent."""
    cards = list(models)
    return frozenset(card.id for card in cards if card.parent is None) or frozenset(c.id for c in cards)


class _Engine(Protocol):
    """An engine, as far as its models go.

    `models`: those it listed last; empty: it lists none. `asked_for_models`: whether it was asked at all.
    """

    models: dict[str, ModelCard]
    asked_for_models: bool


@dataclass(frozen=True, slots=True)
class _Summary:
    """What all engines list together. `default`: the first base model of the first engine that lists any.

    `any_name`: an engine serves whatever it is asked for, or none was asked yet.
    """

    cards: dict[str, ModelCard]
    longest: dict[str, int]
    default: str | None
    any_name: bool


class ModelCatalog:
    """The models of all engines. `engines()` returns the engines; `ask()` asks them all for their models."""

    def __init__(
        self,
        server: DoorSpec,
        engines: Callable[[], Iterable[_Engine]],
        ask: Callable[[], Awaitable[None]],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._server = server
        self._engines = engines
        self._ask = ask
        self._clock = clock
        self._asking: asyncio.Future[None] | None = None
        self._asked_s = -math.inf
        # Kept until an engine changes:
        self._summary: _Summary | None = None
        self._lengths: dict[str, int | None] | None = None
        self._resolved: dict[str | None, str | None] = {}  # names that need no engine to be asked

    def changed(self) -> None:
        """Note that an engine was added or removed, or lists other models."""
        self._summary = self._lengths = None
        self._resolved.clear()

    def cards(self) -> dict[str, ModelCard]:
        """Return what clients may ask for, by name, merged from the lists of all engines."""
        found = self._all().cards
        if not self._server.models:
            return found
        return {name: found.get(name) or ModelCard(id=name) for name in self._server.models}

    def lengths(self) -> dict[str, int | None]:
        """Return how many tokens each model takes; an adapter takes what its base model does."""
        if self._lengths is None:
            longest = self._all().longest
            self._lengths = {name: longest.get(name) for name in self.cards()}
        return self._lengths

    async def resolve(self, asked: str | None) -> str | None:
        """Return the model a request is for, as the policy needs it; None: any engine may serve it.

        Raises Refusal (404) for an unknown model.
        """
        if asked in self._resolved:
            return self._resolved[asked]
        if asked is None or self._means_default(asked):
            return self._remember(asked, self._default())
        names = self._server.models
        if names and asked not in names:
            raise model_not_found(asked)
        if not self._is_known(asked):
            await self._ask_again()
        if self._is_known(asked):
            return self._remember(asked, asked)
        if names or self._server.unknown_models == "pass-on":
            return None
        raise model_not_found(asked)

    def _remember(self, asked: str | None, model: str | None) -> str | None:
        if len(self._resolved) < MOST_MODELS:
            self._resolved[asked] = model
        return model

    def _means_default(self, asked: str) -> bool:
        is_a_name = asked in self._all().cards or asked in self._server.models
        return not asked or (asked == DEFAULT and not is_a_name)

    def _default(self) -> str | None:
        if not self._server.models:
            return self._all().default
        first = self._server.models[0]
        return first if first in self._all().cards else None

    def _is_known(self, model: str) -> bool:
        """Return whether an engine lists the model, or may serve it without listing it."""
        known = self._all()
        return known.any_name or model in known.cards

    def _all(self) -> _Summary:
        if self._summary is None:
            self._summary = _summarise(engine for engine in self._engines() if engine.asked_for_models)
        return self._summary

    async def _ask_again(self) -> None:
        """Ask all engines, unless that was done a moment ago; wait for the answers for a while."""
        now = self._clock()
        again_s = max(1.0, sum(1 for _ in self._engines()) / MOST_ASKED_PER_S)
        if self._asking is None and now - self._asked_s >= again_s:
            self._asked_s = now
            self._asking = asyncio.ensure_future(self._ask())
            self._asking.add_done_callback(self._answered)
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=PATIENCE_S)

    def _answered(self, asking: "asyncio.Future[None]") -> None:
        self._asking = None
        if not asking.cancelled():
            asking.exception()  # it was logged where it came up


def _summarise(engines: Iterable[_Engine]) -> _Summary:
    cards: dict[str, ModelCard] = {}
    longest: dict[str, int] = {}
    default: str | None = None
    silent, asked = 0, 0
    for engine in engines:
        asked += 1
        silent += not engine.models
        for name, card in engine.models.items():
            cards.setdefault(name, card)
            length = _length(engine.models, card)
            if length is not None:
                longest[name] = max(length, longest.get(name, 0))
        if default is None and engine.models:
            bases = base_names(engine.models.values())
            default = next(name for name in engine.models if name in bases)
    return _Summary(cards, longest, default, any_name=silent > 0 or not asked)


def _length(models: dict[str, ModelCard], card: ModelCard) -> int | None:
    """Return how many tokens a model takes; an adapter without a limit has that of its base model."""
    parent = models.get(card.parent) if card.parent is not None else None
    if card.max_model_len is None and parent is not None:
        return parent.max_model_len
    return card.max_model_len
