"""What a token is, on streams as vLLM and SGLang send them, cut anywhere."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.front.token_stream import EventWeights, TokenStream
from headway.front.usage import EventKind, Usage, error_status, event_data, kind_of, usage_of


def test_usage_at_the_end_of_an_answer_or_stream_else_events_are_counted():
    assert usage_of(b'{"usage":{"prompt_tokens":5,"completion_tokens":2}}') == Usage(5, 2)
    assert usage_of(b"nonsense") == Usage(None, None)
    tail = TokenStream()
    for chunk in (b'data: {"a":1}\n\n' * 5, b"data: [DONE]\n\n"):
        tail.add(chunk)
    assert tail.complete and tail.usage() == Usage(None, 5)
    split = TokenStream()
    split.add(b'data: {"choices":[],"usage":{"prompt_to')
    split.add(b'kens":5,"completion_tokens":2}}\n\ndata: [DONE]\n\n')
    assert split.usage() == Usage(5, 2)


def stream(*events):
    """Count the tokens of a stream without usage, whole and piece by piece."""
    data = [b"data: " + event.encode() + b"\n\n" for event in (*events, "[DONE]")]
    whole, pieces = TokenStream(), TokenStream()
    whole.add(b"".join(data))
    for piece in data:
        pieces.add(piece)
    assert whole.usage() == pieces.usage()
    return pieces.usage().output_tokens


def event(reason=None, **delta):
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


ROLE = event(role="assistant", content="")


def test_the_role_alone_is_no_token():
    assert stream(ROLE, event(content="a"), event(content="b", reason="length")) == 2
    assert stream(event(content="a", role="assistant"), event(content="b", role="assistant")) == 2
    assert stream(ROLE) == 0


def test_vllms_last_token_may_be_without_text():
    assert stream(ROLE, event(content="a"), event(content=""), event(content="", reason="stop")) == 3


def test_sglangs_reason_to_stop_is_no_token():
    nulls = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
    token = nulls | {"content": "a"}
    assert stream(ROLE, event(**token), event(**token), event(**nulls, reason="length")) == 2
    assert stream(ROLE, event(reasoning_content="a"), event(reasoning_content=None, reason="stop")) == 1
    assert stream(ROLE, event(tool_calls=[{"index": 0}]), event(reason="tool_calls")) == 1


def test_a_text_completion_has_no_role_and_no_separate_end():
    text = json.dumps({"choices": [{"text": "a", "finish_reason": None}]})
    assert stream(text, text, json.dumps({"choices": [{"text": "", "finish_reason": "stop"}]})) == 3
    assert stream(text, text, json.dumps({"choices": []})) == 2


# Recorded streams: what comes before the first token, how many tokens there are, and how it ended

STREAMS = Path(__file__).with_name("streams")
RECORDED = {
    # name: (events before the first token, prompt tokens, output tokens, the status of an error)
    "vllm_chat": (1, None, 4, None),
    "vllm_chat_usage": (1, 11, 3, None),
    "vllm_keep_alive": (1, None, 3, None),
    "vllm_speculative_usage": (1, 11, 24, None),
    "vllm_speculative": (1, None, 6, None),
    "vllm_tool_call": (1, None, 4, None),
    "vllm_reasoning": (1, None, 4, None),
    "vllm_continuous_usage": (1, 5, 2, None),
    "vllm_completion_logprobs": (0, None, 4, None),
    "vllm_error_first": (None, None, 0, 400),
    "vllm_error_after_comment": (None, None, 0, 503),
    "vllm_error_midway": (1, None, 2, 500),
    "sglang_chat": (1, None, 2, None),
    "sglang_chat_usage": (1, 7, 4, None),
    "sglang_reasoning": (1, None, 2, None),
    "sglang_error_first": (None, None, 0, 503),
    "sglang_error_midway": (1, None, 1, 500),
    "sglang_generate": (0, 5, 3, None),
    "anthropic_messages": (3, 9, 3, None),
    "anthropic_error": (None, 9, 0, 502),
    "anthropic_tool": (3, None, 5, None),
    "openai_responses": (4, 6, 2, None),
    "openai_responses_failed": (1, None, 1, 502),
}
LINE_ENDS = (b"\n", b"\r\n", b"\r")


def recorded(name, line_end=b"\n"):
    return (STREAMS / f"{name}.sse").read_bytes().replace(b"\n", line_end)


def follow(pieces):
    """Return (events before the first token, prompt tokens, output tokens, status of an error), and what the
    client was given by then and in all.
    """
    stream, given, first = TokenStream(), b"", None
    for piece in pieces:
        given += stream.add(piece)
        if stream.started and first is None:
            first = given
        if stream.error is not None and not stream.started:
            break
    given += stream.finish()
    before = None
    if first is not None:
        found = [kind_of(data) for data in event_data(first)]
        before = next(n for n, kind in enumerate(found) if kind is EventKind.TOKEN)
    status = None if stream.error is None else error_status(stream.error)
    return (before, *stream.usage(), status), given


def cut(data, places):
    ends = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in pairwise(ends) if a < b]


@pytest.mark.parametrize("line_end", LINE_ENDS)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_streams_whole_and_byte_by_byte(name, line_end):
    data = recorded(name, line_end)
    for pieces in ([data], [data[n : n + 1] for n in range(len(data))]):
        told, given = follow(pieces)
        assert told == RECORDED[name]
        if told[0] is not None:
            comments = line_end.join((b": keep-alive", b"", b""))
            assert given.replace(comments, b"") == data.replace(comments, b"")


@given(st.sampled_from(sorted(RECORDED)), st.sampled_from(LINE_ENDS), st.lists(st.integers(0, 10_000)))
def test_it_does_not_matter_where_a_stream_is_cut(name, line_end, places):
    assert follow(cut(recorded(name, line_end), places))[0] == RECORDED[name]


def test_comments_before_the_first_token_are_dropped_and_those_behind_it_passed_on():
    stream = TokenStream()
    assert stream.add(b": ping\n\n") == stream.add(b": pi") == stream.add(b"ng\n\n") == b""
    assert stream.add(b'data: {"choices":[{"text":"a"}]}\n\n') == b'data: {"choices":[{"text":"a"}]}\n\n'
    assert stream.add(b": ping\n\n") == b": ping\n\n"
    assert stream.events == 1


def test_what_is_held_before_the_first_token_is_bounded():
    stream, event = TokenStream(), b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
    for _ in range(100_000):
        stream.add(b": ping\n\n")
    assert not stream.started and not stream._held
    while not stream.started:
        stream.add(event)
        assert stream._held_bytes < 1 << 20
    endless = TokenStream()
    for _ in range(100):
        endless.add(b"x" * 10_000)
        assert len(endless._open) < 1 << 20


def test_an_engines_events_weigh_what_its_usage_says():
    weights = EventWeights()
    for name, tokens in (("vllm_speculative", 6), ("vllm_speculative_usage", 24), ("vllm_speculative", 24)):
        stream = TokenStream()
        stream.add(recorded(name))
        assert stream.usage(weights, "engine-0").output_tokens == tokens
    other = TokenStream()
    other.add(recorded("vllm_speculative"))
    assert other.usage(weights, "engine-1").output_tokens == 6


def test_the_token_that_ends_an_output_is_no_speculation():
    weights = EventWeights()
    weights.learn("e", tokens=101, events=100)
    assert weights.tokens("e", 50) == 50


@pytest.mark.parametrize(
    "count", [b"-5", b"1e20", b"100000000000000000000", b"3.0", b'"3"', b"true", b"null", b"NaN", b"[]"]
)
def test_impossible_usage_is_not_reported(count):
    assert usage_of(b'{"usage":{"prompt_tokens":%b,"completion_tokens":2}}' % count).prompt_tokens is None
    assert usage_of(b'{"usage":%b}' % count) == Usage(None, None)


def test_usage_of_a_large_answer_is_found_at_its_end():
    answer = b'{"choices":[{"text":"%b"}],"usage":{"prompt_tokens":5,"completion_tokens":2}}'
    assert usage_of(answer % (b"x" * 1_000_000)) == Usage(5, 2)
    assert usage_of((answer % (b"x" * 1_000_000))[-1000:]) == Usage(5, 2)
