"""Decides how many tokens a prompt has: by a tokenizer file where one is configured, else by its bytes.

Without a tokenizer the ratio of bytes to tokens is learned from the `usage` that engines report.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headway.core.errors import ConfigError
from headway.core.estimate.prompt_length import PromptLength
from headway.front.requests import Call

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Lengths"]

#: Longer prompts are tokenized in a thread: the loop has streams to forward.
THREAD_FROM_BYTES = 4096


class Lengths:
    """Measures prompts. Raises ConfigError when the tokenizer file cannot be used."""

    def __init__(self, tokenizer: Path | None = None) -> None:
        self.ratio = PromptLength()
        self._tokenizer = None if tokenizer is None else _load(tokenizer)

    def exact(self, call: Call) -> bool:
        """Whether the length of its prompt is counted, not estimated."""
        return call.token_ids is not None or self._tokenizer is not None

    async def measure(self, call: Call) -> int:
        """Return the (likely) tokens of the prompt, at least 1."""
        if call.token_ids is not None:
            return call.token_ids
        if self._tokenizer is None:
            return self.ratio.estimate(call.prompt_bytes)
        if call.prompt_bytes < THREAD_FROM_BYTES:
            return self._count(call)
        return await asyncio.to_thread(self._count, call)

    def learn(self, prompt_bytes: int, prompt_tokens: int) -> None:
        """Take in what an engine counted; of a prompt that came as tokens, no bytes tell."""
        if prompt_bytes > 0 and prompt_tokens > 0:
            self.ratio.observe(prompt_bytes, prompt_tokens)

    def _count(self, call: Call) -> int:
        assert self._tokenizer is not None
        texts = [
            _unescape(text) if call.path.endswith("/chat/completions") else text.decode()
            for text in call.texts
        ]
        return max(1, sum(len(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in texts))


def _unescape(text: bytes) -> str:
    try:
        return msgspec.json.decode(b'"' + text + b'"', type=str)
    except msgspec.DecodeError:
        return text.decode()  # a part of a list, or the tools: text as it is


def _load(path: Path) -> "Tokenizer":
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError("server.tokenizer needs the package 'tokenizers'") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ConfigError(f"server.tokenizer: cannot use {path}: {error}") from None
