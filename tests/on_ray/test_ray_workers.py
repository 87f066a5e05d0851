"""Jobs on Ray: the same results as in processes, and what is lost with a worker."""

import os
import signal
import sys
from pathlib import Path

import pytest
import ray
import ray_processes
from ray_processes import busy_workers

import headway
from headway.core.errors import ConfigError
from headway.hosts.sim.jobs import Failure, Job, run_jobs, try_jobs
from headway.hosts.sim.workers import Where
from headway.hosts.sim.workers import ray as ray_workers

ON_RAY = Where("ray")
SMALL = {"cluster": "llama8b-h100", "requests": 40, "policies": ["round-robin", "least-tokens"]}


@pytest.fixture(scope="module", autouse=True)
def one_ray_for_all():
    """One of two CPUs, already connected: each sweep uses it and leaves it running."""
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    # Ray's workers do not see the folder of the tests: what runs there is sent as it is.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


def job(number: int) -> Job:
    return Job(number, {"cluster": "c", "policy": "p", "batch": "b", "load": 0.5, "seed": number})


def dies_until_marked(marks: Path, number: int) -> int:
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


def raises_at_two(shared: None, number: int) -> int:
    if number == 2:
        raise ZeroDivisionError("two")
    return number


def without_wall(result) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in result.rows()]


def test_compare_gives_what_processes_give():
    options = {**SMALL, "batch": ["vllm-v1", "fair"], "load": [0.3, 0.8], "seeds": 2}
    on_ray = headway.compare(**options, backend="ray")
    assert without_wall(on_ray) == without_wall(headway.compare(**options, workers=2))
    assert ray.is_initialized()


def test_capacity_gives_what_processes_give():
    options = {**SMALL, "batch": ["vllm-v1"], "seeds": 2, "tolerance": 0.2}
    on_ray = headway.capacity(**options, backend="ray")
    assert on_ray.rows() == headway.capacity(**options, workers=2).rows()


def test_sweep_gives_what_processes_give_and_goes_on_from_their_file(tmp_path: Path):
    options = {"workload": "azure-conv", "gpus": 64, "ep": [8, 16], "load": [0.4], "requests": 40}
    on_ray = headway.sweep(**options, backend="ray", out=tmp_path / "ray.jsonl")
    in_processes = headway.sweep(**options, workers=2, out=tmp_path / "processes.jsonl")
    assert without_wall(on_ray) == without_wall(in_processes)
    seen: list[tuple[int, int]] = []
    headway.sweep(**options, out=tmp_path / "ray.jsonl", resume=True, progress=lambda *at: seen.append(at))
    assert seen == []


def test_a_job_whose_worker_was_killed_is_run_again(tmp_path: Path):
    results = run_jobs(dies_until_marked, tmp_path, [job(n) for n in range(6)], where=ON_RAY)
    assert results == [0, 10, 20, 30, 40, 50]
    assert (tmp_path / "died").exists()


def test_it_is_given_up_after_three_times_and_the_others_are_not(tmp_path: Path):
    results = try_jobs(always_dies_at_one, tmp_path, [job(n) for n in range(4)], where=ON_RAY)
    assert [results[n] for n in (0, 2, 3)] == [0, 20, 30]
    failure = results[1]
    assert isinstance(failure, Failure)
    assert failure.why.startswith("lost 3 times: WorkerCrashedError: ")
    assert "\n" not in failure.why
    assert len(list(tmp_path.iterdir())) == 3


def test_a_worker_killed_half_way_changes_nothing():
    options = {
        "workload": "azure-conv",
        "gpus": 64,
        "ep": [8],
        "load": [0.3, 0.6],
        "requests": 300,
        "seeds": 3,
    }
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done >= total // 2 and not killed:
            while not (busy := busy_workers()):
                assert done < total
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])

    result = headway.sweep(**options, backend="ray", progress=kill)
    assert killed and result.failed == []
    assert without_wall(result) == without_wall(headway.sweep(**options, workers=2))


def test_an_error_of_the_work_is_not_tried_again():
    with pytest.raises(ZeroDivisionError, match="two") as caught:
        run_jobs(raises_at_two, None, [job(n) for n in range(4)], where=ON_RAY)
    assert "in raises_at_two" in caught.value.__notes__[0]


def test_a_module_that_a_node_has_not_is_named():
    with pytest.raises(ConfigError, match=r"^a Ray node has no module 'ray_processes': install it there"):
        run_jobs(ray_processes.answer, None, [job(0)], where=ON_RAY)


def test_a_node_with_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_workers, "__version__", "99")
    with pytest.raises(
        ConfigError, match=r"^Ray node .* has headway .*, this machine 99: install the same on all$"
    ):
        run_jobs(raises_at_two, None, [job(0)], where=ON_RAY)
