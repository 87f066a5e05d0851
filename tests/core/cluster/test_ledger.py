"""The virtual state: load is the last report plus every dispatch it does not account for."""

import pytest
from cluster_scripts import snapshot

from headway.core.cluster.ledger import Ledger
from headway.core.errors import InvariantError
from headway.testing import pass_ended, request, up


def ledger_of(*infos):
    ledger = Ledger()
    for info in infos:
        ledger.up(info)
    return ledger


def place(ledger, request_id, prompt, instance="prefill-0", rank=0, at=0.0):
    return ledger.place(
        request(request_id, prompt=prompt), ledger.instances[instance].ranks[rank], at, "test"
    )


def queued(ledger, instance="prefill-0"):
    return [rank.queued_tokens for rank in ledger.instances[instance].ranks]


# Reserved at decision.


def test_a_dispatch_counts_at_once():
    ledger = ledger_of(up("prefill-0", ranks=2))
    place(ledger, "r1", 300, rank=1)
    assert queued(ledger) == [0, 300]


def test_dispatches_are_numbered_from_1_for_each_instance():
    ledger = ledger_of(up("prefill-0", ranks=2), up("prefill-1"))
    assert place(ledger, "r1", 1, rank=0).number == 1
    assert place(ledger, "r2", 1, rank=1).number == 2
    assert place(ledger, "r3", 1, "prefill-1").number == 1


def test_no_request_is_placed_twice():
    ledger = ledger_of(up("prefill-0", ranks=2))
    place(ledger, "r1", 300)
    with pytest.raises(InvariantError, match=r"^request r1 dispatched twice$"):
        place(ledger, "r1", 300, rank=1)


# Reports.


def test_a_report_replaces_what_it_acknowledges():
    ledger = ledger_of(up("prefill-0", ranks=2))
    place(ledger, "r1", 300)
    assert ledger.report(pass_ended("prefill-0", 1, ran=(200, 0), queued=(100, 0), acknowledged=1))
    assert queued(ledger) == [100, 0]


def test_a_late_report_does_not_erase_what_was_dispatched_after_it():
    ledger = ledger_of(up("prefill-0"))
    place(ledger, "r1", 300)
    place(ledger, "r2", 500)  # on its way while the engine writes its report
    ledger.report(pass_ended("prefill-0", 1, ran=(300,), acknowledged=1))
    assert queued(ledger) == [500]


def test_a_reordered_report_is_ignored():
    ledger = ledger_of(up("prefill-0"))
    place(ledger, "r1", 300)
    assert ledger.report(pass_ended("prefill-0", 2, ran=(300,), queued=(0,), acknowledged=1))
    assert not ledger.report(pass_ended("prefill-0", 1, ran=(0,), queued=(300,), acknowledged=1))
    assert queued(ledger) == [0]


def test_a_repeated_report_is_ignored():
    ledger = ledger_of(up("prefill-0"))
    report = pass_ended("prefill-0", 1, ran=(0,), queued=(7,), acknowledged=0)
    assert ledger.report(report)
    assert not ledger.report(report)


def test_a_report_of_an_old_epoch_is_ignored():
    ledger = ledger_of(up("prefill-0", epoch=2))
    place(ledger, "r1", 300)
    assert not ledger.report(pass_ended("prefill-0", 99, ran=(0,), acknowledged=1, epoch=1))
    assert queued(ledger) == [300]


def test_a_new_epoch_counts_its_reports_anew():
    ledger = ledger_of(up("prefill-0"))
    ledger.report(pass_ended("prefill-0", 50, ran=(0,), queued=(900,), acknowledged=0))
    ledger.up(up("prefill-0", epoch=1))
    assert queued(ledger) == [0]
    assert ledger.report(pass_ended("prefill-0", 1, ran=(0,), queued=(10,), acknowledged=0, epoch=1))
    assert queued(ledger) == [10]


def test_a_report_of_nobody_is_ignored():
    assert not ledger_of().report(pass_ended("prefill-9", 1, ran=(0,), acknowledged=0))


