"""What a pass event looks like on the wire, and what is not one."""

import dataclasses
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.errors import EngineError
from headway.core.events import (
    Arrived,
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    PassEnded,
    PassStarted,
    Role,
    Snapshot,
)
from headway.core.request import Request
from headway.wire import decode, encode

names = st.text(min_size=1, max_size=20)
counts = st.integers(0, 2**62)
ranks = st.lists(counts, max_size=4).map(tuple)
maybe = st.none() | ranks
state = {
    "instance": names,
    "epoch": counts,
    "sequence": counts,
    "acknowledged": counts,
    "queued_tokens": maybe,
    "kv_blocks": maybe,
    "running": maybe,
    "waiting": maybe,
    "pab_tokens": st.none() | st.lists(st.integers(-(2**62), 2**62), max_size=4).map(tuple),
    "first_rank": counts,
}
events = st.one_of(
    st.builds(
        InstanceUp,
        instance=names,
        role=st.sampled_from(Role),
        ranks=st.integers(1, 512),
        chunk_tokens=st.integers(1, 65536),
        kv_blocks=st.none() | counts,
        block_tokens=st.integers(1, 512),
        max_running=st.none() | counts,
        lockstep=st.booleans(),
        epoch=counts,
    ),
    st.builds(PassStarted, instance=names, epoch=counts, sequence=counts, first_rank=counts),
    st.builds(PassEnded, duration_s=st.floats(0, 1e6), ran_tokens=ranks, **state),
    st.builds(Snapshot, busy=st.booleans(), **state),
    st.builds(InstanceDown, names),
    st.builds(InstanceDraining, names),
)

ENDED = PassEnded("prefill-0", 7, 42, 12, 0.25, (4096, 0), queued_tokens=(100, 0))


@given(events)
def test_every_event_arrives_as_it_was_sent(event):
    assert decode(encode(event)) == event


def test_a_message_is_a_map_with_the_names_of_the_core():
    assert msgspec.msgpack.decode(encode(ENDED)) == {
        "schema": "headway.pass/1",
        "type": "pass-ended",
        "instance": "prefill-0",
        "epoch": 7,
        "sequence": 42,
        "acknowledged": 12,
        "duration_s": 0.25,
        "ran_tokens": [4096, 0],
        "queued_tokens": [100, 0],
    }


def test_what_is_unknown_is_left_out_and_is_none_again():
    fields = msgspec.msgpack.decode(encode(ENDED))
    assert "kv_blocks" not in fields
    assert decode(encode(ENDED)).kv_blocks is None


def test_nil_is_as_good_as_left_out_and_new_keys_are_skipped():
    fields = msgspec.msgpack.decode(encode(ENDED)) | {"kv_blocks": None, "temperature_k": [300]}
    assert decode(msgspec.msgpack.encode(fields)) == ENDED


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "headway.pass/2"}, "headway.pass/2"),
        ({"type": "pass-over"}, "pass-over"),
        ({"sequence": -1}, "sequence"),
        ({"ran_tokens": [1, "two"]}, "ran_tokens"),
        ({"ran_tokens": None}, "ran_tokens"),
        ({"duration_s": -0.5}, "duration_s"),
        ({"duration_s": math.nan}, "duration_s"),
        ({"duration_s": math.inf}, "duration_s"),
        ({"instance": ""}, "instance"),
    ],
)
def test_what_breaks_the_schema_is_the_engines_error_and_says_where(change, says):
    fields = msgspec.msgpack.decode(encode(ENDED)) | change
    with pytest.raises(EngineError, match=says):
        decode(msgspec.msgpack.encode(fields))


def test_an_instance_without_ranks_is_the_engines_error_too():
    up = InstanceUp("e", Role.PREFILL, 2, 64)
    fields = msgspec.msgpack.decode(encode(up)) | {"ranks": 0}
    with pytest.raises(EngineError, match="ranks must be at least 1"):
        decode(msgspec.msgpack.encode(fields))


@given(st.binary(max_size=200))
def test_garbage_is_an_engine_error_and_nothing_else(data):
    with pytest.raises(EngineError):
        decode(data)


@given(events, st.data())
def test_a_message_cut_short_is_an_engine_error(event, data):
    message = encode(event)
    with pytest.raises(EngineError):
        decode(message[: data.draw(st.integers(0, len(message) - 1))])


def test_events_of_requests_do_not_travel():
    with pytest.raises(TypeError, match="Arrived does not travel"):
        encode(Arrived(Request("r", 0.0, 1)))


@pytest.mark.parametrize("event", [ENDED, PassStarted("e", 1, 1), InstanceUp("e", Role.DECODE, 1, 64)])
def test_no_field_of_the_core_is_forgotten(event):
    filled = {field.name for field in dataclasses.fields(event) if getattr(event, field.name) is not None}
    assert dataclasses.asdict(decode(encode(event))).keys() >= filled
