"""Read traces of JSON lines with `timestamp`, `input_length`, `output_length` and `hash_ids`.

`hash_ids` name the prompt's blocks, each by all the text up to its end. No field gives the size of a block:
it follows from the rows, for `len(hash_ids) = ceil(input_length / size)` must hold for every row that has
hashes. The last block may be part of one, which no cache can share: only full blocks count as prefix.
Without `hash_ids` no prefix is known.
"""

import orjson

from headway.workload.traces.reading import Lines, TraceRows, length, seconds

__all__ = ["read_rows"]

#: Sizes of blocks that caches use; the one that a format documents comes first.
_SIZES = (512, 16, 32, 64, 128, 256, 1024, 2048, 4096)


def read_rows(lines: Lines, *, usual_tokens: int, second: float) -> TraceRows:
    """Read all rows. `usual_tokens`: the format's block size. `second`: how many units of time are a second.

    Raises ValueError for a row that makes no sense, or whose hashes are of no size that fits the rows above.
    """
    rows = TraceRows()
    sizes = [usual_tokens, *(size for size in _SIZES if size != usual_tokens)]
    for line in lines:
        if line.isspace():
            continue
        row = _parse(line)
        prompt_tokens = length(_text(row, "input_length"), "input_length")
        blocks = _blocks(row.get("hash_ids", []))
        if blocks:
            sizes = _fitting(sizes, len(blocks), prompt_tokens)
        time_s = seconds(_text(row, "timestamp"), "timestamp") / second
        rows.append(time_s, prompt_tokens, length(_text(row, "output_length"), "output_length"), blocks)
    rows.items.cut_prefixes(sizes[0])
    return rows


def _fitting(sizes: list[int], blocks: int, prompt_tokens: int) -> list[int]:
    """Return the sizes for which the prompt has so many blocks. Raises ValueError when there is none."""
    fitting = [size for size in sizes if -(-prompt_tokens // size) == blocks]
    if not fitting:
        due = -(-prompt_tokens // sizes[0])
        raise ValueError(
            f"hash_ids names {blocks} blocks, but {prompt_tokens} tokens are {due} blocks of {sizes[0]}"
            " (no block size fits all rows)"
        )
    return fitting


def _parse(line: str) -> dict[str, object]:
    try:
        row = orjson.loads(line)
    except ValueError:
        raise ValueError("not a JSON object") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _text(row: dict[str, object], key: str) -> str:
    """Return a value as text, to be parsed as the CSV formats' cells are."""
    if key not in row:
        raise ValueError(f"no {key!r} (found {', '.join(row) or 'nothing'})")
    return str(row[key])


def _blocks(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise ValueError("hash_ids must be a list of whole numbers")
    return tuple(ids)
