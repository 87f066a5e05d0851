"""SBS prefill, rule by rule (the rules are in the module's docstring).

T̂ is 1 s, L_net 0, and an idle instance has no lead unless said.
"""

import pytest
from cluster_scripts import dispatches, host_of, order, rejects, snapshot, when

from headway.core.actions import Poll, Recall, Reject
from headway.core.events import (
    Arrived,
    Cancelled,
    Failed,
    Finished,
    InstanceDown,
    InstanceDraining,
    PassStarted,
    PrefillDone,
    Role,
)
from headway.core.request import Request, Slo
from headway.testing import arrived, pass_ended, up

PATIENT = Slo(ttft_s=100.0, tpot_s=0.05)


def staggered(
    instances=1,
    *,
    ranks=1,
    chunk=1000,
    pass_s=1.0,
    name="prefill",
    policy="staggered",
    role=Role.PREFILL,
    **settings,
):
    """Idle instances that have told of one pass each, of `pass_s` seconds."""
    chosen = {"network_s": 0.0, "spacing": 0.0, "saturation_passes": 1000.0}
    chosen |= {"lead_idle": 0.0} | settings
    host = host_of(":".join([policy, *(f"{key}={value}" for key, value in chosen.items())]))
    names = [f"{name}-{n}" for n in range(instances)]
    host.run([(0.0, up(instance, ranks=ranks, chunk=chunk, role=role)) for instance in names])
    nothing = (0,) * (ranks - 1)
    host.run([(1.0, pass_ended(n, 1, ran=(1, *nothing), acknowledged=0, duration=pass_s)) for n in names])
    return host


def came(request_id, at, prompt=100, slo=PATIENT):
    return at, arrived(request_id, at=at, prompt=prompt, slo=slo)


def ended(at, sequence, acknowledged, *, name="prefill-0", queued=(0,), ran=(1,), epoch=0):
    report = pass_ended(
        name, sequence, ran=ran, queued=queued, acknowledged=acknowledged, duration=1.0, epoch=epoch
    )
    return at, report


# Rule 1: idle bypass.


def test_rule_1_an_idle_instance_has_its_slot_now():
    host = staggered()
    host.run([came("r1", 10.0)])
    assert dispatches(host) == [(10.0, "r1", "prefill-0", 0)]


def test_rule_1_before_anything_was_reported_too():
    host = host_of("staggered")
    host.run([(0.0, up("prefill-0")), came("r1", 10.0)])
    assert when(host) == {"r1": 10.0}


def test_rule_1_of_several_idle_instances_the_one_chosen_longest_ago():
    host = staggered(3)
    host.run([came("r1", 10.0), came("r2", 10.1), came("r3", 10.2)])
    assert [instance for _, _, instance, _ in dispatches(host)] == ["prefill-0", "prefill-1", "prefill-2"]


def test_rule_1_with_every_instance_busy_a_request_is_held_and_says_why():
    host = staggered()
    host.run([came("r1", 10.0), came("r2", 10.1)])
    assert [(h.request_id, h.since_s, h.why) for h in host.policy.held()] == [("r2", 10.1, "no slot is open")]


# Rule 2: pass end.


def test_rule_2_a_busy_instance_has_its_slot_when_its_pass_ends():
    host = staggered()
    host.run([came("r1", 10.0), came("r2", 10.1), ended(11.3, 2, acknowledged=1)])
    assert when(host) == {"r1": 10.0, "r2": 11.3}


def test_rule_2_all_that_is_held_leaves_as_one_even_batch():
    host = staggered(ranks=2)
    held = [came("a", 10.1, 300), came("b", 10.2, 600), came("c", 10.3, 400), came("d", 10.4, 500)]
    host.run([came("r1", 10.0), *held, ended(11.0, 2, 1, queued=(0, 0), ran=(100, 0))])
    assert dispatches(host)[1:] == [
        (11.0, "b", "prefill-0", 0),
        (11.0, "d", "prefill-0", 1),
        (11.0, "c", "prefill-0", 1),
        (11.0, "a", "prefill-0", 0),
    ]


