"""Loads a tokenizer file, and counts tokens with it."""

from pathlib import Path

from headway.core.errors import ConfigError
from headway.front.prompts import Count

__all__ = ["load_tokenizer"]


def load_tokenizer(path: Path) -> Count:
    """Return what counts the tokens of texts. Raises ConfigError when the file cannot be used."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError("server.tokenizer needs the package 'tokenizers'") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ConfigError(f"server.tokenizer: cannot use {path}: {error}") from None

    def count(texts: list[bytes]) -> int:
        return sum(
            len(tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids)
            for text in texts
        )

    return count
