"""Decides the prompt length to schedule a request by, and whether it is too long for its model."""

from collections.abc import Iterable, Mapping

from headway.core.events import InstanceUp, Role
from headway.front.errors import bad_request

__all__ = ["schedulable_length"]


def schedulable_length(
    model: str | None,
    tokens: int,
    known: Mapping[str, int | None],
    most: int | None,
    engines: Iterable[InstanceUp],
    *,
    exact: bool,
) -> int:
    """Return the prompt length to schedule by. Raises Refusal (400) when a counted one is more than the model
    takes.

    An estimate never refuses: it is cut to what the model takes and to what the engine with the most KV of
    every role could hold, so that a policy can place it; the engine knows the true length. `most`: a bound
    that counts instead of the model's own.
    """
    most = most or _longest(model, known)
    if exact:
        if most is not None and tokens > most:
            message = f"The prompt has {tokens} tokens, the model takes {most}."
            raise bad_request(message, code="context_length_exceeded", param="messages")
        return tokens
    bounds = [tokens] if most is None else [tokens, most]
    rooms: dict[Role, list[int | None]] = {}
    for engine in engines:
        room = None if engine.kv_blocks is None else engine.kv_blocks * engine.block_tokens
        rooms.setdefault(engine.role, []).append(room)
    for of_role in rooms.values():
        if None not in of_role:
            bounds.append(max(room for room in of_role if room is not None) - 1)
    return max(1, min(bounds))


def _longest(model: str | None, known: Mapping[str, int | None]) -> int | None:
    """Return how long a prompt of a model may be, where that is known."""
    if model is not None:
        return known.get(model)
    return next(iter(known.values())) if len(known) == 1 else None