def test_lone_requests_do_not_all_decode_on_one_rank():
    host = staggered(ranks=2, role=Role.AGGREGATED)
    nothing = {"queued": (0, 0), "ran": (100, 0)}
    host.run([came("r1", 10.0), ended(11.0, 2, 1, **nothing), (11.0, PrefillDone("r1")), came("r2", 12.0)])
    assert [rank for *_, rank in dispatches(host)] == [0, 1]


def test_rule_2_a_report_written_before_the_dispatch_opens_no_slot():
    """It says that nothing is queued, and does not know of r1."""
    host = staggered()
    host.run([came("r1", 10.0), came("r2", 10.1), ended(10.2, 2, acknowledged=0)])
    assert when(host) == {"r1": 10.0}


def test_rule_2_neither_does_a_report_of_an_old_epoch_or_one_that_was_overtaken():
    host = staggered()
    host.run([(5.0, up("prefill-0", epoch=1)), came("r1", 10.0), came("r2", 10.1)])
    host.run([ended(10.5, 9, acknowledged=1, epoch=0)])
    host.run([ended(10.6, 5, acknowledged=1, queued=(50,), epoch=1), ended(10.7, 4, acknowledged=1, epoch=1)])
    assert when(host) == {"r1": 10.0}


def test_rule_2_a_start_that_was_overtaken_by_its_end_makes_nobody_busy():
    host = staggered()
    host.run([ended(9.0, 3, acknowledged=0), (9.1, PassStarted("prefill-0", 0, 2)), came("r1", 10.0)])
    assert when(host) == {"r1": 10.0}


def test_rule_2_a_reported_start_makes_busy():
    host = staggered()
    host.run([(9.5, PassStarted("prefill-0", 0, 2)), came("r1", 10.0), ended(10.5, 3, acknowledged=0)])
    assert when(host) == {"r1": 10.5}


# Rule 3: lead, and prompts that take several passes.


def test_rule_3_an_instance_whose_queue_outlasts_its_pass_has_its_slot_a_little_before_the_end():
    """r1 runs over three passes on rank 0; rank 1 is free for the second, and gets r2 before that begins."""
    host = staggered(ranks=2, lead=0.25)
    host.run([came("r1", 10.0, 2500), came("r2", 10.1)], until=10.9)
    assert dispatches(host)[1:] == [(10.75, "r2", "prefill-0", 1)]


def test_rule_3_a_prompt_longer_than_a_chunk_reserves_the_following_passes_of_its_rank():
    host = staggered(lead=0.25)
    host.run([came("r1", 10.0, 2500), came("r2", 10.1, 500)])
    host.run([ended(11.0, 2, 1, queued=(1500,), ran=(1000,))], until=11.9)  # 500 are left for the third pass
    assert when(host) == {"r1": 10.0, "r2": 11.75}


def test_rule_3_and_what_the_last_of_them_leaves_is_given_away_to_the_token():
    host = staggered(lead=0.25)
    host.run([came("r1", 10.0, 2500), came("r2", 10.1, 501)])
    host.run([ended(11.0, 2, 1, queued=(1500,), ran=(1000,))], until=11.9)
    assert when(host) == {"r1": 10.0}
    assert [h.why for h in host.policy.held()] == ["every rank is full"]


def test_rule_3_an_instance_that_will_be_idle_has_its_batch_before_its_pass_ends():
    """What is sent when its report comes may be too late for the pass that begins with the first of it."""
    host = staggered(lead_idle=0.25)
    host.run([came("r1", 10.0), came("r2", 10.1), came("r3", 10.8)], until=10.9)
    assert when(host) == {"r1": 10.0, "r2": 10.75, "r3": 10.8}


