"""Collects what a request asks an engine to read: texts with their roles, token ids, and parts that are no
text. Every endpoint's reader (`requests.py`) fills one `Prompt`; its measures are what is kept of a body.
"""

from collections.abc import Callable

import msgspec

from headway.front.errors import bad_request
from headway.front.json_body import ABSENT, Field, decode, unescaped
from headway.front.prefixes import BLOCK_IDS, MOST_BLOCKS, hash_ids, hash_texts

__all__ = ["Count", "Prompt"]

#: Prompts in one request: each is a sequence of its own in the engine.
MOST_PROMPTS = 16_384
#: Texts in one request: contents of messages, and their parts.
MOST_TEXTS = 200_000
#: Of a prompt longer than this, tokens are counted in the beginning only: a tokenizer needs much memory.
MOST_COUNTED_BYTES = 4 << 20

#: Counts the tokens of texts.
Count = Callable[[list[bytes]], int]

_WHITE = b" \t\r\n"
_DIGITS = b"0123456789"


class _Part(msgspec.Struct, gc=False):
    """A part of a message. Which field holds its text depends on its type, which may be missing."""

    text: Field = ABSENT
    refusal: Field = ABSENT
    thinking: Field = ABSENT
    input: Field = ABSENT  # of a call of a tool
    content: Field = ABSENT  # of a tool's result

    def words(self) -> bytes | None:
        """Return its text as JSON, None when it is no text (an image, a sound)."""
        for field in (self.text, self.refusal, self.thinking):
            if field is not ABSENT and (raw := bytes(field))[:1] == b'"':
                return raw
        return None


_parts = msgspec.json.Decoder(list[_Part | str])
_texts = msgspec.json.Decoder(list[str])


