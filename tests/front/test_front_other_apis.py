"""What is read of requests in the formats of Anthropic's Messages, OpenAI's Responses and SGLang."""

import json

import pytest

from headway.front.errors import Refusal
from headway.front.request_fields import RESERVED
from headway.front.requests import GENERATIONS, read_call

MESSAGES, RESPONSES, GENERATE = "/v1/messages", "/v1/responses", "/generate"
SMALLEST = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    MESSAGES: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9},
    RESPONSES: {"input": "x"},
    GENERATE: {"text": "x"},
}


def read(path, **body):
    return read_call(path, json.dumps(body).encode())


def refused(path, **body):
    with pytest.raises(Refusal) as refusal:
        read(path, **body)
    assert refusal.value.status == 400
    return refusal.value.param


@pytest.mark.parametrize("path", GENERATIONS)
def test_fields_that_steer_engines_are_refused_in_every_format(path):
    assert read(path, **SMALLEST[path]).text_bytes == 1
    for name in RESERVED:
        assert refused(path, **SMALLEST[path], **{name: None}) == name


@pytest.mark.parametrize("path", GENERATIONS)
def test_limits_and_streams_are_read_in_every_format(path):
    limit = {RESPONSES: {"max_output_tokens": 9}, GENERATE: {"sampling_params": {"max_new_tokens": 9}}}
    call = read(path, **(SMALLEST[path] | limit.get(path, {"max_tokens": 9})), stream=True)
    assert (call.path, call.stream, call.max_tokens) == (path, True, 9)


def test_a_message_is_its_tools_its_system_text_and_what_was_said():
    call = read(
        MESSAGES,
        model="m",
        max_tokens=5,
        tools=[{"name": "t"}],
        system=[{"type": "text", "text": "four", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": "12345"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "123", "signature": "s"},
                    {"type": "tool_use", "id": "a", "name": "t", "input": {"b": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a", "content": "1234567"},
                    {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "12"}]},
                    {"type": "image", "source": {"type": "base64", "data": "x" * 1000}},
                ],
            },
        ],
    )
    assert call.text_bytes == len('[{"name": "t"}]') + 4 + 5 + 3 + len('{"b": 1}') + 7 + 2
    assert (call.messages, call.other_parts, call.model) == (4, 1, "m")


def test_a_response_reads_texts_items_and_calls():
    call = read(
        RESPONSES,
        instructions="12",
        tools=[{"type": "function"}],
        input=[
            {"role": "user", "content": "123"},
            {"role": "user", "content": [{"type": "input_text", "text": "1234"}, {"type": "input_image"}]},
            {"type": "function_call", "name": "f", "call_id": "c", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": "c", "output": "12345"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "123456"}]},
        ],
    )
    arguments = len(json.dumps('{"a":1}'))
    assert call.text_bytes == len('[{"type": "function"}]') + 2 + 3 + 4 + arguments + 5 + 6
    assert (call.messages, call.other_parts) == (6, 1)
    assert read(RESPONSES, input="hello").text_bytes == 5


def test_prefixes_are_those_of_the_same_chat_in_the_same_format():
    long = "x" * 4096
    first = read(MESSAGES, model="m", max_tokens=1, system=long, messages=[{"role": "user", "content": "a"}])
    other = read(MESSAGES, model="m", max_tokens=1, system=long, messages=[{"role": "user", "content": "b"}])
    assert first.prefix and first.prefix == other.prefix


@pytest.mark.parametrize(
    "body",
    [{"previous_response_id": "resp_1"}, {"conversation": "c"}, {"background": True}],
)
def test_a_response_that_some_engine_would_have_to_remember_is_refused(body):
    assert refused(RESPONSES, input="x", **body) == next(iter(body))
    assert read(RESPONSES, input="x", **dict.fromkeys(body), store=True).path == RESPONSES


def test_samples_mean_nothing_in_the_newer_apis():
    assert read(MESSAGES, **SMALLEST[MESSAGES], n=5).sequences == 1
    assert read(RESPONSES, input="x", n=5, best_of=7).sequences == 1


def test_generate_takes_texts_token_ids_or_lists_of_them():
    assert read(GENERATE, text="hello").text_bytes == 5
    assert read(GENERATE, text=["a", "bc"], sampling_params={"n": 2}).sequences == 4
    assert read(GENERATE, input_ids=[1, 2, 3]).token_ids == 3
    assert read(GENERATE, input_ids=[[1, 2], [3]]).sequences == 2
    assert read(GENERATE, text="x", sampling_params={"max_new_tokens": 0}).max_tokens == 0
    assert read(GENERATE, input_embeds=[[0.5]]).other_parts == 1
    assert read(GENERATE, text="x", image_data="data:").other_parts == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (MESSAGES, {"messages": []}),
        (MESSAGES, {"messages": "x"}),
        (MESSAGES, {"messages": [{"role": "user", "content": 3}]}),
        (MESSAGES, {}),
        (RESPONSES, {}),
        (RESPONSES, {"input": 3}),
        (RESPONSES, {"input": [3]}),
        (GENERATE, {}),
        (GENERATE, {"text": 3}),
    ],
)
def test_what_no_engine_could_read_is_refused(path, body):
    refused(path, **body)


def test_results_within_results_are_not_followed():
    content = "x"
    for _ in range(50):
        content = [{"type": "tool_result", "content": content}]
    call = read(MESSAGES, max_tokens=1, messages=[{"role": "user", "content": content}])
    assert (call.text_bytes, call.other_parts) == (0, 1)