def test_rule_3_and_no_more_than_one_pass_of_it():
    host = staggered(lead_idle=0.25)
    host.run([came("r1", 10.0), came("r2", 10.1, 600), came("r3", 10.2, 600)], until=10.9)
    assert when(host) == {"r1": 10.0, "r2": 10.75}


def test_rule_3_where_the_pass_ends_sooner_than_was_thought_its_report_opens_the_slot():
    host = staggered(lead_idle=0.25)
    host.run([came("r1", 10.0), came("r2", 10.1), ended(10.5, 2, acknowledged=1)])
    assert when(host) == {"r1": 10.0, "r2": 10.5}


def test_rule_3_before_any_pass_was_seen_only_a_report_tells():
    host = host_of("staggered")
    host.run([(0.0, up("prefill-0")), came("r1", 10.0), came("r2", 10.1)], until=11.0)
    assert when(host) == {"r1": 10.0}


def aggregated(**settings):
    """An idle instance that decodes too, beside one that is full for long: the only one has another rule."""
    host = staggered(2, role=Role.AGGREGATED, watchdog_floor_s=100.0, **settings)
    full = pass_ended("prefill-1", 2, ran=(0,), queued=(100_000,), running=(1,), acknowledged=0, duration=1.0)
    host.run([(9.0, full)])
    return host


def test_rule_3_an_instance_that_decodes_too_has_its_slot_before_its_pass_ends():
    """Its decodes begin another pass at once. r1 takes effect at 10.05, its pass lasts 1 s."""
    host = aggregated(lead_decoding=0.25, network_s=0.05)
    host.run([came("r1", 10.0), came("r2", 10.1)], until=11.0)
    assert when(host)["r2"] == pytest.approx(10.05 + 1.0 - 0.25 - 0.05)


def test_rule_3_and_after_that_slot_it_is_open_until_the_pass_ends():
    host = aggregated(lead_decoding=0.25)
    host.run([came("r1", 10.0), came("r2", 10.8), came("r3", 11.3)], until=12.0)
    assert when(host) == {"r1": 10.0, "r2": 10.8, "r3": 11.3}


def test_rule_3_the_way_there_and_back_is_learned_from_batches_for_an_idle_instance():
    """r1 and the report of its pass of 1 s took 0.2 s more than the pass."""
    host = aggregated(lead_decoding=0.0)
    host.run(
        [came("r1", 10.0), ended(11.2, 2, acknowledged=1), came("r2", 20.0), came("r3", 20.1)], until=21.0
    )
    assert when(host)["r3"] == pytest.approx(21.0 - 0.2)


@pytest.mark.parametrize(
    ("at", "acknowledged"),
    [(10.5, 1), (11.2, 0)],
    ids=["it began before the batch came", "it did not have the batch"],
)
def test_rule_3_but_not_from_a_pass_that_was_another_ones(at, acknowledged):
    host = aggregated(lead_decoding=0.0)
    host.run([came("r1", 10.0), ended(at, 2, acknowledged), (12.0, Finished("r1", 1))])
    host.run([came("r2", 20.0), came("r3", 20.1)], until=22.0)
    assert when(host)["r3"] == pytest.approx(21.0)


def decoding(at, sequence, acknowledged, *, queued=0, ran=0):
    """A pass of an instance that decodes."""
    told = {"ran": (ran,), "queued": (queued,), "running": (1,)}
    return at, pass_ended("prefill-0", sequence, acknowledged=acknowledged, duration=1.0, **told)


def test_rule_3_what_was_sent_while_a_pass_ran_is_in_the_next_though_nothing_acknowledged_it():
    """An engine takes in what came when it forms its next step, after it told of the one before."""
    host = aggregated(lead_decoding=0.25)
    host.run([decoding(9.5, 2, 0), came("r1", 10.4), decoding(10.5, 3, 0), came("r2", 10.6)], until=12.0)
    assert when(host) == {"r1": 10.4, "r2": 11.25}


