"""Name the fields that requests of all endpoints share, and those that clients must not set."""

import msgspec

from headway.front.errors import bad_request
from headway.front.json_body import ABSENT, Field

__all__ = ["RESERVED", "Fields", "Steering", "is_given", "refuse_steering"]

#: Fields that steer engines. A client that could send one would pin a rank, or read another client's KV.
RESERVED = (
    "bootstrap_host",
    "bootstrap_pair_key",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    "decode_tp_size",
    "disagg_prefill_dp_rank",
    "ec_transfer_params",
    "kv_transfer_params",
    "routed_dp_rank",
)


class Steering(msgspec.Struct, kw_only=True):
    """The reserved fields of a request."""

    bootstrap_host: Field = ABSENT
    bootstrap_pair_key: Field = ABSENT
    bootstrap_port: Field = ABSENT
    bootstrap_room: Field = ABSENT
    data_parallel_rank: Field = ABSENT
    decode_tp_size: Field = ABSENT
    disagg_prefill_dp_rank: Field = ABSENT
    ec_transfer_params: Field = ABSENT
    kv_transfer_params: Field = ABSENT
    routed_dp_rank: Field = ABSENT


class Fields(Steering, kw_only=True):
    """What all generations have in common."""

    model: Field = ABSENT
    stream: Field = ABSENT
    stream_options: Field = ABSENT
    max_tokens: Field = ABSENT
    max_completion_tokens: Field = ABSENT
    n: Field = ABSENT
    best_of: Field = ABSENT
    truncate_prompt_tokens: Field = ABSENT


def is_given(field: Field) -> bool:
    """Return whether a field is there and not null."""
    return isinstance(field, msgspec.Raw) and bytes(memoryview(field)[:5]) != b"null"


def refuse_steering(fields: Steering) -> None:
    """Raise Refusal (400) when a client sets a reserved field."""
    for name in RESERVED:
        if getattr(fields, name) is not ABSENT:
            raise bad_request(f"The field {name!r} is the gateway's to set.", param=name)
