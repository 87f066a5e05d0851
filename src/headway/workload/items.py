"""What a workload is made of: one `Item` per request, kept in columns so that a million rows stay small."""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, overload

from headway.core.errors import ConfigError

__all__ = ["Item", "Items", "Workload"]


class Item(NamedTuple):
    """One request to come: when (seconds from the start of the run), how long, and what its prompt shares.

    `prefix` holds one hash per full block of `prefix_block_tokens` prompt tokens, from the start of the
    prompt; empty when unknown. `output_tokens` is the truth, for the engine model; policies do not see it.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    prefix_block_tokens: int = 0


class Items(Sequence[Item]):
    """Items in columns: 16 bytes a row, plus the prefixes where there are any.

    Unlike a list it makes an `Item` anew at each access; a slice is a list of them.
    """

    __slots__ = ("arrivals_s", "output_tokens", "prefix_block_tokens", "prefixes", "prompt_tokens")

    def __init__(self, prefix_block_tokens: int = 0) -> None:
        self.arrivals_s = array("d")
        self.prompt_tokens = array("i")
        self.output_tokens = array("i")
        self.prefix_block_tokens = prefix_block_tokens
        self.prefixes: list[tuple[int, ...]] = []  # stays empty when the rows bear no prefix

    @classmethod
    def of(cls, items: Iterable[Item]) -> Self:
        """Pack items. They must agree on the size of a prefix block; else ConfigError."""
        packed = cls()
        for item in items:
            if item.prefix and packed.prefix_block_tokens not in (0, item.prefix_block_tokens):
                raise ConfigError("a workload's prefix blocks must all be of one size")
            packed.prefix_block_tokens = packed.prefix_block_tokens or item.prefix_block_tokens
            packed.append(item.arrival_s, item.prompt_tokens, item.output_tokens, item.prefix)
        return packed

    def append(
        self, arrival_s: float, prompt_tokens: int, output_tokens: int, prefix: tuple[int, ...] = ()
    ) -> None:
        """Add a row. Rows are not validated here: whoever reads them knows what to name in the message."""
        if prefix and not self.prefixes:
            self.prefixes = [()] * len(self)
        if prefix or self.prefixes:
            self.prefixes.append(prefix)
        self.arrivals_s.append(arrival_s)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)

    def cut_prefixes(self, block_tokens: int) -> None:
        """Set the size of a prefix block, and keep only the full blocks of each prompt."""
        self.prefix_block_tokens = block_tokens
        for row, prefix in enumerate(self.prefixes):
            self.prefixes[row] = prefix[: self.prompt_tokens[row] // block_tokens]

    def prefix(self, row: int) -> tuple[int, ...]:
        """Return the prefix hashes of a row, without making its `Item`."""
        return self.prefixes[row] if self.prefixes else ()

    def __len__(self) -> int:
        return len(self.arrivals_s)

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._item(row) for row in range(*index.indices(len(self)))]
        return self._item(index)

    def _item(self, row: int) -> Item:
        prefix = self.prefix(row)
        return Item(
            self.arrivals_s[row],
            self.prompt_tokens[row],
            self.output_tokens[row],
            prefix,
            self.prefix_block_tokens if prefix else 0,
        )


@dataclass(frozen=True, slots=True, init=False, eq=False)
class Workload:
    """Rows in order of arrival, the first at 0 s. `source` says for people where they came from.

    Raises ConfigError when there are none, or when an item is out of order or of no length.
    """

    name: str
    items: Items
    source: str

    def __init__(self, name: str, items: Sequence[Item], source: str) -> None:
        packed = items if isinstance(items, Items) else Items.of(items)
        _check(name, packed)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "items", packed)
        object.__setattr__(self, "source", source)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean length of a prompt, in tokens."""
        return sum(self.items.prompt_tokens) / len(self)

    @property
    def mean_output_tokens(self) -> float:
        """Mean length of an output, in tokens."""
        return sum(self.items.output_tokens) / len(self)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.items.arrivals_s[-1] - self.items.arrivals_s[0]

    @property
    def native_rps(self) -> float:
        """Mean request rate as recorded: one over the mean gap of arrivals; inf when all come at once."""
        return (len(self) - 1) / self.span_s if self.span_s > 0.0 else math.inf

    @property
    def reusable_prompt_share(self) -> float:
        """Share of all prompt tokens that a prefix cache without bounds would serve.

        Block hashes stand for the whole prompt up to their end, so all but the first of each are hits.
        """
        blocks = sum(map(len, self.items.prefixes))
        first_seen = len(set().union(*self.items.prefixes)) if blocks else 0
        return (blocks - first_seen) * self.items.prefix_block_tokens / sum(self.items.prompt_tokens)


def _check(name: str, items: Items) -> None:
    if not items:
        raise ConfigError(f"workload {name}: no requests")
    if min(items.prompt_tokens) < 1 or min(items.output_tokens) < 1:
        raise ConfigError(f"workload {name}: every prompt and output must be at least 1 token long")
    if not all(map(math.isfinite, items.arrivals_s)):
        raise ConfigError(f"workload {name}: every arrival must be a finite number of seconds")
    previous_s = items.arrivals_s[0]
    for arrival_s in items.arrivals_s:
        if arrival_s < previous_s:
            raise ConfigError(f"workload {name}: arrivals go back from {previous_s:g} s to {arrival_s:g} s")
        previous_s = arrival_s
