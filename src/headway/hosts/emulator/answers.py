"""Decides what an answer looks like: OpenAI's JSON objects and server-sent events, as vLLM words them.

Output token i is the text `tok<i>`, a blank between two, so that a token lost or sent twice shows.
`system_fingerprint` is made from the prompt, so that an answer that went to the wrong client shows too.
"""

import asyncio
from typing import Any

import orjson

from headway.hosts.emulator.asks import Ask

__all__ = ["SseStream", "answer", "embeddings", "fingerprint", "text"]

_DONE = b"data: [DONE]\n\n"
_MARK = "\x00"

#: A client that has this much unread gets its next tokens in one piece later.
_UNREAD_BYTES = 1 << 16


def text(first: int, end: int) -> str:
    """Return output tokens `first` to before `end`.

    >>> text(0, 2) + text(2, 3)
    'tok0 tok1 tok2'
    """
    return "".join([f" tok{i}" if i else "tok0" for i in range(first, end)])


def fingerprint(ask: Ask) -> str:
    """Return the prompt's mark."""
    return f"fp_{ask.digest:08x}"


def answer(ask: Ask, name: str, model: str, created: int, tokens: int, more: dict[str, Any]) -> bytes:
    """Return a whole answer of `tokens` tokens; `more` is added to it."""
    content = text(0, tokens)
    choice: dict[str, Any] = {"index": 0}
    if ask.chat:
        choice["message"] = {"role": "assistant", "content": content}
    else:
        choice["text"] = content
    choice |= {"logprobs": None, "finish_reason": _reason(ask, tokens)}
    kind = "chat.completion" if ask.chat else "text_completion"
    return orjson.dumps(
        {
            "id": name,
            "object": kind,
            "created": created,
            "model": model,
            "choices": [choice],
            "usage": _usage(ask, tokens),
            "system_fingerprint": fingerprint(ask),
            **more,
        }
    )


def embeddings(inputs: list[tuple[int, int]], model: str) -> bytes:
    """Return small vectors made from each input's digest; `inputs` are (digest, tokens)."""
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(digest)}
        for index, (digest, _) in enumerate(inputs)
    ]
    tokens = sum(tokens for _, tokens in inputs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps({"object": "list", "data": data, "model": model, "usage": usage})


class SseStream:
    """Writes an answer to a connection as its tokens come, in HTTP chunks of its own.

    Bypassing the framework's coroutine per write is what lets one core serve thousands of streams: a pass
    writes to each of them in one go. `chunked`: frame for HTTP/1.1.
    """

    __slots__ = ("_ask", "_begin", "_chunked", "_end", "_frame", "_transport", "sent")

    def __init__(
        self, ask: Ask, name: str, model: str, created: int, transport: asyncio.Transport, *, chunked: bool
    ) -> None:
        self._ask = ask
        self._transport = transport
        self._chunked = chunked
        self.sent = 0
        kind = "chat.completion.chunk" if ask.chat else "text_completion"
        self._frame = {
            "id": name,
            "object": kind,
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint(ask),
        }
        begin, end = self._event([self._choice(_MARK, None)]).split(orjson.dumps(_MARK)[1:-1])
        self._begin, self._end = begin, end

    def upto(self, tokens: int) -> None:
        """Send what is new of the first `tokens`; to a client that does not read, later and more at once."""
        transport = self._transport
        if tokens <= self.sent or transport.is_closing():
            return
        if transport.get_write_buffer_size() > _UNREAD_BYTES:
            return
        data = b"%b%b%b" % (self._begin, text(self.sent, tokens).encode(), self._end)
        if not self.sent:
            data = self._role() + data
        self.sent = tokens
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def rest(self, tokens: int) -> bytes:
        """Return what is left when all `tokens` exist: the last of them, why it ended, usage, and the end."""
        parts = [] if self.sent else [self._role()]
        parts.append(self._event([self._choice(text(self.sent, tokens), _reason(self._ask, tokens))]))
        if self._ask.usage:
            parts.append(self._event([], _usage(self._ask, tokens)))
        self.sent = tokens
        return b"".join([*parts, _DONE])

    def _role(self) -> bytes:
        if not self._ask.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, content: str, reason: str | None) -> dict[str, Any]:
        body = {"delta": {"content": content}} if self._ask.chat else {"text": content}
        return {"index": 0, **body, "logprobs": None, "finish_reason": reason}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        frame = self._frame | {"choices": choices}
        if usage is not None:
            frame |= {"usage": usage}
        return b"data: %b\n\n" % orjson.dumps(frame)


def _reason(ask: Ask, tokens: int) -> str:
    return "stop" if ask.stops and tokens == ask.output_tokens else "length"


def _usage(ask: Ask, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": ask.prompt_tokens + tokens,
    }


def _vector(digest: int, size: int = 8) -> list[float]:
    return [((digest >> (4 * i)) % 16 - 7.5) / 8 for i in range(size)]
