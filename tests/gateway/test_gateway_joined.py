"""Answers of several sequences as one: choices numbered on, usage added up, one id, one end."""

import json

import pytest

from headway.front.errors import Refusal
from headway.hosts.gateway.joined import DONE, Choices, EventSplitter, join_whole


def whole(text, prompt_tokens=7, completion_tokens=3, **more):
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    choice = {"index": 0, "text": text, "logprobs": {"tokens": [text]}, "finish_reason": "stop"}
    answer = {"id": f"cmpl-{text}", "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(answer | more).encode()


def chunk(id, *choices, **more):
    return b"data: " + json.dumps({"id": id, "choices": list(choices)} | more).encode() + b"\n\n"


def read(event):
    return json.loads(event.removeprefix(b"data: "))


def test_choices_are_numbered_on_and_copied_unread():
    joined = json.loads(join_whole([whole("a"), whole("b")], samples=1))
    assert joined["id"] == "cmpl-a"
    assert [(c["index"], c["text"], c["logprobs"]) for c in joined["choices"]] == [
        (0, "a", {"tokens": ["a"]}),
        (1, "b", {"tokens": ["b"]}),
    ]


def test_a_prompt_counts_once_for_all_its_samples():
    answers = [whole("a", 7), whole("b", 7), whole("c", 9), whole("d", 9)]
    assert json.loads(join_whole(answers, samples=2))["usage"] == {
        "prompt_tokens": 16,
        "completion_tokens": 12,
        "total_tokens": 28,
    }


def test_details_of_usage_are_added_up_too():
    def with_details(cached, reasoning):
        usage = {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning, "audio_tokens": None},
        }
        return whole("x", usage=usage)

    usage = json.loads(join_whole([with_details(4, 1), with_details(2, 3)], samples=1))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4, "audio_tokens": None}
    usage = json.loads(join_whole([with_details(4, 1), with_details(2, 3)], samples=2))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


def test_what_concerns_one_engine_is_left_out():
    answers = [whole("a", kv_transfer_params={"remote_host": "10.0.0.1"}), whole("b")]
    assert "kv_transfer_params" not in json.loads(join_whole(answers, samples=1))


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"choices":3}', b'{"choices":[3]}'])
def test_an_answer_that_cannot_be_joined_is_the_engines_fault(answer):
    with pytest.raises(Refusal) as refused:
        join_whole([whole("a"), answer], samples=1)
    assert (refused.value.status, refused.value.code) == (502, "engine_error")


def test_chunks_get_their_number_and_one_id():
    choices = Choices(samples=1)
    first = choices.event(1, chunk("b", {"index": 0, "delta": {"content": "x"}}))
    other = choices.event(0, chunk("a", {"index": 0, "delta": {"content": "y"}}))
    assert [(read(e)["id"], read(e)["choices"][0]["index"]) for e in (first, other)] == [("b", 1), ("b", 0)]
    assert choices.end() == DONE


def test_ends_and_usage_are_held_back_until_all_have_ended():
    choices = Choices(samples=1)
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    for number in (0, 1):
        assert choices.event(number, chunk("a", usage=usage)) == b""
        assert choices.event(number, DONE) == b""
    last, done, rest = choices.end().partition(DONE)
    assert (done, rest) == (DONE, b"")
    assert read(last)["choices"] == []
    assert read(last)["usage"] == {"prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20}


def test_comments_pass_and_errors_end_the_stream():
    choices = Choices(samples=1)
    assert choices.event(0, b": keep-alive\n\n") == b": keep-alive\n\n"
    for event in (b'data: {"error":{"message":"died"}}\n\n', b"data: no json\n\n", b'data: {"x":1}\n\n'):
        with pytest.raises(Refusal):
            choices.event(0, event)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_come_whole_however_they_are_cut(size, end):
    stream = b"".join(b"data: %d" % n + end + end for n in range(20))
    splitter, events = EventSplitter(), []
    for at in range(0, len(stream), size):
        events += splitter.feed(stream[at : at + size])
    assert events == [b"data: %d\n\n" % n for n in range(20)]


def test_an_event_without_an_end_is_not_kept_for_ever():
    splitter = EventSplitter()
    with pytest.raises(Refusal):
        for _ in range(100):
            list(splitter.feed(b"x" * 100_000))
