"""Records the steps of an engine in a CSV file, one row each: what `headway calibrate` reads.

Rule 1. The engine only appends to a queue in memory; a thread writes it out, twice a second.
Rule 2. A path that cannot be written ends the start. Later nothing does: when the disk is full or gone, that
        is logged once, the file is cut back to its last whole row, and rows that follow are counted as lost.
Rule 3. Each start makes the file anew. Ranks of one instance have a file each.
"""

import os
import threading
from collections import deque
from contextlib import suppress
from logging import Logger
from pathlib import Path
from typing import Final

from headway.core.errors import ConfigError
from headway.hosts.vllm.steps import Step

__all__ = ["HEADER", "Recorder", "path_of_rank"]

HEADER: Final = (
    "ended_s,phase,new_tokens,decodes,context_tokens,prompt_context_tokens,attention,duration_s,host_gap_s\n"
)
_WRITE_EVERY_S: Final = 0.5
#: Rows that wait for a disk that does not answer, at most.
_MOST_ROWS: Final = 100_000


class Recorder:
    """Opens the file at construction: raises ConfigError where it cannot. `lost`: rows that found no room.

    Columns: when the step ended (s, the machine's monotonic clock), its regime, tokens computed, how many of
    them were decodes, context of the decodes, context of the prompts, Σ chunk·(context + chunk/2) of the
    prompts (tokens²), duration (s, as `Steps` has it), and what of that passed before the step was formed.
    """

    def __init__(self, path: Path, log: Logger) -> None:
        self.path = path
        self.lost = 0
        self._log = log
        self._rows: deque[tuple[Step, float, float, float]] = deque()
        self._failed = False
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"steps: cannot write {str(path)!r}: {error.strerror}") from None
        self._written = 0  # bytes, of whole rows
        try:
            self._put(HEADER)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"steps: cannot write {str(path)!r}: {error.strerror}") from None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headway-recorder", daemon=True)
        self._thread.start()

    def note(self, step: Step, duration_s: float, host_gap_s: float, now: float) -> None:
        """Take in a step that ended at `now`. Never waits."""
        if self._failed or len(self._rows) >= _MOST_ROWS:
            self.lost += 1
        else:
            self._rows.append((step, duration_s, host_gap_s, now))

    def close(self) -> None:
        """Write what is left, as far as the disk takes it, and close the file."""
        self._stop.set()
        self._thread.join(timeout=2.0)
        if not self._thread.is_alive():
            self._write()
            os.close(self._file)

    def _run(self) -> None:
        while not self._stop.wait(_WRITE_EVERY_S):
            self._write()

    def _write(self) -> None:
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        if not rows or self._failed:
            self.lost += len(rows)
            return
        try:
            self._put("".join([_row(*row) for row in rows]))
        except OSError as error:
            self._failed = True
            self.lost += len(rows)
            self._log.error("Headway records no more steps in %s: %s", self.path, error.strerror)

    def _put(self, text: str) -> None:
        data = text.encode()
        try:
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._written)  # half a row would spoil the file for its readers
            raise
        self._written += len(data)


def path_of_rank(path: str, rank: int) -> Path:
    """Return where a rank writes: rank 0 (which need not know of others) to the path itself, the others with
    `-<rank>` before its suffix.
    """
    whole = Path(path)
    return whole if rank == 0 else whole.with_stem(f"{whole.stem}-{rank}")


def _row(step: Step, duration_s: float, host_gap_s: float, now: float) -> str:
    prefill, decode = step.prompt_tokens > 0, step.decodes > 0
    phase = "mixed" if prefill and decode else "prefill" if prefill else "decode"
    return (
        f"{now:.6f},{phase},{step.new_tokens},{step.decodes},"
        f"{step.context_tokens - step.prompt_context_tokens},{step.prompt_context_tokens},"
        f"{step.attention:.1f},{duration_s:.6f},{host_gap_s:.6f}\n"
    )
