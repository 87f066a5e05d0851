"""What a batch policy costs inside vLLM: time of `schedule()` and `update_from_output()`, without a model.

    make test-engine                                    # once: prepares .venv-vllm
    .venv-vllm/bin/python -m benchmarks.vllm_overhead   # target: at most 0.3 ms more than stock at 64 running

Real schedulers, stock and ours, in alternation in one process; what is shown is the CPU time of the
scheduler's thread, the median of the steps and their quartiles: other processes on the machine do not count.
`fair+events` tells every pass, `fair+steps` records every step. The clock that policies see
is not the real one: it goes on by what a step of an 8B model on an A100 takes, so that they learn, plan and
cut as they would there.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from time import thread_time
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engine"))  # the schedulers without a model
from scheduler_kit import Bench
from vllm.v1.core.sched.scheduler import Scheduler

from headway.hosts.vllm import FairScheduler, driver, view

RUNNING = (1, 16, 64)
#: No part of a step may grow with the queue.
WAITING = (0, 8, 500, 5000)
#: Of the requests that decode, and of those that wait and leave with their first token.
DECODE_PROMPT, WAITING_PROMPT = 256, 1024
WARM_STEPS = 150
TARGETS = {"ttft_s": 1.0, "tpot_s": 0.05}


class Clock(SimpleNamespace):
    """Goes on only when it is told to. Stands in for the module `time`."""

    s = 1000.0

    def monotonic(self) -> float:
        """Return s, from nowhere in particular."""
        return self.s

    def time(self) -> float:
        """Return s of a wall clock."""
        return self.s + 1e9


class Contender:
    """A scheduler at work, with so many decodes and waiting prompts all along."""

    def __init__(self, name: str, running: int, waiting: int, folder: Path, clock: Clock) -> None:
        policy, *extras = name.split("+")
        told = {"events": {"events": "tcp://127.0.0.1:0"}, "steps": {"steps": str(folder / "steps.csv")}}
        headway: dict[str, Any] = {"policy": policy, **TARGETS}
        for extra in extras:
            headway |= told[extra]
        cls = Scheduler if name == "stock" else FairScheduler
        self.name, self.times_s = name, list[float]()
        self._bench = Bench(folder, cls, headway=headway, tokens=2048, seats=256, blocks=40_000)
        self._clock, self._waiting, self._spent_s = clock, waiting, 0.0
        scheduler = self._bench.scheduler
        scheduler.schedule = self._timed(scheduler.schedule)
        scheduler.update_from_output = self._timed(scheduler.update_from_output)
        self._decodes = [self._bench.add(DECODE_PROMPT, 7000) for _ in range(running)]
        while any(request.num_output_tokens == 0 for request in self._decodes):
            self._step()
        for _ in range(WARM_STEPS):
            self.step()
        self.times_s.clear()

    def step(self) -> None:
        """Run a step and note what it cost."""
        scheduler = self._bench.scheduler
        while len(scheduler.waiting) < self._waiting:
            self._bench.add(WAITING_PROMPT, 1)
        self._step()
        self.times_s.append(self._spent_s)

    def close(self) -> None:
        """End the scheduler. Raises SystemExit if a policy failed: then nothing of it was measured."""
        plug = getattr(self._bench.scheduler, "headway", None)
        if plug is not None and plug.driver.tally.failures:
            raise SystemExit(f"{self.name}: {plug.driver.tally.failures} failures")
        self._bench.close()

    def _step(self) -> None:
        self._spent_s = 0.0
        output = self._bench.schedule()
        self._clock.s += 0.0118 + 0.000055 * output.total_num_scheduled_tokens
        self._bench.finish(output)

    def _timed(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = thread_time()
            try:
                return act(*args, **kwargs)
            finally:
                self._spent_s += thread_time() - start_s

        return timed


def measure(names: list[str], running: int, waiting: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds of each step, by contender."""
    clock = Clock()
    driver.time = view.time = clock  # type: ignore[attr-defined]
    with TemporaryDirectory() as folder:
        contenders = [Contender(name, running, waiting, Path(folder), clock) for name in names]
        gc.collect()
        gc.freeze()  # as vLLM does when an engine has started
        for number in range(steps):
            start = number % len(names)
            for contender in contenders[start:] + contenders[:start]:
                contender.step()
        for contender in contenders:
            contender.close()
    return {contender.name: contender.times_s for contender in contenders}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_overhead", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--policies", default="vllm-v1,fair,fair+events,fair+steps,triage,triage+events")
    parser.add_argument("--running", type=_numbers, default=RUNNING, help="decodes, as 1,16,64")
    parser.add_argument("--waiting", type=_numbers, default=WAITING, help="waiting prompts, as 0,5000")
    parser.add_argument("--steps", type=int, default=400, help="of each contender and case")
    given = parser.parse_args()
    names = ["stock", *given.policies.split(",")]
    print("running waiting  scheduler          median       quartiles       more than stock")
    for running in given.running:
        for waiting in given.waiting:
            found = measure(names, running, waiting, given.steps)
            stock = quantiles(found["stock"], n=4)[1]
            for name, times_s in found.items():
                low, middle, high = quantiles(times_s, n=4)
                print(
                    f"{running:7} {waiting:7}  {name:14} {1e3 * middle:7.3f} ms  "
                    f"{1e3 * low:.3f} – {1e3 * high:.3f} ms "
                    f"{1e3 * (middle - stock):+8.3f} ms {middle / stock:5.2f} ×",
                    flush=True,
                )


if __name__ == "__main__":
    main()