def test_rule_3_a_pass_with_a_prompt_is_waited_for():
    host = aggregated(lead_decoding=0.25)
    host.run([decoding(9.5, 2, 0), came("r1", 10.0), decoding(10.5, 3, 1, queued=100)])
    host.run([came("r2", 10.6)], until=12.0)
    assert when(host) == {"r1": 10.0, "r2": 11.25}


def test_rule_3_with_nothing_to_decode_its_pass_end_is_waited_for_as_ever():
    host = aggregated(lead_decoding=0.25)
    nothing_runs = pass_ended("prefill-0", 2, ran=(1,), running=(0,), acknowledged=0, duration=1.0)
    host.run([(9.5, nothing_runs), came("r1", 10.0), came("r2", 10.1)], until=12.0)
    assert when(host) == {"r1": 10.0}


def test_rule_3_an_engine_that_does_not_tell_its_queue_is_believed_to_have_what_was_sent():
    host = aggregated(lead_decoding=0.25)
    scraped = snapshot("prefill-0", 2, busy=True, running=(1,))
    host.run([(9.5, scraped), came("r1", 10.0), came("r2", 10.1)], until=10.9)
    assert when(host) == {"r1": 10.0, "r2": 10.75}


def test_rule_3_the_only_instance_that_decodes_too_has_its_next_pass_there_and_no_more():
    host = staggered(role=Role.AGGREGATED, chunk=1000)
    host.run([decoding(9.5, 2, 0), came("r1", 10.0, 900), decoding(10.5, 3, 1, queued=900)])
    host.run([came("r2", 10.6, 900), came("r3", 10.7, 900)])
    host.run([decoding(11.5, 4, 2, queued=900, ran=900)], until=12.0)
    assert when(host) == {"r1": 10.0, "r2": 10.6, "r3": 11.5}


# Rule 4: spacing.


def test_rule_4_slots_are_apart_by_pass_time_over_instances():
    host = staggered(2, spacing=1.0)
    host.run([came("r1", 10.0), came("r2", 10.1)], until=12.0)
    assert dispatches(host) == [(10.0, "r1", "prefill-0", 0), (10.5, "r2", "prefill-1", 0)]


@pytest.mark.parametrize(
    ("instances", "network_s", "spacing", "gap_s"),
    [(4, 0.0, 1.0, 0.25), (2, 0.1, 1.0, 0.55), (2, 0.0, 0.5, 0.25)],
)
def test_rule_4_the_gap_is_spacing_times_pass_time_and_network_over_instances(
    instances, network_s, spacing, gap_s
):
    host = staggered(instances, spacing=spacing, network_s=network_s)
    host.run([came("r1", 10.0), came("r2", 10.01)], until=12.0)
    assert when(host)["r2"] == pytest.approx(10.0 + gap_s)


def test_rule_4_an_instance_that_drains_does_not_count():
    host = staggered(3, spacing=1.0)
    host.run([(5.0, InstanceDraining("prefill-2")), came("r1", 10.0), came("r2", 10.1)], until=12.0)
    assert when(host)["r2"] == 10.5


def test_rule_4_a_request_that_comes_after_the_gap_does_not_wait():
    host = staggered(2, spacing=1.0)
    host.run([came("r1", 10.0), came("r2", 10.7)])
    assert when(host)["r2"] == 10.7


def test_rule_4_a_batch_that_fills_the_instance_does_not_wait():
    host = staggered(2, spacing=1.0)
    host.run([came("r1", 10.0), came("r2", 10.1, 600), came("r3", 10.2, 400)])
    assert when(host) == {"r1": 10.0, "r2": 10.2, "r3": 10.2}


def test_rule_4_without_spacing_an_idle_instance_is_used_at_once():
    host = staggered(2, spacing=0.0)
    host.run([came("r1", 10.0), came("r2", 10.1)])
    assert when(host)["r2"] == 10.1


def test_rule_4_a_late_host_is_late_and_no_more():
    host = staggered(2, spacing=1.0)
    host.lateness_s = 0.3
    host.run([came("r1", 10.0), came("r2", 10.1)], until=12.0)
    assert when(host)["r2"] == 10.8


