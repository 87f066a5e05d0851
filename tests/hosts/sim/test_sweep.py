"""A sweep of topologies: what is simulated, what is left out, and how it goes on after a stop."""

import json
import multiprocessing
from pathlib import Path

import pytest

import headway
from headway.core.errors import ConfigError
from headway.model.topology import Topology
from headway.report.metrics import Run

SMALL = {
    "workload": "azure-conv",
    "gpus": 64,
    "ep": [8, 32],
    "pd": ["1:1", "3:1"],
    "load": [0.4],
    "requests": 30,
    "workers": 1,
}


def small(**options) -> headway.SweepResult:
    return headway.sweep(**{**SMALL, **options})


def without_wall(result: headway.SweepResult) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in result.rows()]


def test_every_topology_that_fits_is_simulated_at_every_rate_with_every_seed():
    result = small(load=[0.3, 0.6], seeds=2, chunk=[2048, 4096], ep=[8])
    assert [(p.topology, p.cell.load, [run.seed for run in p.cell.runs]) for p in result.points] == [
        (Topology("h200", p, 8, d, 8, chunk), load, [0, 1])
        for p, d in ((4, 4), (6, 2))
        for chunk in (2048, 4096)
        for load in (0.3, 0.6)
    ]
    assert all(run.completed == 30 for run in result.runs())


def test_what_does_not_fit_is_told():
    result = small(system=["h100", "h200"], prefill_ep=[8], decode_ep=[32], pd=["1:1", "5:1"])
    assert [point.topology.name for point in result.points] == ["dsv3-h200-1xep8-1xep32-c4096"]
    assert [(r.topology.name, r.why[:40]) for r in result.refused] == [
        ("dsv3-h100-1xep8-1xep32-c4096", "pools[0] (prefill): cannot hold the mode"),
        ("dsv3-h100-5xep8-1xep32-c4096", "needs 72 GPUs, there are 64"),
        ("dsv3-h200-5xep8-1xep32-c4096", "needs 72 GPUs, there are 64"),
    ]


def test_a_rate_is_the_same_for_all_and_a_load_is_each_topologys_own():
    assert {run.rps for run in small(load=None, rps=[50.0]).runs()} == {50.0}
    assert len({run.rps for run in small(load=[0.4]).runs()}) == len(small(load=[0.4]).points)


def test_equal_seeds_give_equal_results_and_processes_do_not_matter():
    assert without_wall(small(seeds=2)) == without_wall(small(seeds=2, workers=2))


def test_it_is_the_simulation_that_compare_runs():
    topology = Topology("h200", 3, 8, 1, 32, 4096)
    (point,) = small(prefill_ep=[8], decode_ep=[32], pd=["3:1"]).points
    compared = headway.compare(
        workload="azure-conv",
        cluster=topology.cluster(),
        policies=["staggered"],
        load=[0.4],
        requests=30,
        workers=1,
    )
    assert point.topology == topology
    assert point.cell.runs[0].ttft_s == compared.runs[0].ttft_s


def test_the_targets_are_the_presets_unless_told():
    assert small(slo_ttft_s=0.001).runs()[0].slo_attainment == 0.0
    basis = small(slo_tpot_s=0.04).provenance
    assert (basis.slo_ttft_s, basis.slo_tpot_s) == (2.0, 0.04)


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(tmp_path: Path):
    whole = small(seeds=2)
    total = len(whole.runs())

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "sweep.jsonl"
    with pytest.raises(KeyboardInterrupt):
        small(seeds=2, out=out, progress=stop)
    assert len(out.read_text().splitlines()) == 3
    out.write_bytes(out.read_bytes()[:-100])  # the machine went down in mid-line
    seen: list[tuple[int, int]] = []
    resumed = small(seeds=2, out=out, resume=True, progress=lambda *at: seen.append(at))
    assert seen[0] == (2, total)
    assert without_wall(resumed) == without_wall(whole)
    assert len(out.read_text().splitlines()) == total
    assert without_wall(small(seeds=2, out=out, resume=True)) == without_wall(whole)


def test_a_sweep_on_file_can_be_widened(tmp_path: Path):
    out = tmp_path / "sweep.jsonl"
    small(out=out)
    seen: list[tuple[int, int]] = []
    wider = small(out=out, resume=True, seeds=2, progress=lambda *at: seen.append(at))
    assert seen[0] == (len(wider.points), 2 * len(wider.points))


@pytest.mark.parametrize(
    "change",
    [
        {"policies": ["least-tokens"]},
        {"batch": ["stall-free"]},
        {"load": [0.41]},
        {"seed": 1},
        {"requests": 31},
        {"workload": "azure-code"},
        {"arrivals": "gamma:2"},
        {"chunk": [2048]},
        {"slo_ttft_s": 1.0},
    ],
)
def test_whatever_a_result_depends_on_makes_it_another(tmp_path: Path, change: dict):
    one = {"prefill_ep": [8], "decode_ep": [32], "pd": ["3:1"], "out": tmp_path / "sweep.jsonl"}
    small(**one)
    seen: list[tuple[int, int]] = []
    small(**one, **change, resume=True, progress=lambda *at: seen.append(at))
    assert seen == [(0, 1), (1, 1)]


def test_another_version_runs_everything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = {"prefill_ep": [8], "decode_ep": [32], "pd": ["3:1"], "out": tmp_path / "sweep.jsonl"}
    small(**one)
    monkeypatch.setattr(headway, "__version__", "99")
    seen: list[tuple[int, int]] = []
    small(**one, resume=True, progress=lambda *at: seen.append(at))
    assert seen == [(0, 1), (1, 1)]