class Prompt:
    """The prompt of one request. `sequences`: how many prompts it holds. `token_ids`: ids given instead of
    text, None when there are none. `other_parts`: images, sounds, embeddings.
    """

    def __init__(self) -> None:
        self.texts: list[tuple[str, bytes]] = []
        self.text_bytes = 0
        self.other_parts = 0
        self.sequences = 1
        self.token_ids: int | None = None
        self._alike = 0  # texts before the first part that is none: only they can be compared
        self._ids: list[bytes] = []

    def add_text(self, role: str, text: bytes) -> None:
        """Add a text, in UTF-8. Raises Refusal (400) for more than are kept."""
        if len(self.texts) >= MOST_TEXTS:
            message = f"The body has more than {MOST_TEXTS} texts."
            raise bad_request(message, code="body_too_complex")
        self.texts.append((role, text))
        self.text_bytes += len(text)
        if not self.other_parts:
            self._alike = len(self.texts)

    def add_json(self, role: str, value: Field) -> None:
        """Add a value that the engine's template writes out (tools, tool calls), as its JSON."""
        if not isinstance(value, msgspec.UnsetType) and (raw := bytes(value)) != b"null":
            self.add_text(role, raw)

    def add_other(self, count: int = 1) -> None:
        """Add parts that are no text."""
        self.other_parts += count

    def add_content(self, role: str, value: Field, name: str) -> None:
        """Add the content of a message: a text, or a list of parts. `name`: of the field, for errors."""
        if isinstance(value, msgspec.UnsetType):
            return
        raw = bytes(value)
        if raw[:1] == b'"' and b"\\" not in raw:
            self.add_text(role, raw[1:-1])
            return
        if raw[:1] == b'"':
            self.add_text(role, unescaped(raw, name))
        elif raw[:1] == b"[":
            self._add_parts(role, raw, name)
        elif raw != b"null":
            raise bad_request(f"{name} must be a string or a list of parts.", param=name)

    def _add_parts(self, role: str, raw: bytes, name: str, *, nested: bool = False) -> None:
        _check_strings(raw, name)
        for part in decode(_parts, raw):
            if isinstance(part, str):
                self.add_text(role, part.encode())
            elif (words := part.words()) is not None:
                self.add_text(role, unescaped(words, name))
            elif part.input is not ABSENT:
                self.add_json(role, part.input)
            elif part.content is not ABSENT and not nested:
                self._add_result(role, bytes(part.content), name)
            else:
                self.add_other()

    def _add_result(self, role: str, raw: bytes, name: str) -> None:
        """Add the result of a tool: a text, or parts that hold no results themselves."""
        if raw[:1] == b'"':
            self.add_text(role, unescaped(raw, name))
        elif raw[:1] == b"[":
            self._add_parts(role, raw, name, nested=True)

    def add_prompt(self, value: msgspec.Raw, name: str = "prompt") -> None:
        """Add a completion's prompt: a text, texts, token ids, or lists of token ids."""
        raw = bytes(value).strip(_WHITE)
        if raw[:1] == b'"':
            self.add_text("", unescaped(raw, name))
            return
        first = raw[1:2] if raw[1:2] not in (b" ", b"\t", b"\r", b"\n") else raw[1:].lstrip(_WHITE)[:1]
        if raw[:1] == b"[" and first == b'"':
            self._add_texts(raw, name)
        elif raw[:1] == b"[":
            self._add_ids(raw, name)
        else:
            raise _no_prompt(name)

    def _add_texts(self, raw: bytes, name: str) -> None:
        _check_strings(raw, name)
        try:
            texts = _texts.decode(raw)
        except msgspec.DecodeError:
            raise _no_prompt(name) from None
        self._count(len(texts), name)
        for text in texts:
            self.add_text("", text.encode())
        self._alike = len(texts) if len(texts) == 1 else 0

    def _add_ids(self, raw: bytes, name: str) -> None:
        """Count token ids by the commas and brackets around them: no number is decoded."""
        compact = raw.translate(None, _WHITE)
        shape = compact.translate(None, _DIGITS)
        commas = shape.count(b",")
        if len(shape) == commas + 2 and compact != b"[]":
            beginning = compact[1:-1].split(b",", BLOCK_IDS * MOST_BLOCKS)
            self._ids = beginning[: BLOCK_IDS * MOST_BLOCKS]
        elif not self._is_lists(shape, commas, name) or b"[]" in compact:
            raise _no_prompt(name)
        self.token_ids = commas + 1

    def _is_lists(self, shape: bytes, commas: int, name: str) -> bool:
        """Whether brackets and commas are those of lists in a list, and nothing deeper or beside them."""
        lists = shape.count(b"]") - 1
        if len(shape) != commas + 2 * (lists + 1) or not (shape[:2] == b"[[" and shape[-2:] == b"]]"):
            return False
        if shape.count(b"],[") != lists - 1:
            return False
        self._count(lists, name)
        return True

    def _count(self, sequences: int, name: str) -> None:
        if sequences > MOST_PROMPTS:
            message = f"{name} holds {sequences} prompts, at most {MOST_PROMPTS} are allowed."
            raise bad_request(message, param=name, code="body_too_complex")
        self.sequences = sequences

    # What is kept of it

    def prefix(self, model: str | None) -> tuple[int, ...]:
        """Return the hashes of its blocks (`prefixes.py`)."""
        return hash_ids(model, self._ids) if self._ids else hash_texts(model, self.texts[: self._alike])

    def counted(self, count: Count) -> tuple[int, bool]:
        """Return the tokens of its texts, and whether all of them were counted."""
        left, beginning = MOST_COUNTED_BYTES, []
        for _, text in self.texts:
            beginning.append(text[:left])
            left -= len(text)
            if left <= 0:
                break
        tokens = count(beginning)
        if left >= 0:
            return tokens, True
        return tokens * self.text_bytes // MOST_COUNTED_BYTES, False


def _check_strings(raw: bytes, name: str) -> None:
    """Raise Refusal (400) for a list with more strings than are decoded. Quotes are counted: two a string,
    of which at most one looks escaped when it is not.
    """
    if raw.count(b'"') - raw.count(b'\\"') > 8 * MOST_PROMPTS:
        raise bad_request(f"{name} holds too many strings.", param=name, code="body_too_complex")


def _no_prompt(name: str) -> Exception:
    return bad_request(f"{name} must be a text, texts or token ids, and not empty.", param=name)
