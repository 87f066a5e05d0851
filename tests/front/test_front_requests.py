"""What is read of a client's body, what is refused, and what bounds the work."""

import json

import pytest

from headway.front import json_body, prompts
from headway.front.errors import Refusal
from headway.front.requests import check_passed_on, read_call

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def read(body, path=COMPLETION):
    return read_call(path, body if isinstance(body, bytes) else json.dumps(body).encode())


def chat(*contents, **more):
    return read({"messages": [{"role": "user", "content": each} for each in contents], **more}, CHAT)


def refused(body, path=COMPLETION):
    with pytest.raises(Refusal) as refusal:
        read(body, path)
    assert refusal.value.status == 400
    return refusal.value.code


# What vLLM accepts is accepted


@pytest.mark.parametrize("value", [3, 3.0, "3", " 3 ", 3e0])
def test_a_whole_number_in_every_form_that_engines_take(value):
    assert read({"prompt": "x", "max_tokens": value}).max_tokens == 3


@pytest.mark.parametrize("value", [1.5, "x", [], {}, "1.5", -1, 1 << 31, "", "²"])
def test_what_is_no_whole_number_is_refused(value):
    assert refused({"prompt": "x", "max_tokens": value}) == "invalid_request"


@pytest.mark.parametrize(
    ("value", "streams"),
    [
        (True, True),
        (1, True),
        (1.0, True),
        ("yes", True),
        ("True", True),
        (False, False),
        (0, False),
        ("off", False),
        (None, False),
    ],
)
def test_a_flag_in_every_form_that_engines_take(value, streams):
    assert read({"prompt": "x", "stream": value}).stream is streams


def test_no_output_is_asked_for_by_text_completions_alone():
    assert read({"prompt": "x", "echo": True, "max_tokens": 0}).max_tokens == 0
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}
    assert refused(body, CHAT) == "invalid_request"


def test_embeddings_come_in_place_of_a_prompt_or_with_one():
    for body in (
        {"prompt_embeds": "AAAA"},
        {"prompt": None, "prompt_embeds": ["AAAA"]},
        {"prompt": "x", "prompt_embeds": "A"},
    ):
        assert read(body).other_parts == 1
    assert refused({"prompt_embeds": None}) == refused({}) == refused({"prompt": None}) == "invalid_request"


def test_parts_are_texts_or_objects_with_or_without_a_type():
    call = chat(["hello", "there", {"text": "you"}, {"type": "text", "text": "é"}])
    assert (call.text_bytes, call.other_parts) == (5 + 5 + 3 + 2, 0)
    call = chat([{"image_url": "https://x/y.png"}, {"type": "image_url", "image_url": {"url": "data:"}}])
    assert (call.text_bytes, call.other_parts) == (0, 2)
    assert chat([{"type": "refusal", "refusal": "no"}]).text_bytes == 2


def test_null_content_and_escapes():
    assert chat(None, "a\n").text_bytes == 2
    assert chat("é").text_bytes == 2  # as json.dumps escapes it: six bytes


def test_the_last_of_equal_fields_counts_as_in_engines():
    assert read(b'{"prompt":"long one","prompt":"x","max_tokens":1,"max_tokens":7}').max_tokens == 7


def test_sequences_are_counted_over_prompts_and_choices():
    assert read({"prompt": ["a", "b"], "n": 3}).sequences == 6
    assert read({"prompt": [[1, 2], [3]], "best_of": 2}).sequences == 4
    assert read({"prompt": [1, 2, 3]}).sequences == 1


# Token ids


@pytest.mark.parametrize(
    ("prompt", "tokens"), [([1], 1), ([1, 22, 333], 3), ([[1]], 1), ([[1, 2], [3]], 3), ([[1]] * 5, 5)]
)
def test_token_ids_are_counted(prompt, tokens):
    assert read({"prompt": prompt}).token_ids == tokens
    assert read(json.dumps({"prompt": prompt}, indent=2).encode()).token_ids == tokens