def test_a_trace_that_was_edited_is_another(tmp_path: Path):
    trace = tmp_path / "t.csv"
    one = {"prefill_ep": [8], "decode_ep": [32], "pd": ["3:1"], "out": tmp_path / "s.jsonl", "workload": None}
    rows = "timestamp,input_tokens,output_tokens\n0.0,200,5\n1.0,200,5\n2.0,200,{}\n"
    trace.write_text(rows.format(5))
    small(**one, trace=trace, requests=None)
    trace.write_text(rows.format(6))
    seen: list[tuple[int, int]] = []
    small(**one, trace=trace, requests=None, resume=True, progress=lambda *at: seen.append(at))
    assert seen == [(0, 1), (1, 1)]


def test_a_worker_killed_half_way_changes_nothing(tmp_path: Path):
    """From outside, whatever it is doing: between two results or in the middle of one."""
    options = {"seeds": 3, "requests": 150, "prefill_ep": [8], "decode_ep": [32], "load": [0.3, 0.6]}
    killed = []

    def kill(done: int, total: int) -> None:
        if done >= total // 2 and not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    result = small(**options, workers=2, progress=kill, out=tmp_path / "s.jsonl")
    assert killed and result.failed == []
    assert without_wall(result) == without_wall(small(**options))
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 12


class BrokenError(Exception):
    pass


def test_a_simulation_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from headway.hosts.sim import setup

    whole = setup.simulate

    def simulate(cluster, *arguments, **options):
        if "6xep8" in cluster.name:
            raise BrokenError("for the test")
        return whole(cluster, *arguments, **options)

    monkeypatch.setattr(setup, "simulate", simulate)
    result = small(ep=[8], out=tmp_path / "s.jsonl")
    assert [point.topology.prefill_instances for point in result.points] == [4]
    assert [(run.name, run.why) for run in result.failed] == [
        ("dsv3-h200-6xep8-2xep8-c4096 · staggered · vllm-v1 · load 0.4 · seed 0", "BrokenError: for the test")
    ]
    monkeypatch.setattr(setup, "simulate", whole)
    assert len(small(ep=[8], out=tmp_path / "s.jsonl", resume=True).points) == 2


def test_the_document_has_everything():
    result = small(pd=["3:1", "9:1"])
    document = json.loads(result.to_json())
    assert document["schema"] == "headway.sweep/1"
    assert len(document["points"]) == len(result.points)
    assert sum(point["front"] for point in document["points"]) == len(result.front())
    assert document["provenance"]["nominal_rps"] is None
    assert {refusal["why"] for refusal in document["refused"]} >= {"needs 104 GPUs, there are 64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pd": ["3"]}, "P:D ratio '3': write prefill and decode instances, such as 3:1"),
        ({"pd": ["3:1:1"]}, "P:D ratio '3:1:1'"),
        ({"pd": ["0:1"]}, "must be at least 1"),
        ({"pd": []}, "name at least one system, EP size, P:D ratio and chunk"),
        ({"system": ["h800"]}, "unknown system 'h800': did you mean 'h"),
        ({"gpus": 8}, "none of 8 topologies can be; dsv3-h200-1xep8-1xep8-c4096: needs 16 GPUs, there are 8"),
        ({"latency": "ttft"}, "unknown latency 'ttft': write one of ttft, tpot, e2e"),
        ({"attainment": 90.0}, "attainment must be between 0 and 1, got 90.0"),
        ({"policies": ["stagered"]}, "did you mean 'staggered'"),
        ({"load": [0.5], "rps": [3.0]}, "load or rps, not both"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"backend": "rey"}, "did you mean 'ray'"),
        ({"address": "h:1"}, "is for the backend ray"),
        ({"resume": True}, "resume needs the file to go on with"),
        ({"out": "results.csv"}, "results.csv: results are written to a file named .jsonl or .parquet"),
    ],
)
def test_bad_input_is_refused_before_any_simulation(
    options: dict, message: str, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a simulation was started")

    monkeypatch.setattr("headway.hosts.sim.setup.simulate", never)
    with pytest.raises(ConfigError) as caught:
        small(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "more"), [(headway.compare, {"load": [0.3]}), (headway.capacity, {"tolerance": 0.5})]
)
def test_compare_and_capacity_go_on_where_they_were(command, more: dict, tmp_path: Path):
    options = {"cluster": "llama8b-h100", "policies": ["round-robin"], "batch": ["vllm-v1"], "requests": 30}
    options |= {"workers": 1, "seeds": 2, "out": tmp_path / "r.jsonl"} | more
    first = command(**options)
    seen: list[tuple[int, int]] = []
    again = command(**options, resume=True, progress=lambda *at: seen.append(at))
    assert seen == []
    assert again.rows() == first.rows()


def test_passes_to_be_drawn_are_simulated_again(tmp_path: Path):
    options = {"cluster": "llama8b-h100", "policies": ["round-robin"], "batch": ["vllm-v1"], "requests": 30}
    options |= {"workers": 1, "load": [0.3, 0.7], "timeline": True, "out": tmp_path / "c.jsonl"}
    first = headway.compare(**options)
    again = headway.compare(**options, resume=True)
    assert again.timelines == first.timelines
    assert again.distributions == first.distributions
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 2


def test_a_run_has_no_field_that_a_file_would_lose():
    assert set(small(ep=[8], pd=["1:1"]).rows()[0]) >= {"gpus", "chunk_tokens", "ttft_s.p99"} | {
        name for name in Run.__dataclass_fields__ if not name.endswith(("_s", "_by_reason"))
    }