# Rule 5: deadline.


def test_rule_5_a_batch_leaves_while_its_tightest_request_can_still_make_it():
    """Due at 11.3, less a pass of 1 s: it leaves at 10.3 instead of 10.5, and takes the others along."""
    host = staggered(2, spacing=1.0)
    host.run([came("r1", 10.0), came("r2", 10.05), came("r3", 10.1, slo=Slo(ttft_s=1.2))], until=12.0)
    assert when(host) == {"r1": 10.0, "r2": pytest.approx(10.3), "r3": pytest.approx(10.3)}


def test_rule_5_what_is_late_already_does_not_wait():
    host = staggered(2, spacing=1.0)
    host.run([came("r1", 10.0), came("r2", 10.1, slo=Slo(ttft_s=0.5))])
    assert when(host)["r2"] == 10.1


# Rule 6: saturation.


def test_rule_6_a_backlog_of_a_pass_fills_every_instance_one_pass_deep_and_no_more():
    host = staggered(saturation_passes=1.0)
    host.run([came("r1", 10.0, 1000), came("r2", 10.1, 600)])
    assert order(host) == ["r1"]
    host.run([came("r3", 10.2, 600)])  # 1200 held: r3 runs over into the pass after the next
    assert when(host) == {"r1": 10.0, "r2": 10.2, "r3": 10.2}
    host.run([came("r4", 10.3, 1000), came("r5", 10.4, 1000)], until=10.5)
    assert [h.request_id for h in host.policy.held()] == ["r4", "r5"]


@pytest.mark.parametrize("end", [Cancelled("r1"), Failed("r1", "gone", False), Finished("r1", 1)])
def test_rule_1_an_instance_that_lost_its_last_prompt_is_idle_though_no_report_says_so(end):
    host = staggered()
    host.run([came("r1", 10.0, 800), (10.1, end), came("r2", 10.2)], until=10.3)
    assert when(host) == {"r1": 10.0, "r2": 10.2}


# Rule 7: watchdog.


def test_rule_7_poll_suspect_recall_elsewhere_and_back_by_a_snapshot():
    host = staggered(2, watchdog_floor_s=5.0, watchdog_factor=1.0)
    host.run([came("r1", 10.0)], until=14.9)
    assert len(host.actions) == 1
    host.wait(15.0)
    assert host.actions[1:] == [(15.0, Poll("prefill-0"))]
    host.wait(20.0)
    assert [(at, type(a).__name__, a.instance) for at, a in host.actions[2:]] == [
        (20.0, "Recall", "prefill-0"),
        (20.0, "Dispatch", "prefill-1"),
    ]
    host.run([came("r2", 20.1)])
    assert [h.request_id for h in host.policy.held()] == ["r2"]  # prefill-0 gets nothing more
    host.run([(21.0, snapshot("prefill-0", 2, acknowledged=1, queued_tokens=(0,)))])
    assert dispatches(host)[-1] == (21.0, "r2", "prefill-0", 0)


def test_rule_7_patience_is_a_number_of_pass_times():
    host = staggered(watchdog_floor_s=0.5, watchdog_factor=8.0)
    host.run([came("r1", 10.0)], until=18.2)
    assert host.actions[1:] == [(18.0, Poll("prefill-0"))]


def test_rule_7_a_report_in_time_is_no_silence():
    host = staggered(watchdog_floor_s=5.0)
    host.run([came("r1", 10.0), ended(11.0, 2, 1)], until=60.0)
    assert len(host.actions) == 1


def test_rule_7_an_answer_to_the_poll_clears_the_suspicion():
    host = staggered(watchdog_floor_s=5.0, watchdog_factor=1.0)
    host.run(
        [came("r1", 10.0), (15.5, snapshot("prefill-0", 2, acknowledged=1, busy=True, queued_tokens=(100,)))]
    )
    host.wait(20.4)
    assert [type(a) for _, a in host.actions[1:]] == [Poll]
    host.wait(20.5)
    assert [type(a) for _, a in host.actions[1:]] == [Poll, Poll]  # it is asked again, not suspected


