"""Jobs on workers: the order of results, lost workers, errors, and what is on file already.

Jobs here are tiny functions; one that is to lose its worker kills its own process: nothing depends on time.
"""

import multiprocessing
import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from headway.core.errors import ConfigError, HeadwayError
from headway.hosts.sim.jobs import MAX_TRIES, Failure, Job, Kept, run_jobs, try_jobs
from headway.hosts.sim.workers import Where, open_workers
from headway.report.results_file import ResultsFile

TWO = Where(workers=2)
HERE = Where(workers=1)


def job(number: int, call: object = None) -> Job:
    about = {"cluster": "c", "policy": "p", "batch": "b", "load": 0.5, "seed": number}
    return Job(number if call is None else call, about)


def ten_times(shared: int, number: int) -> int:
    return shared * number


def raises_at_two(shared: None, number: int) -> int:
    if number == 2:
        raise ZeroDivisionError("two")
    return number


def dies_until_marked(marks: Path, number: int) -> int:
    """Job 1 kills its process, as often as `marks` has not seen it die before."""
    mark = marks / "died"
    if number == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * number


def always_dies_at_one(marks: Path, number: int) -> int:
    if number == 1:
        (marks / f"try-{len(list(marks.iterdir()))}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * number


def exits_at_one(shared: None, number: int) -> int:
    if number == 1:
        os._exit(7)
    return number


def pid(shared: None, number: int) -> int:
    return os.getpid()


def the_first_ends_last(marks: Path, number: int) -> int:
    """Job 0 ends only when job 3 has."""
    if number == 3:
        (marks / "three").touch()
    while number == 0 and not (marks / "three").exists():
        pass
    return number


class UnsendableError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def raises_unsendable(shared: None, number: int) -> int:
    raise UnsendableError("this", "that")


@pytest.mark.parametrize("where", [HERE, TWO])
def test_results_come_in_the_order_of_the_jobs(where: Where):
    assert run_jobs(ten_times, 10, [job(n) for n in (3, 1, 2)], where=where) == [30, 10, 20]


def test_they_do_when_the_first_ends_last(tmp_path: Path):
    jobs = [job(n) for n in range(4)]
    assert run_jobs(the_first_ends_last, tmp_path, jobs, where=TWO) == [0, 1, 2, 3]


def test_a_process_is_used_again_and_there_are_no_more_than_jobs():
    pids = run_jobs(pid, None, [job(n) for n in range(8)], where=TWO)
    assert len(set(pids)) <= 2
    assert os.getpid() not in pids
    assert run_jobs(pid, None, [job(0)], where=TWO) == [os.getpid()]


def test_a_job_whose_process_was_killed_is_run_again(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    jobs = [job(n) for n in range(6)]
    results = run_jobs(dies_until_marked, tmp_path, jobs, where=TWO, progress=lambda *at: seen.append(at))
    assert results == [0, 10, 20, 30, 40, 50]
    assert (tmp_path / "died").exists()
    assert seen[0] == (0, 6) and seen[-1] == (6, 6)


def test_it_is_given_up_after_three_times_and_the_others_are_not(tmp_path: Path):
    results = try_jobs(always_dies_at_one, tmp_path, [job(n) for n in range(4)], where=TWO)
    assert [results[n] for n in (0, 2, 3)] == [0, 20, 30]
    failure = results[1]
    assert isinstance(failure, Failure)
    assert failure.name == "c · p · b · load 0.5 · seed 1"
    assert failure.why == "lost 3 times: its process was killed by SIGKILL, perhaps for lack of memory"
    assert len(list(tmp_path.iterdir())) == MAX_TRIES == 3


def test_where_every_result_is_needed_that_is_an_error(tmp_path: Path):
    with pytest.raises(HeadwayError, match=r"^c · p · b · load 0.5 · seed 1: lost 3 times: .*SIGKILL"):
        run_jobs(always_dies_at_one, tmp_path, [job(n) for n in range(4)], where=TWO)


def test_a_process_that_ends_itself_says_its_status():
    failure = try_jobs(exits_at_one, None, [job(0), job(1)], where=TWO)[1]
    assert isinstance(failure, Failure)
    assert failure.why == "lost 3 times: its process ended with status 7"


@pytest.mark.parametrize("where", [HERE, TWO])
def test_an_error_of_the_work_is_not_tried_again(where: Where):
    jobs = [job(n) for n in range(4)]
    with pytest.raises(ZeroDivisionError, match="two"):
        run_jobs(raises_at_two, None, jobs, where=where)
    results = try_jobs(raises_at_two, None, jobs, where=where)
    assert [results[n] for n in (0, 1, 3)] == [0, 1, 3]
    assert isinstance(results[2], Failure) and results[2].why == "ZeroDivisionError: two"


def test_an_error_from_a_process_shows_where_it_was_raised():
    with pytest.raises(ZeroDivisionError) as caught:
        run_jobs(raises_at_two, None, [job(1), job(2)], where=TWO)
    assert "in raises_at_two" in caught.value.__notes__[0]


def test_an_error_that_cannot_be_sent_is_told_all_the_same():
    with pytest.raises(HeadwayError, match="UnsendableError: this and that"):
        run_jobs(raises_unsendable, None, [job(1), job(2)], where=TWO)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_is_raised_no_process_is_left(error: type[BaseException], tmp_path: Path):
    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        run_jobs(the_first_ends_last, tmp_path, [job(0), job(1)], where=TWO, progress=stop)
    assert multiprocessing.active_children() == []


def test_a_process_lost_while_idle_costs_its_next_job_a_try():
    with closing(open_workers(TWO, ten_times, 10, 2)) as workers:
        workers.start(0, 1)
        assert workers.wait()[0].result == 10
        (idle,) = multiprocessing.active_children()
        idle.kill()
        idle.join()
        workers.start(1, 2)
        assert workers.wait()[0].lost == "its process was killed by SIGKILL, perhaps for lack of memory"
        workers.start(1, 2)
        assert workers.wait()[0].result == 20


def keep(path: Path, *, resume: bool = False) -> Kept:
    return Kept(
        ResultsFile(path, resume=resume), lambda result: {"got": result}, lambda record: record["got"]
    )


def never(shared: None, number: int) -> int:
    raise AssertionError(f"job {number} was run again")


def test_what_is_on_file_is_not_run_again(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    with (kept := keep(path)).file:
        run_jobs(ten_times, 10, [job(1), job(2)], where=HERE, kept=kept)
    seen: list[tuple[int, int]] = []
    with (kept := keep(path, resume=True)).file:
        jobs = [job(2), job(3), job(1)]
        results = run_jobs(ten_times, 10, jobs, where=HERE, kept=kept, progress=lambda *at: seen.append(at))
    assert results == [20, 30, 10]
    assert seen == [(2, 3), (3, 3)]
    with (kept := keep(path, resume=True)).file:
        assert run_jobs(never, None, jobs, where=HERE, kept=kept) == [20, 30, 10]


def test_what_ended_before_an_interruption_is_on_file(tmp_path: Path):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    path = tmp_path / "r.jsonl"
    jobs = [job(n) for n in range(4)]
    with pytest.raises(KeyboardInterrupt), (kept := keep(path)).file:
        run_jobs(ten_times, 10, jobs, where=HERE, kept=kept, progress=stop)
    with ResultsFile(path, resume=True) as file:
        assert [file.result(each.about) for each in jobs] == [{"got": 0}, {"got": 10}, None, None]


def test_a_failure_is_on_file_with_its_reason_and_run_again(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    jobs = [job(1), job(2)]
    with (kept := keep(path)).file:
        try_jobs(raises_at_two, None, jobs, where=HERE, kept=kept)
    assert '"failed":"ZeroDivisionError: two"' in path.read_text()
    with (kept := keep(path, resume=True)).file:
        assert run_jobs(ten_times, 10, jobs, where=HERE, kept=kept) == [1, 20]


def test_a_result_that_cannot_be_read_is_said_to_be(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    with ResultsFile(path, resume=False) as file:
        file.add(job(1).about, {"other": 1})
    with (
        (kept := keep(path, resume=True)).file,
        pytest.raises(ConfigError, match=r"r.jsonl: the result of c .* seed 1 cannot be read"),
    ):
        run_jobs(never, None, [job(1)], where=HERE, kept=kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "rey"}, "unknown backend 'rey': did you mean 'ray'"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"address": "h:1"}, "address 'h:1' is for the backend ray, not processes"),
    ],
)
def test_bad_places_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        Where(**options)
    assert message in str(caught.value)


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r"^backend ray: Ray is not installed: pip install 'headway\[ray\]'$"
    ):
        run_jobs(ten_times, 1, [job(0)], where=Where("ray"))
