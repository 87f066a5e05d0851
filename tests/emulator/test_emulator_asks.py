"""What a body asks for, and what is refused as an engine would refuse it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.hosts.emulator.asks import Limits, parse_ask, parse_embeddings, rank_in_header
from headway.hosts.emulator.errors import ApiError

LIMITS = Limits("tiny", 1000, 16, seed=0)


def ask(chat=False, **body):
    body = ({"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}) | body
    return parse_ask(json.dumps(body).encode(), LIMITS, chat=chat)


def refusal(data, chat=False) -> ApiError:
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    with pytest.raises(ApiError) as caught:
        parse_ask(data, LIMITS, chat=chat)
    return caught.value


@pytest.mark.parametrize(("prompt", "tokens"), [("a", 1), ("abcd", 1), ("abcde", 2), ("é" * 4, 2)])
def test_text_counts_four_bytes_a_token_rounded_up(prompt, tokens):
    assert ask(prompt=prompt).prompt_tokens == tokens


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_token_ids_count_exactly(prompt):
    assert ask(prompt=prompt).prompt_tokens == 3


def test_a_list_of_one_text_is_that_text():
    assert ask(prompt=["abcd"]) == ask(prompt="abcd")


def test_a_chat_counts_roles_contents_and_text_parts():
    parts = [{"type": "text", "text": "ab"}, {"type": "image_url", "image_url": {"url": "x"}}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": []}]
    assert ask(chat=True, messages=turns).prompt_tokens == -(-len("user\nab\nassistant\n\n") // 4)


def test_max_tokens_is_the_exact_length():
    assert (ask(max_tokens=77).output_tokens, ask(max_tokens=77).stops) == (77, False)
    assert ask(max_completion_tokens=5, max_tokens=77).output_tokens == 5


def test_without_max_tokens_the_length_depends_on_the_prompt_alone():
    lengths = [ask(prompt=f"prompt {i}").output_tokens for i in range(200)]
    assert lengths == [ask(prompt=f"prompt {i}").output_tokens for i in range(200)]
    assert 64 < sorted(lengths)[100] < 256
    assert all(1 <= length < 1000 for length in lengths)
    assert ask(prompt="prompt 1").stops


def test_ignore_eos_false_lets_the_model_stop_before_max_tokens():
    drawn = ask(prompt="prompt 1").output_tokens
    assert ask(prompt="prompt 1", max_tokens=drawn + 1, ignore_eos=False).output_tokens == drawn
    assert ask(prompt="prompt 1", max_tokens=drawn - 1, ignore_eos=False).output_tokens == drawn - 1


def test_equal_beginnings_have_equal_block_hashes_and_only_those():
    one, two = ask(prompt="x" * 160), ask(prompt="x" * 130 + "y" * 30)
    assert len(one.prefix) == len(two.prefix) == 2
    assert one.prefix == two.prefix
    other = ask(prompt="z" + "x" * 159)
    assert not set(other.prefix) & set(one.prefix)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"prompt": "a", "max_tokens": 1e999}', "out of range"),
        ([], "object"),
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ""}, "must not be empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "not 2"),
        ({"prompt": [1, "b"]}, "not 2"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "at least 1"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream=True"),
        ({"prompt": "a", "n": 2}, "n must be 1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "kv_transfer_params": 5}, "kv_transfer_params"),
        ({"prompt": "a", "kv_transfer_params": {"do_remote_decode": True}, "stream": True}, "exclude"),
        ({"prompt": "a", "bootstrap_room": "x"}, "bootstrap_room"),
        ({"prompt": "a" * 4000}, "maximum context length is 1000 tokens"),
        ({"prompt": "a" * 400, "max_tokens": 901}, "too large: 901"),
    ],
)
def test_what_is_wrong_is_a_400_that_says_what(body, says):
    error = refusal(body)
    assert error.status == 400
    assert json.loads(error.body())["error"]["code"] == 400

    assert says in str(error)


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": [{"content": "x"}]}, {"messages": "hi"}])
def test_a_chat_without_proper_messages_is_a_400(body):
    assert refusal(body, chat=True).status == 400


def test_an_unknown_model_is_a_404_as_at_vllm():
    error = refusal({"prompt": "a", "model": "gpt-17"})
    assert (error.status, str(error)) == (404, "The model `gpt-17` does not exist.")


def test_deep_nesting_is_refused_and_not_crashed_on():
    assert refusal(b'{"prompt": ' + b"[" * 100_000).status == 400


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_whatever_the_prompt_it_is_read_or_refused(prompt):
    try:
        assert parse_ask(json.dumps({"prompt": prompt}).encode(), LIMITS, chat=False).prompt_tokens >= 1
    except ApiError as error:
        assert error.status == 400


def test_embeddings_take_texts_and_token_ids():
    def tokens(value):
        return [n for _, n in parse_embeddings(json.dumps({"input": value}).encode(), LIMITS)]

    assert (tokens("abcd"), tokens(["abcd", "abcde"]), tokens([1, 2]), tokens([[1], [2, 3]])) == (
        [1],
        [1, 2],
        [2],
        [1, 2],
    )


@pytest.mark.parametrize("text", ["-1", "1.5", "zero", "٣", "9" * 30, ""])
def test_a_rank_that_is_no_number_is_a_400(text):
    with pytest.raises(ApiError, match="X-data-parallel-rank"):
        rank_in_header({"X-data-parallel-rank": text})