@pytest.mark.parametrize(
    "report",
    [
        pass_ended("prefill-0", 1, ran=(0,), acknowledged=0, first_rank=2),
        pass_ended("prefill-0", 1, ran=(0, 0), acknowledged=0, first_rank=1),
        pass_ended("prefill-0", 1, ran=(0, 0), queued=(5,), acknowledged=0),
        pass_ended("prefill-0", 1, ran=(0, 0, 0), acknowledged=0),
    ],
)
def test_a_report_of_the_wrong_shape_is_ignored(report):
    ledger = ledger_of(up("prefill-0", ranks=2))
    assert not ledger.report(report)
    assert queued(ledger) == [0, 0]


def test_independent_ranks_report_one_by_one():
    ledger = ledger_of(up("engine-0", ranks=2, lockstep=False))
    place(ledger, "r1", 100, "engine-0", 0)
    place(ledger, "r2", 200, "engine-0", 1)
    ledger.report(pass_ended("engine-0", 5, ran=(200,), acknowledged=2, first_rank=1))
    assert queued(ledger, "engine-0") == [100, 0]
    assert ledger.report(pass_ended("engine-0", 4, ran=(50,), queued=(50,), acknowledged=2, first_rank=0))
    assert queued(ledger, "engine-0") == [50, 0]


def test_an_acknowledgement_lost_is_made_good_by_the_next():
    ledger = ledger_of(up("prefill-0"))
    for n in range(1, 4):
        place(ledger, f"r{n}", 100)
    ledger.report(pass_ended("prefill-0", 3, ran=(100,), queued=(100,), acknowledged=2))  # 1 and 2 were lost
    assert queued(ledger) == [200]


def test_a_snapshot_is_a_report():
    ledger = ledger_of(up("prefill-0"))
    place(ledger, "r1", 100)
    assert ledger.report(snapshot("prefill-0", 1, acknowledged=1, queued_tokens=(40,)))
    assert queued(ledger) == [40]


def test_one_value_is_enough_to_tell_how_many_ranks_report():
    ledger = ledger_of(up("engine-0", ranks=2))
    assert ledger.report(snapshot("engine-0", 1, pab_tokens=(100, 200)))
    assert [rank.pab_tokens for rank in ledger.ranks] == [100, 200]


# Unknown is not zero: the ledger's own accounting.


def test_without_reported_queues_the_ledger_counts_prompts_until_their_prefill_is_done():
    ledger = ledger_of(up("engine-0"))
    place(ledger, "r1", 300, "engine-0")
    place(ledger, "r2", 200, "engine-0")
    ledger.report(snapshot("engine-0", 1, acknowledged=2, running=(1,)))
    assert queued(ledger, "engine-0") == [500]
    ledger.prefilled("r1")
    ledger.prefilled("r1")  # said twice, counted once
    assert queued(ledger, "engine-0") == [200]
    ledger.release("r2")
    assert queued(ledger, "engine-0") == [0]


def test_kv_is_the_prompt_and_a_token_in_whole_blocks():
    ledger = ledger_of(up("engine-0", kv_blocks=10, block_tokens=16))
    rank = ledger.ranks[0]
    place(ledger, "r1", 15, "engine-0")
    assert (rank.kv_blocks, rank.room_blocks()) == (1, 9)
    place(ledger, "r2", 16, "engine-0")
    assert (rank.kv_blocks, rank.room_blocks()) == (3, 7)


def test_room_is_unknown_where_the_size_is():
    assert ledger_of(up("engine-0")).ranks[0].room_blocks() is None


def test_kv_is_never_less_than_what_the_prompts_placed_hold():
    ledger = ledger_of(up("engine-0", block_tokens=16))
    place(ledger, "r1", 159, "engine-0")
    ledger.report(pass_ended("engine-0", 1, ran=(32,), kv_blocks=(2,), acknowledged=1))  # not written yet
    assert ledger.ranks[0].kv_blocks == 10
    ledger.report(pass_ended("engine-0", 2, ran=(127,), kv_blocks=(25,), acknowledged=1))
    assert ledger.ranks[0].kv_blocks == 25


def test_waiting_counts_what_is_on_its_way():
    ledger = ledger_of(up("engine-0"))
    rank = ledger.ranks[0]
    place(ledger, "r1", 10, "engine-0")
    assert (rank.waiting, rank.running) == (1, None)
    ledger.report(pass_ended("engine-0", 1, ran=(10,), running=(1,), waiting=(0,), acknowledged=1))
    place(ledger, "r2", 10, "engine-0")
    assert (rank.waiting, rank.running) == (1, 1)