@pytest.mark.parametrize(
    "prompt",
    b"[] [[]] [[1],[]] [1,[2]] [[1],2] [[1],2,[3]] [[[1]]] [[1],[[2]]] [[1,[2],[3]]] [[[1],[2]]]".split()
    + b'["a",1] [1,"a"] [[1],"a"] [["a"]] [{}] [1.5] [1e3] [-1] [true] [null] {} 3 true'.split(),
)
def test_what_is_no_list_of_ids_or_texts_is_refused(prompt):
    assert refused(b'{"prompt":%b}' % prompt) == "invalid_request"


def test_an_id_of_five_thousand_digits_is_the_engines_to_refuse():
    assert read(b'{"prompt":[' + b"9" * 5000 + b"]}").token_ids == 1


# Bounds


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"prompt":[' + b"[1]," * 20_000 + b"[1]]}", COMPLETION),
        (b'{"prompt":[' + b'"",' * 20_000 + b'"a"]}', COMPLETION),
        (b'{"prompt":[' + b'"",' * 2_000_000 + b'"a"]}', COMPLETION),
        (b'{"messages":[' + b'{"role":"u"},' * 100_000 + b'{"role":"u"}]}', CHAT),
        (b'{"messages":[{"role":"u","content":[' + b"{}," * 100_000 + b'""]}]}', CHAT),
        (b'{"messages":[{"role":"u","content":[' + b'"",' * 100_000 + b'""]}]}', CHAT),
        (
            b'{"messages":['
            + b",".join([b'{"role":"u","content":[' + b'"",' * 9_999 + b'""]}'] * 21)
            + b"]}",
            CHAT,
        ),
    ],
)
def test_more_values_than_are_decoded_are_refused(body, path):
    assert refused(body, path) == "body_too_complex"


def test_braces_in_text_are_no_objects():
    code = "{}" * json_body.MOST_OBJECTS
    assert chat(code).text_bytes == len(code)


def test_quotes_in_text_are_no_strings():
    assert chat([{"type": "text", "text": '"' * 20 * prompts.MOST_PROMPTS}]).messages == 1


@pytest.mark.parametrize("body", [b"[" * 200_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000])
def test_nesting_is_bounded(body):
    assert refused(b'{"prompt":"x","y":' + body + b"}") == "body_too_complex"
    assert (
        refused(b'{"messages":[{"role":"u","content":"x"}],"tools":' + body + b"}", CHAT)
        == "body_too_complex"
    )


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe" + '{"prompt":"x"}'.encode("utf-16-le"),
        '{"prompt":"x"}'.encode("utf-16-le"),
        b"\xef\xbb\xbf" + b'{"prompt":"x"}',
        b'{"prompt":"\xff"}',
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"a\\udc00b"}',
        b'{"prompt":"a\0b"}',
        b'{"prompt":"x","y":1e}',
        b'{"prompt":"x"}\0',
        b"\0",
        b"",
        b" " * 5000 + b'{"prompt":"x"}',
        b'{"prompt":"x"}' + b" " * 5000,
    ],
)
def test_other_encodings_lone_surrogates_and_nul_are_refused(body):
    assert refused(body) == "invalid_json"


def test_text_that_ends_in_an_escaped_quote_does_not_take_forever_to_count():
    assert refused(b'{"prompt":"' + b'\\"{' * 300_000) == "invalid_json"


def test_a_name_is_short():
    assert refused({"prompt": "x", "model": "m" * 5000}) == "invalid_request"


def test_fields_that_steer_are_found_among_any_number_of_others():
    fields = b",".join(b'"%x":1' % n for n in range(50_000))
    check_passed_on(b"{" + fields + b"}")
    with pytest.raises(Refusal, match="data_parallel_rank"):
        check_passed_on(b"{" + fields + b',"data_parallel_rank":1}')


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("field", ["y", "tools", "best_of"])
def test_a_body_that_is_nested_too_deeply_is_said_to_be(path, field):
    deep = "[" * 200_000 + "]" * 200_000
    body = f'{{"messages":[{{"role":"user","content":"x"}}],"prompt":"x","{field}":{deep}}}'.encode()
    with pytest.raises(Refusal) as caught:
        read_call(path, body)
    assert (caught.value.status, caught.value.code) == (400, "body_too_complex")
    assert str(caught.value) == "The body is nested too deeply."
