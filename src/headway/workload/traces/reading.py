"""What the trace formats share: lines that know their number, rows that must make sense, CSV columns by name.

Anything wrong with a row is a ValueError that says what; `load_trace` adds the file and the row.
"""

import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from headway.core.errors import ConfigError
from headway.workload.items import Items

__all__ = ["Lines", "TraceFormat", "TraceRows", "csv_format", "length", "seconds"]

GZIP_MAGIC = b"\x1f\x8b"
MOST_TOKENS = 2**31 - 1  # what a column of Items holds; no model comes near it


class Lines(Iterator[str]):
    """The lines of a plain or gzipped UTF-8 file. `number` is that of the last one read, from 1.

    `first` is the first line, which iteration yields again. Raises ConfigError when there is no such file,
    ValueError when a line cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = _unpacked(path)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        self.number = 0
        self._again = False
        self.first = ""

    def read_first(self) -> str:
        """Read the first line, without its byte order mark; empty when the file is."""
        self.first = next(self, "").removeprefix("\ufeff")
        self._again = True
        return self.first

    def __next__(self) -> str:
        if self._again:
            self._again = False
            return self.first
        self.number += 1
        try:
            line = self._file.readline()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"cannot be read: {error}") from None
        if not line:
            raise StopIteration
        # Line by line, not through a text file: its buffer would fail rows before the one at fault.
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _unpacked(path: Path) -> io.BufferedReader:
    """Open a file, unzipping what is gzip by its first bytes, or by its name: then all else is an error."""
    plain = path.open("rb")
    if path.suffix != ".gz" and plain.peek(2)[:2] != GZIP_MAGIC:
        return plain
    plain.close()
    # GzipFile reads lines in Python; behind a BufferedReader it is done in C.
    return io.BufferedReader(cast(io.RawIOBase, gzip.open(path)))


class TraceRows:
    """The rows read so far. `skipped` counts requests that failed when they were recorded."""

    def __init__(self, prefix_block_tokens: int = 0) -> None:
        self.items = Items(prefix_block_tokens)
        self.skipped = 0
        self._start_s = 0.0
        self._previous_s = -math.inf

    def append(
        self, time_s: float, prompt_tokens: int, output_tokens: int, prefix: tuple[int, ...] = ()
    ) -> None:
        """Add a request. Raises ValueError when it comes before the one above."""
        if time_s < self._previous_s:
            back_s = self._previous_s - time_s
            raise ValueError(f"time goes backwards by {back_s:g} s: rows must be in order of arrival")
        if not self.items:
            self._start_s = time_s
        self._previous_s = time_s
        # No format is finer than microseconds: what is beyond is noise of the subtraction.
        self.items.append(round(time_s - self._start_s, 6), prompt_tokens, output_tokens, prefix)


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """One published format.

    `example`: how such a file starts. `likeness`: how much of the format a first line shows, from 0 to 1.
    `read`: all rows of a file; raises ValueError for what is wrong with the current one.
    """

    name: str
    example: str
    likeness: Callable[[str], float]
    read: Callable[[Lines], TraceRows]


def csv_format(
    name: str,
    header: str,
    columns: tuple[str, str, str],
    *,
    time_s: Callable[[str, str], float],
    zero_means_failed: bool = False,
) -> TraceFormat:
    """Describe a CSV format.

    `columns` names time, prompt length and output length in its `header`; in a file they go by name, in any
    order and with others between them. `time_s` turns the text of a time and its column's name into seconds.
    With `zero_means_failed` a row with a length of 0 is a request that failed: skipped and counted; else it
    is an error.
    """

    def likeness(first_line: str) -> float:
        cells = {cell.strip() for cell in _cells(first_line)}
        return len(cells.intersection(columns)) / len(columns)

    def read(lines: Lines) -> TraceRows:
        found = [cell.strip() for cell in _cells(next(lines))]
        time_at, prompt_at, output_at = (_position(column, found) for column in columns)
        time_column, prompt_column, output_column = columns
        shortest = 0 if zero_means_failed else 1
        rows = TraceRows()
        for line in lines:
            cells = _cells(line)
            if cells == [""]:
                continue
            if len(cells) != len(found):
                raise ValueError(f"{len(cells)} columns, where the header has {len(found)}")
            prompt_tokens = length(cells[prompt_at], prompt_column, shortest)
            output_tokens = length(cells[output_at], output_column, shortest)
            if prompt_tokens and output_tokens:
                rows.append(time_s(cells[time_at], time_column), prompt_tokens, output_tokens)
            else:
                rows.skipped += 1
        return rows

    return TraceFormat(name, header, likeness, read)


def _cells(line: str) -> list[str]:
    # No format has commas within a cell, so that quotes, where an export put them, mean nothing.
    return line.replace('"', "").strip().split(",")


def _position(column: str, header: list[str]) -> int:
    if column not in header:
        raise ValueError(f"no column {column!r} in the header ({', '.join(header)})")
    return header.index(column)


def length(text: str, column: str, at_least: int = 1) -> int:
    """Parse a length in tokens. Raises ValueError unless it is a whole number of `at_least` or more."""
    try:
        value = int(text)
    except ValueError:
        value = _whole(text, column)
    if not at_least <= value <= MOST_TOKENS:
        bound = f"at least {at_least}" if value < at_least else f"at most {MOST_TOKENS}"
        raise ValueError(f"{column} must be {bound}, got {text}")
    return value


def _whole(text: str, column: str) -> int:
    """Parse `374.0`, as tables saved again have it."""
    value = seconds(text, column)
    if not value.is_integer():
        raise ValueError(f"{column} must be a whole number, got {text!r}")
    return int(value)


def seconds(text: str, column: str) -> float:
    """Parse a finite number. Raises ValueError for any other text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{column} must be a number, got {text!r}")
    return value