def test_rule_7_a_lost_report_costs_one_poll():
    host = staggered(watchdog_floor_s=5.0, watchdog_factor=1.0)
    host.run([came("r1", 10.0), came("r2", 10.1)], until=15.0)
    host.run([(15.1, snapshot("prefill-0", 3, acknowledged=1, queued_tokens=(0,)))])
    assert dispatches(host)[-1] == (15.1, "r2", "prefill-0", 0)


def test_rule_7_what_has_its_first_token_is_not_recalled():
    host = staggered(name="engine", watchdog_floor_s=5.0, watchdog_factor=1.0)
    host.run([came("r1", 10.0, 600), (10.5, PrefillDone("r1")), ended(10.6, 2, 1, name="engine-0")])
    host.run([came("r2", 10.7)], until=30.0)
    assert [a.request_id for _, a in host.actions if isinstance(a, Recall)] == ["r2"]


def test_rule_7_the_last_instance_recalls_in_order_and_its_requests_go_first_when_it_is_back():
    host = staggered(watchdog_floor_s=5.0, watchdog_factor=1.0)
    host.run([came("r0", 10.0), came("a", 10.1, 300), came("b", 10.2, 400), (11.0, PrefillDone("r0"))])
    host.run([ended(11.0, 2, 1)], until=21.0)
    assert [h.request_id for h in host.policy.held()] == ["b", "a"]
    host.run([came("new", 22.0, 900), (23.0, up("prefill-0", epoch=1))])
    assert order(host)[-2:] == ["b", "a"]


def test_rule_7_a_late_report_of_a_suspect_asks_for_a_snapshot():
    host = staggered(watchdog_floor_s=5.0, watchdog_factor=1.0)
    host.run([came("r1", 10.0)], until=25.0)
    host.run([ended(26.0, 2, 1)])
    assert host.actions[-1] == (26.0, Poll("prefill-0"))
    assert [h.request_id for h in host.policy.held()] == ["r1"]
    host.run([(26.1, snapshot("prefill-0", 3, acknowledged=1, queued_tokens=(0,)))])
    assert dispatches(host)[-1] == (26.1, "r1", "prefill-0", 0)


def test_rule_7_announced_again_a_suspect_is_idle():
    host = staggered(watchdog_floor_s=5.0, watchdog_factor=1.0)
    host.run([came("r1", 10.0)], until=25.0)
    host.run([(26.0, up("prefill-0"))])
    assert dispatches(host)[-1] == (26.0, "r1", "prefill-0", 0)


# The order within a batch.


def test_carried_over_requests_go_before_new_ones_oldest_first():
    host = staggered()
    host.run(
        [came("r1", 10.0), came("long", 10.1, 900), came("left", 10.2, 800), ended(11.0, 2, 1, ran=(100,))]
    )
    assert order(host) == ["r1", "long"]
    host.run([came("new", 11.1, 950), ended(12.0, 3, 2, ran=(900,))])
    assert order(host) == ["r1", "long", "left"]


def test_a_prefix_goes_where_it_was_computed():
    host = staggered(ranks=2)
    prefix = {"prefix": (1, 2), "prefix_block_tokens": 256}
    host.run([came("r0", 10.0, 700), (10.1, Arrived(Request("a", 10.1, 600, PATIENT, **prefix)))])
    host.run([came("b", 10.2, 700), ended(11.0, 2, 1, queued=(0, 0), ran=(700, 0))])
    host.run(
        [
            (11.1, Arrived(Request("c", 11.1, 600, PATIENT, **prefix))),
            ended(12.0, 3, 3, queued=(0, 0), ran=(700, 600)),
        ]
    )
    assert host.dispatched["a"] == host.dispatched["c"] == ("prefill-0", 1)


