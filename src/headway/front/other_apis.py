"""Read generations in the formats of other APIs than OpenAI's chats and text completions.

Anthropic's Messages (`/v1/messages`), OpenAI's Responses (`/v1/responses`) and SGLang's own `/generate`. Each
reader fills the prompt with what the engine will read, in the order of a template (tools, system, messages),
and returns the number of messages and the common fields, as the readers in `requests.py` do.
"""

import msgspec

from headway.front.errors import bad_request
from headway.front.json_body import ABSENT, Field, decode, flag
from headway.front.prompts import Prompt
from headway.front.request_fields import Fields, is_given

__all__ = ["read_generate", "read_messages", "read_responses"]


class _Message(msgspec.Struct, gc=False):
    role: str
    content: Field = ABSENT


class _Messages(Fields, kw_only=True):
    messages: list[_Message]
    system: Field = ABSENT
    tools: Field = ABSENT


class _Item(msgspec.Struct, gc=False):
    """An item of a response's input: a message, a call of a function or its output, reasoning."""

    role: str | None = None
    content: Field = ABSENT
    arguments: Field = ABSENT
    output: Field = ABSENT
    summary: Field = ABSENT


class _Responses(Fields, kw_only=True):
    input: msgspec.Raw
    max_tokens: Field = msgspec.field(default=ABSENT, name="max_output_tokens")
    instructions: Field = ABSENT
    tools: Field = ABSENT
    background: Field = ABSENT
    conversation: Field = ABSENT
    previous_response_id: Field = ABSENT


class _Generate(Fields, kw_only=True):
    text: Field = ABSENT
    input_ids: Field = ABSENT
    input_embeds: Field = ABSENT
    image_data: Field = ABSENT
    video_data: Field = ABSENT
    audio_data: Field = ABSENT
    sampling_params: Field = ABSENT


class _Sampling(msgspec.Struct):
    max_new_tokens: Field = ABSENT
    n: Field = ABSENT


_messages = msgspec.json.Decoder(_Messages)
_responses = msgspec.json.Decoder(_Responses)
_items = msgspec.json.Decoder(list[_Item | str])
_generate = msgspec.json.Decoder(_Generate)
_sampling = msgspec.json.Decoder(_Sampling)


def read_messages(body: bytes, prompt: Prompt) -> tuple[int, Fields]:
    """Read a request of Anthropic's Messages API."""
    request = decode(_messages, body)
    if not request.messages:
        raise bad_request("messages must not be empty.", param="messages")
    prompt.add_json("", request.tools)
    prompt.add_content("system", request.system, "system")
    for number, message in enumerate(request.messages):
        prompt.add_content(message.role, message.content, f"messages[{number}].content")
    _ignore_samples(request)
    return len(request.messages) + is_given(request.system), request


def read_responses(body: bytes, prompt: Prompt) -> tuple[int, Fields]:
    """Read a request of OpenAI's Responses API.

    Raises Refusal (400) for one that builds on a response that an engine has kept, or is to be kept while
    its client is away: the gateway does not know which engine has it.
    """
    request = decode(_responses, body)
    for name in ("previous_response_id", "conversation"):
        if is_given(getattr(request, name)):
            message = f"{name} is not served: the gateway keeps no responses. Send all of them in input."
            raise bad_request(message, param=name)
    if flag(request.background, "background"):
        message = "background is not served: the gateway keeps no responses."
        raise bad_request(message, param="background")
    prompt.add_json("", request.tools)
    prompt.add_content("system", request.instructions, "instructions")
    _ignore_samples(request)
    given = is_given(request.instructions)
    if bytes(request.input)[:1] != b"[":
        prompt.add_content("user", request.input, "input")
        return 1 + given, request
    items = decode(_items, bytes(request.input))
    for number, item in enumerate(items):
        if isinstance(item, str):
            prompt.add_text("user", item.encode())
        else:
            _add_item(prompt, item, f"input[{number}]")
    return len(items) + given, request


def _ignore_samples(request: Fields) -> None:
    """Ignore fields of OpenAI's older APIs that mean nothing to the engine in this one."""
    request.n = request.best_of = request.max_completion_tokens = ABSENT


def _add_item(prompt: Prompt, item: _Item, name: str) -> None:
    """Add an item of a response's input."""
    role = item.role or "assistant"
    prompt.add_content(role, item.content, f"{name}.content")
    prompt.add_json(role, item.arguments)
    prompt.add_content("tool", item.output, f"{name}.output")
    prompt.add_content(role, item.summary, f"{name}.summary")


def read_generate(body: bytes, prompt: Prompt) -> tuple[int, Fields]:
    """Read a request of SGLang's own API: a text or token ids, or lists of them."""
    request = decode(_generate, body)
    given = [name for name in ("text", "input_ids", "input_embeds") if is_given(getattr(request, name))]
    if not given:
        raise bad_request("One of text, input_ids and input_embeds is needed.", param="text")
    if given[0] == "input_embeds":
        prompt.add_other()
    else:
        value = getattr(request, given[0])
        prompt.add_prompt(value, given[0])
    for media in (request.image_data, request.video_data, request.audio_data):
        prompt.add_other(int(is_given(media)))
    if isinstance(request.sampling_params, msgspec.Raw) and bytes(request.sampling_params)[:1] == b"{":
        sampling = decode(_sampling, bytes(request.sampling_params))
        request.max_tokens, request.n = sampling.max_new_tokens, sampling.n
    return 0, request
