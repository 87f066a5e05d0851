"""The file a sweep writes while it runs, and reads again to go on: JSON lines, append-only.

A line is a whole result and says by itself what it is of (schema `headway.result/1`):

    {"schema": …, "key": "3f…", "job": {"version": …, "cluster": …, "policy": …, "seed": …}, "result": {…}}
    {"schema": …, "key": "3f…", "job": {…}, "failed": "lost 3 times: its process was killed by SIGKILL"}

`key` is a digest of `job`: whatever a result depends on is in there, so that equal keys mean equal results.
The last line may be torn, when the machine went down while it was written: it is cut off and its job run
again. Any other line that cannot be read is somebody else's, and the file is left alone. A failed job is run
again.

Parquet can not be appended to: `--out FILE.parquet` keeps its lines in FILE.jsonl until all is done, then
both stand.
"""

import fcntl
import hashlib
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import orjson

from headway.core.errors import ConfigError
from headway.report.metrics import Distribution, Run
from headway.report.results import flat

__all__ = [
    "ResultsFile",
    "content_key",
    "flat_record",
    "results_file",
    "run_from_record",
    "run_to_record",
    "write_parquet",
]

SCHEMA = "headway.result/1"


def content_key(job: Mapping[str, Any]) -> str:
    """Return the key of a job: a digest of what it is, whatever the order of its names."""
    return hashlib.sha256(orjson.dumps(job, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def results_file(path: str | Path | None, *, resume: bool) -> AbstractContextManager["ResultsFile | None"]:
    """Return the file, or None for no path. Raises ConfigError as `ResultsFile`, and for resuming nothing."""
    if path is not None:
        return ResultsFile(Path(path), resume=resume)
    if resume:
        raise ConfigError("resume needs the file to go on with: name it with out")
    return nullcontext()


class ResultsFile:
    """Results by key, on disk as soon as they are known; a context manager.

    `path` ends in .jsonl, or .parquet for both. Raises ConfigError for another ending, for a file that is
    there already unless `resume`, for one that cannot be written or read, and for one that another run
    writes.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        if path.suffix not in (".jsonl", ".parquet"):
            raise ConfigError(f"{path}: results are written to a file named .jsonl or .parquet")
        self._parquet = path if path.suffix == ".parquet" else None
        if self._parquet:
            _pyarrow()
        self.path = path.with_suffix(".jsonl")
        if self.path.exists() and not resume:
            raise ConfigError(f"{self.path} is there already: resume it, or name another file")
        self._records: dict[str, dict[str, Any]] = {}
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._parquet:
            write_parquet(self._parquet, list(self._records.values()))

    def result(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result of a job, None when it is not there or has failed."""
        record = self._records.get(content_key(job))
        return record.get("result") if record else None

    def add(self, job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result."""
        self._append(job, "result", result)

    def add_failure(self, job: Mapping[str, Any], why: str) -> None:
        """Write that a job has failed."""
        self._append(job, "failed", why)

    def _append(self, job: Mapping[str, Any], name: str, value: Any) -> None:
        key = content_key(job)
        line = orjson.dumps(
            {"schema": SCHEMA, "key": key, "job": job, name: value}, option=orjson.OPT_APPEND_NEWLINE
        )
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._records[key] = orjson.loads(line)

    def _read(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{self.path}: another run writes to it") from None
        self._file.seek(0)
        whole_bytes = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            self._keep(number, line)
            whole_bytes += len(line)
        self._file.truncate(whole_bytes)

    def _keep(self, number: int, line: bytes) -> None:
        try:
            record = orjson.loads(line)
            fits = record["schema"] == SCHEMA and record["key"] == content_key(record["job"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            fits = False
        if not fits:
            raise ConfigError(f"{self.path}: line {number} is not a result of schema {SCHEMA}")
        self._records[record["key"]] = record


def flat_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """One flat row of a line: what the job is, then `ttft_s.mean` and the like; lists are left out.

    A name that job and result share has the same value in both.
    """
    row = flat({"key": record["key"]} | record["job"] | record.get("result", {}))
    return {name: v for name, v in row.items() if not isinstance(v, list)} | {"failed": record.get("failed")}


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    """Write lines as a Parquet table, one row each. Raises ConfigError when pyarrow is not installed."""
    pyarrow = _pyarrow()
    rows = [flat_record(record) for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, path)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'headway[parquet]'") from None
    return pyarrow


def run_to_record(run: Run, distribution: Distribution) -> dict[str, Any]:
    """Return a run as the `result` of a line."""
    return asdict(run) | {"distribution": asdict(distribution)}


def run_from_record(record: Mapping[str, Any]) -> tuple[Run, Distribution]:
    """Read it again, equal to what it was. Raises KeyError, TypeError or ValueError for another record."""
    values: dict[str, Any] = {
        name: math.nan if value is None and name != "load" else value for name, value in record.items()
    }
    sampled = values.pop("distribution")
    return Run(**values), Distribution(tuple(sampled["ttft_s"]), tuple(sampled["tpot_s"]))