def test_a_restart_forgets_prefixes():
    host = staggered(ranks=2)
    prefix = {"prefix": (1, 2), "prefix_block_tokens": 256}
    host.run([came("r0", 10.0, 700), (10.1, Arrived(Request("a", 10.1, 600, PATIENT, **prefix)))])
    host.run([came("b", 10.2, 700), ended(11.0, 2, 1, queued=(0, 0), ran=(700, 0))])
    host.run([(11.5, InstanceDown("prefill-0")), (12.0, up("prefill-0", ranks=2, epoch=1))])
    host.run([(12.1, Arrived(Request("c", 12.1, 600, PATIENT, **prefix)))])
    assert host.dispatched["c"] == ("prefill-0", 0)


# Flow control.


def test_a_full_backlog_refuses_new_requests_and_says_when_to_come_back():
    host = staggered(max_backlog_passes=2.0)
    host.run([came(f"r{n}", 10.0 + n / 10, 1000) for n in range(4)])
    [(at, reject)] = [(at, a) for at, a in host.actions if isinstance(a, Reject)]
    assert (at, reject.request_id, reject.why) == (10.3, "r3", "backlog-full")
    assert reject.retry_after_s >= 1.0


def test_a_hold_is_bounded():
    host = staggered(max_hold_s=3.0)
    host.run([came("r1", 10.0), came("r2", 10.5)], until=13.6)
    assert rejects(host) == [(13.5, "r2", "held-too-long")]


def test_a_held_request_that_is_cancelled_is_forgotten():
    host = staggered()
    host.run([came("r1", 10.0), came("r2", 10.1), (10.2, Cancelled("r2")), ended(11.0, 2, 1)])
    assert order(host) == ["r1"]


# Instances come and go.


def test_a_draining_instance_gets_nothing_more():
    host = staggered(2)
    host.run(
        [
            (5.0, InstanceDraining("prefill-0")),
            came("r1", 10.0),
            came("r2", 10.1),
            ended(11.0, 2, 1, name="prefill-1"),
        ]
    )
    assert {instance for _, _, instance, _ in dispatches(host)} == {"prefill-1"}


def test_what_an_instance_took_down_with_it_goes_first():
    host = staggered()
    host.run([came("r1", 10.0, 10), came("r2", 10.1, 900), (11.0, InstanceDown("prefill-0"))])
    host.run([(11.1, Failed("r1", "instance-down", True)), (12.0, up("prefill-0", epoch=1))])
    assert [(at, name) for at, name, *_ in dispatches(host)] == [(10.0, "r1"), (12.0, "r1"), (12.0, "r2")]


def test_what_an_instance_took_down_with_it_goes_elsewhere_at_once():
    host = staggered(2)
    host.run(
        [came("r1", 10.0), (11.0, InstanceDown("prefill-0")), (11.0, Failed("r1", "instance-down", True))]
    )
    assert dispatches(host)[-1] == (11.0, "r1", "prefill-1", 0)


def test_a_restart_without_a_goodbye_is_a_new_and_idle_instance():
    host = staggered()
    host.run([came("r1", 10.0), came("r2", 10.1), (11.0, up("prefill-0", epoch=1))])
    assert dispatches(host)[-1] == (11.0, "r2", "prefill-0", 0)
    host.run([(11.0, Failed("r1", "restarted", True)), ended(12.0, 1, 2, epoch=1)])
    assert dispatches(host)[-1] == (12.0, "r1", "prefill-0", 0)


def test_rule_3_a_snapshot_nobody_asked_for_does_not_move_the_end_of_the_pass() -> None:
    host = staggered(chunk=1000, lead=0.1)
    in_mid_pass = snapshot("prefill-0", 2, acknowledged=1, busy=True, queued_tokens=(1800,))
    host.run([came("long", 2.0, prompt=1800), came("r2", 2.5), (2.6, in_mid_pass)], until=3.0)
    assert when(host)["r2"] == pytest.approx(2.9)