def test_a_budget_shrinks_by_what_was_dispatched_since():
    ledger = ledger_of(up("engine-0"))
    rank = ledger.ranks[0]
    assert rank.pab_tokens is None
    ledger.report(pass_ended("engine-0", 1, ran=(0,), pab_tokens=(1000,), acknowledged=0))
    place(ledger, "r1", 300, "engine-0")
    assert rank.pab_tokens == 700
    ledger.report(pass_ended("engine-0", 2, ran=(0,), pab_tokens=(650,), acknowledged=1))
    assert rank.pab_tokens == 650


# Leaving.


def test_release_gives_everything_back_once():
    ledger = ledger_of(up("engine-0"))
    place(ledger, "r1", 300, "engine-0")
    assert ledger.release("r1").request.id == "r1"
    assert ledger.release("r1") is None
    rank = ledger.ranks[0]
    assert (rank.requests, rank.queued_tokens, rank.kv_blocks, rank.waiting) == (0, 0, 0, 0)


def test_cancelled_on_its_way_is_not_settled_again_by_the_acknowledgement():
    ledger = ledger_of(up("prefill-0"))
    place(ledger, "r1", 300)
    place(ledger, "r2", 100)
    ledger.release("r1")
    ledger.report(pass_ended("prefill-0", 1, ran=(0,), queued=(100,), acknowledged=2))
    assert queued(ledger) == [100]


def test_from_a_prefill_instance_a_request_leaves_with_its_prompt():
    ledger = ledger_of(up("prefill-0"))
    place(ledger, "r1", 300)
    ledger.prefilled("r1")
    assert ledger.placements == {}
    assert ledger.ranks[0].requests == 0


def test_from_an_aggregated_instance_it_leaves_when_finished():
    ledger = ledger_of(up("engine-0"))
    place(ledger, "r1", 300, "engine-0")
    ledger.prefilled("r1")
    assert ledger.ranks[0].requests == 1


# Instances.


def test_ranks_are_those_that_may_be_given_work():
    ledger = ledger_of(up("prefill-0", ranks=2), up("prefill-1", ranks=1))
    assert len(ledger.ranks) == 3
    ledger.instances["prefill-0"].draining = True
    ledger.refresh()
    assert [rank.instance.info.instance for rank in ledger.ranks] == ["prefill-1"]
    ledger.down("prefill-1")
    assert ledger.ranks == []


def test_a_restart_is_empty_and_stays_so_when_the_lost_requests_are_given_back():
    ledger = ledger_of(up("engine-0", kv_blocks=100))
    place(ledger, "r1", 300, "engine-0")
    ledger.up(up("engine-0", kv_blocks=100, epoch=1))
    ledger.release("r1")
    rank = ledger.ranks[0]
    assert (rank.requests, rank.queued_tokens, rank.kv_blocks) == (0, 0, 0)
    assert place(ledger, "r2", 10, "engine-0").number == 2


def test_an_instance_that_was_down_counts_from_1():
    ledger = ledger_of(up("prefill-0"))
    place(ledger, "r1", 1)
    ledger.down("prefill-0")
    ledger.release("r1")
    ledger.up(up("prefill-0", epoch=1))
    assert place(ledger, "r1", 1).number == 1


def test_announced_again_in_its_epoch_an_instance_keeps_its_load():
    ledger = ledger_of(up("prefill-0"))
    place(ledger, "r1", 300)
    ledger.instances["prefill-0"].draining = True
    ledger.up(up("prefill-0"))
    assert queued(ledger) == [300]
    assert ledger.instances["prefill-0"].active


def test_fits_while_some_instance_can_hold_the_prompt_and_a_token():
    ledger = Ledger()
    assert ledger.fits(request("r1", prompt=10**9))  # nothing is known yet
    ledger.up(up("engine-0", kv_blocks=10, block_tokens=16))
    assert ledger.fits(request("r1", prompt=159))
    assert not ledger.fits(request("r1", prompt=160))
    ledger.up(up("engine-1"))  # does not say how much it has
    assert ledger.fits(request("r1", prompt=160))
