"""Reads values out of a client's JSON with bounds, and turns what is wrong into a 400 that names the field.

No Python object is built for a value before its size is known: a body of 32 MiB can hold millions of lists,
objects or numbers, each of which costs a hundred times its bytes in memory, and as much in time.
"""

import re
from typing import TypeVar

import msgspec

from headway.front.errors import Refusal, bad_request

__all__ = [
    "ABSENT",
    "MOST_NUMBER",
    "MOST_OBJECTS",
    "MOST_WHITE_BYTES",
    "Field",
    "check_bounds",
    "decode",
    "flag",
    "text",
    "unescaped",
    "whole",
]

#: A field whose value is not decoded.
Field = msgspec.Raw | msgspec.UnsetType
ABSENT = msgspec.UNSET

#: JSON objects in one body: messages and their parts. Far more than any chat has.
MOST_OBJECTS = 100_000
#: Strings that are skipped while objects are counted. Bounds the time that counting takes.
MOST_STRINGS = 1_000_000
#: Numbers beyond this are no limit that every protocol could carry.
MOST_NUMBER = (1 << 31) - 1
#: White space before and behind a body.
MOST_WHITE_BYTES = 4096
#: A number, a flag or null is not longer than this, and a name not longer than that.
MOST_SCALAR_BYTES, MOST_NAME_BYTES = 64, 4096

_STRING_OR_OBJECT = re.compile(rb'"(?:[^"\\]++|\\.)*+"|\{', re.DOTALL)
_TRUE = frozenset(("true", "1", "yes", "y", "on", "t"))
_FALSE = frozenset(("false", "0", "no", "n", "off", "f"))

_anything = msgspec.json.Decoder(msgspec.Raw)
_scalar = msgspec.json.Decoder(bool | int | float | str | None)
_text = msgspec.json.Decoder(str)

T = TypeVar("T")


def decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Decode a body. Raises Refusal (400) that says what is wrong and where."""
    try:
        if not body.isascii():
            body.decode()
        return decoder.decode(body)
    except UnicodeDecodeError:
        raise bad_request("The body is not valid UTF-8.", code="invalid_json") from None
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.", code="body_too_complex") from None
    except msgspec.DecodeError as error:
        raise bad_request(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def check_bounds(body: bytes) -> None:
    """Raise Refusal (400) for a body with more JSON objects than are decoded, or much white space around it:
    fields are put in at its ends.
    """
    if not body[:MOST_WHITE_BYTES].strip() or not body[-MOST_WHITE_BYTES:].strip():
        message = f"The body is empty, or has more than {MOST_WHITE_BYTES} bytes of white space around it."
        raise bad_request(message, code="invalid_json")
    if len(body) <= 2 * MOST_OBJECTS or body.count(b"{") <= MOST_OBJECTS:
        return
    decode(_anything, body)  # the count below takes forever on strings that do not end
    objects = 0
    for number, found in enumerate(_STRING_OR_OBJECT.finditer(body)):
        objects += found.end() - found.start() == 1
        if objects > MOST_OBJECTS:
            raise bad_request(f"The body has more than {MOST_OBJECTS} JSON objects.", code="body_too_complex")
        if number > MOST_STRINGS:
            raise bad_request(f"The body has more than {MOST_STRINGS} strings.", code="body_too_complex")


def whole(field: Field, name: str, least: int) -> int | None:
    """Return a whole number as the engines read it (3, 3.0, "3"), None for null and for an absent field."""
    if isinstance(field, msgspec.UnsetType):
        return None
    raw = bytes(field)
    value = int(raw) if raw.isdigit() and len(raw) <= 10 else _scalar_of(field, name)
    if isinstance(value, str):
        digits = value.strip()
        value = int(digits) if len(digits) <= 10 and digits.removeprefix("-").isdecimal() else 0.5
    if value is None:
        return None
    if isinstance(value, float) and not value.is_integer():
        raise bad_request(f"{name} must be a whole number.", param=name)
    if not least <= value <= MOST_NUMBER:
        raise bad_request(f"{name} must be between {least} and {MOST_NUMBER}, got {value:.20g}.", param=name)
    return int(value)


def flag(field: Field, name: str) -> bool:
    """Return a boolean as the engines read it (true, 1, "true", "yes"); null or absent is false."""
    if isinstance(field, msgspec.UnsetType):
        return False
    if (raw := bytes(field)) in (b"true", b"false"):
        return raw == b"true"
    value = _scalar_of(field, name)
    if value is None or isinstance(value, bool):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else f"{value:g}"
    if word not in _TRUE and word not in _FALSE:
        raise bad_request(f"{name} must be true or false.", param=name)
    return word in _TRUE


def text(field: Field, name: str) -> str | None:
    """Return a short text; None for null and for an absent field."""
    if isinstance(field, msgspec.UnsetType):
        return None
    raw = bytes(field)
    if raw == b"null":
        return None
    if raw[:1] != b'"' or len(raw) > MOST_NAME_BYTES:
        raise bad_request(f"{name} must be a text of at most {MOST_NAME_BYTES} bytes.", param=name)
    return unescaped(raw, name).decode()


def unescaped(raw: bytes, name: str) -> bytes:
    """Return the UTF-8 text of a JSON string. Raises Refusal (400) for an escape that is no character."""
    if b"\\" not in raw:
        return raw[1:-1]
    try:
        return _text.decode(raw).encode()
    except (msgspec.DecodeError, UnicodeEncodeError):
        message = f"{name} has an escape that is no character (a lone surrogate)."
        raise bad_request(message, param=name, code="invalid_json") from None


def _scalar_of(field: msgspec.Raw, name: str) -> bool | int | float | str | None:
    raw = bytes(field)
    try:
        if len(raw) <= MOST_SCALAR_BYTES:
            value: bool | int | float | str | None = _scalar.decode(raw)
            return value
    except msgspec.DecodeError:
        pass
    raise bad_request(f"{name} has the wrong type or is out of range.", param=name)


def _wrong_type(message: str) -> Refusal:
    """Turn msgspec's "Expected `bool`, got `str` - at `$.stream`" into a 400 that names the field."""
    what, _, place = message.partition(" - at `$")
    param = place.rstrip("`").lstrip(".") or None
    return bad_request(f"{what}{f' (at {param})' if param else ''}.", param=param)
