"""What is handed on of events that come late, twice, out of order or not at all."""

from hypothesis import given
from hypothesis import strategies as st

from headway.core.events import InstanceDown, InstanceDraining, InstanceUp, PassEnded, Role, Snapshot
from headway.wire.order import Order, Verdict

HAND_ON, ASK, BOTH, DROP = Verdict(True), Verdict(False, True), Verdict(True, True), Verdict(False)


def hello(epoch: int = 1) -> InstanceUp:
    return InstanceUp("e", Role.PREFILL, 1, 64, epoch=epoch)


def ended(sequence: int, epoch: int = 1) -> PassEnded:
    return PassEnded("e", epoch, sequence, 0, 0.1, (1,))


def snapshot(sequence: int, epoch: int = 1) -> Snapshot:
    return Snapshot("e", epoch, sequence, 0, busy=False)


def verdicts(*events, can_ask: bool = True) -> list[Verdict]:
    order = Order(can_ask=can_ask)
    return [order.take(event) for event in events]


def test_in_order_all_is_handed_on():
    assert verdicts(hello(), ended(1), ended(2), snapshot(3), ended(4)) == [HAND_ON] * 5


def test_a_gap_hands_on_and_asks():
    order = Order(can_ask=True)
    assert [order.take(e) for e in (hello(), ended(1), ended(3))] == [HAND_ON, HAND_ON, BOTH]
    assert order.gaps == 1


def test_twice_and_late_is_stale():
    order = Order(can_ask=True)
    assert [order.take(e) for e in (hello(), ended(2), ended(2), ended(1))][2:] == [DROP, DROP]
    assert order.stale == 2


def test_a_snapshot_fills_a_gap_by_itself():
    assert verdicts(hello(), ended(1), snapshot(9), ended(10))[2:] == [HAND_ON, HAND_ON]


def test_who_was_not_introduced_is_asked_to_be():
    assert verdicts(ended(5), hello(), snapshot(6)) == [ASK, HAND_ON, HAND_ON]


def test_a_snapshot_older_than_what_was_dropped_is_asked_for_again():
    assert verdicts(ended(7), hello(), snapshot(6)) == [ASK, HAND_ON, BOTH]


def test_a_restarted_engine_is_introduced_anew_and_its_past_is_over():
    script = (hello(), ended(500), ended(1, epoch=2), hello(2), snapshot(2, epoch=2), ended(501))
    assert verdicts(*script)[2:] == [ASK, HAND_ON, HAND_ON, DROP]


def test_an_introduction_told_again_is_dropped_so_that_it_does_not_undo_a_drain():
    assert verdicts(hello(), InstanceDraining("e"), hello(), ended(1)) == [HAND_ON, HAND_ON, DROP, HAND_ON]


def test_after_goodbye_only_a_higher_epoch_comes_back():
    script = (hello(), InstanceDown("e"), InstanceDown("e"), hello(), ended(1), hello(2), ended(1, 2))
    assert verdicts(*script) == [HAND_ON, HAND_ON, DROP, DROP, DROP, HAND_ON, HAND_ON]


def test_a_stranger_who_leaves_is_nobodys_business():
    assert verdicts(InstanceDown("e")) == [DROP]


def test_where_nobody_can_be_asked_events_are_handed_on_as_they_come():
    assert verdicts(ended(5), ended(6), ended(6), ended(1, 2), can_ask=False) == [
        HAND_ON,
        HAND_ON,
        DROP,
        HAND_ON,
    ]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 8), st.sampled_from("hes")), max_size=40))
def test_whatever_comes_is_handed_on_in_order_each_once_and_after_its_introduction(script):
    order = Order(can_ask=True)
    introduced, handed_on = 0, [(0, 0)]
    for epoch, sequence, kind in script:
        event = {"h": hello(epoch), "e": ended(sequence, epoch), "s": snapshot(sequence, epoch)}[kind]
        if not order.take(event).hand_on:
            continue
        if kind == "h":
            assert epoch > introduced
            introduced = epoch
        else:
            assert epoch == introduced
            assert (epoch, sequence) > handed_on[-1]
            handed_on.append((epoch, sequence))
