"""PAB routing: the largest budget, counted down until the next report; none left means a bounded hold."""

from cluster_scripts import dispatches, host_of, snapshot

from headway.core.events import Finished
from headway.core.request import Slo
from headway.testing import arrived, pass_ended, up

SLO = Slo(ttft_s=2.0, tpot_s=0.05)


def host_with_budgets(*budgets, spec="pab:patience=0.25"):
    """One independent engine per budget, each with a request already, so that none is idle."""
    host = host_of(spec)
    names = [f"engine-{n}" for n in range(len(budgets))]
    host.run([(0.0, up(name)) for name in names])
    host.run([(0.1, arrived(f"old-{n}", at=0.1, prompt=10)) for n in range(len(budgets))])
    host.run([(0.2, report(name, 1, budget)) for name, budget in zip(names, budgets, strict=True)])
    assert {place for place, _ in host.dispatched.values()} == set(names)
    return host


def report(name, sequence, budget, acknowledged=1):
    return pass_ended(name, sequence, ran=(0,), pab_tokens=(budget,), acknowledged=acknowledged)


def came(request_id, at, prompt, slo=SLO):
    return at, arrived(request_id, at=at, prompt=prompt, slo=slo)


def new(host):
    return [d for d in dispatches(host) if not d[1].startswith("old")]


def whys(host):
    return [a.why for _, a in host.actions if not a.request_id.startswith("old")]


def test_the_rank_with_the_largest_budget():
    host = host_with_budgets(500, 900, 700)
    host.run([came("r1", 1.0, 100)])
    assert new(host) == [(1.0, "r1", "engine-1", 0)]


def test_the_budget_is_counted_down_until_the_next_report():
    host = host_with_budgets(500, 900)
    host.run([came("r1", 1.0, 500), came("r2", 1.1, 300), came("r3", 1.2, 300)])  # 500:400, 200:400, 200:100
    assert [place for _, _, place, _ in new(host)] == ["engine-1", "engine-0", "engine-1"]


def test_a_report_gives_the_budget_anew():
    host = host_with_budgets(500, 900)
    host.run([came("r1", 1.0, 500), (1.1, report("engine-1", 2, 800, acknowledged=2)), came("r2", 1.2, 300)])
    assert [place for _, _, place, _ in new(host)] == ["engine-1", "engine-1"]


def test_a_report_that_does_not_know_the_dispatch_yet_gives_only_the_rest():
    host = host_with_budgets(500, 900)
    host.run([came("r1", 1.0, 500), (1.1, report("engine-1", 2, 900, acknowledged=1)), came("r2", 1.2, 300)])
    assert [place for _, _, place, _ in new(host)] == ["engine-1", "engine-0"]


def test_without_budget_a_request_is_held_for_a_share_of_its_ttft_target():
    host = host_with_budgets(50, 80)
    host.run([came("r1", 1.0, 100)], until=1.4)
    assert [(h.request_id, h.why) for h in host.policy.held()] == [
        ("r1", "no rank has admission budget left")
    ]
    assert host.policy.wake_at() == 1.5  # a quarter of 2 s
    host.wait(9.0)
    assert new(host) == [(1.5, "r1", "engine-1", 0)]
    assert whys(host) == ["patience-over"]


def test_a_report_with_room_ends_the_hold():
    host = host_with_budgets(50, 80)
    host.run([came("r1", 1.0, 100), (1.2, report("engine-0", 2, 1000))])
    assert new(host) == [(1.2, "r1", "engine-0", 0)]
    assert whys(host) == ["budget"]


def test_a_late_timer_dispatches_late_and_once():
    host = host_with_budgets(50)
    host.lateness_s = 3.0
    host.run([came("r1", 1.0, 100)], until=9.0)
    assert new(host) == [(4.5, "r1", "engine-0", 0)]


def test_the_hold_is_bounded_by_max_hold_too():
    host = host_with_budgets(50, spec="pab:patience=1.0:max_hold_s=0.5")
    host.run([came("r1", 1.0, 100)], until=9.0)
    assert [(at, type(a).__name__) for at, a in host.actions[1:]] == [(1.5, "Reject")]


def test_an_idle_rank_takes_any_prompt():
    host = host_with_budgets(50)
    host.run([(0.9, Finished("old-0", 1)), came("r1", 1.0, 100)])
    assert new(host) == [(1.0, "r1", "engine-0", 0)]


def test_ranks_of_one_engine_are_told_apart():
    host = host_of("pab")
    host.run([(0.0, up("engine-0", ranks=3)), (0.1, snapshot("engine-0", 1, pab_tokens=(10, 30, 20)))])
    host.run([came("r1", 1.0, 5)])
    assert new(host) == [(1.0, "r1", "engine-0", 1)]


def test_where_no_engine_reports_a_budget_it_is_least_tokens():
    host = host_of("pab")
    host.run(
        [(0.0, up("engine-0", ranks=2)), came("r1", 1.0, 500), came("r2", 1.1, 100), came("r3", 1.2, 100)]
    )
    assert [rank for *_, rank in new(host)] == [0, 1, 1]
