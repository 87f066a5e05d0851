"""Decides whether any engine has the model a request wants, and room for its prompt."""

from collections.abc import Mapping

from headway.front.errors import bad_request, model_not_found

__all__ = ["check_length", "check_model"]


def check_model(model: str | None, known: Mapping[str, int | None]) -> None:
    """Raise Refusal (404) for a model nobody has. `known`: name → longest context; empty: nobody says."""
    if model is not None and known and model not in known:
        raise model_not_found(model)


def check_length(
    model: str | None, tokens: int, known: Mapping[str, int | None], most: int | None, *, exact: bool
) -> None:
    """Raise Refusal (400) for a prompt longer than the model; by an estimate, only when it is far longer.

    `most`: a bound that counts instead of the model's own.
    """
    most = most or _longest(model, known)
    if most is not None and tokens > (most if exact else 2 * most):
        message = f"The prompt has {'' if exact else 'about '}{tokens} tokens, the model takes {most}."
        raise bad_request(message, code="context_length_exceeded", param="messages")


def _longest(model: str | None, known: Mapping[str, int | None]) -> int | None:
    """Return how long a prompt of a model may be, where that is known."""
    if model is not None:
        return known.get(model)
    return next(iter(known.values())) if len(known) == 1 else None
