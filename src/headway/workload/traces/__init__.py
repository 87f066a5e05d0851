"""Which published trace format a file is in, and the workload it holds.

The format shows in the first line; file names mean nothing. Files may be plain or gzipped.
"""

from pathlib import Path

from headway.core.errors import ConfigError
from headway.workload.items import Workload
from headway.workload.traces import azure, bailian, burstgpt, mooncake, servegen
from headway.workload.traces.reading import Lines, TraceFormat, TraceRows
from headway.workload.traces.reports import name_report

__all__ = ["FORMATS", "load_trace"]

FORMATS: tuple[TraceFormat, ...] = (
    azure.FORMAT,
    mooncake.FORMAT,
    bailian.FORMAT,
    burstgpt.FORMAT,
    servegen.FORMAT,
)


def load_trace(path: str | Path) -> Workload:
    """Load a recorded trace: Azure 2023/2024, Mooncake, Bailian, BurstGPT or ServeGen, plain or gzipped.

    Times are moved so that the first row comes at 0 s. Requests that failed when recorded (BurstGPT) are left
    out and counted in the workload's `source`.

    Raises ConfigError, as one line `FILE row N: …` with rows counted as an editor counts lines, for a file
    that cannot be read (missing, empty, broken gzip, not UTF-8), is in no known format, or has a row with a
    missing column, a broken number, a length that cannot be, or a time before the row above.
    """
    path = Path(path)
    lines = Lines(path)
    try:
        form = _recognise(lines.read_first())
        _refuse_report(path, lines.first)
        rows = form.read(lines)
    except ValueError as error:
        raise ConfigError(f"{path} row {lines.number}: {error}") from None
    finally:
        lines.close()
    if not rows.items:
        failed = f" but {rows.skipped:,} that failed" if rows.skipped else ""
        raise ConfigError(f"{path} row {lines.number}: the file ends without any request{failed}")
    return Workload(_stem(path), rows.items, _describe(path, form, rows))


def _recognise(first_line: str) -> TraceFormat:
    """Return the format the line shows most of; when it misses something, the reader then says what."""
    if not first_line.strip():
        raise ValueError("the file is empty or starts with an empty line")
    best = max(FORMATS, key=lambda form: form.likeness(first_line))
    if best.likeness(first_line) < 0.5:
        known = "; ".join(f"{form.name}: {form.example}" for form in FORMATS)
        raise ValueError(f"starts like no known trace format. Known are {known}")
    return best


def _refuse_report(path: Path, first_line: str) -> None:
    """Raise ConfigError for a benchmark's report."""
    document = Lines(path)
    try:
        what = name_report(first_line, document)
    except ValueError:
        return  # the reader says what is wrong
    finally:
        document.close()
    if what is not None:
        raise ConfigError(f"{path}: {what}")


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def _describe(path: Path, form: TraceFormat, rows: TraceRows) -> str:
    failed = f", {rows.skipped:,} failed ones left out" if rows.skipped else ""
    return f"{path.name} ({form.name} trace, {len(rows.items):,} requests{failed})"
