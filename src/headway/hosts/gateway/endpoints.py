"""List every endpoint of vLLM 0.32 and SGLang 0.5.23, and say what the gateway does with each.

The table below is the only place that decides this. A path is looked up as it reads after one percent
decoding, and must be spelt exactly as listed: another spelling of a listed path (a doubled slash, a slash
at the end, capitals) is refused, so that nothing slips past the table. Other paths under /v1/ are passed on
to one engine; everything else does not exist here.

docs/endpoints.md shows the table next to those of vllm-router and smg.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from headway.core.events import Role
from headway.front.errors import Refusal
from headway.front.requests import plain_path

__all__ = ["ENDPOINTS", "Endpoint", "Kind", "find", "is_operated", "roles_for"]


class Kind(StrEnum):
    """What the gateway does with a request."""

    #: A generation: placed by the policy, retried, measured.
    SCHEDULED = "scheduled"
    #: A generation in a format whose prompt the gateway does not read: sent once, to an aggregated engine.
    GENERATED = "generated"
    #: No generation (embeddings, scores): computed once, on any engine but a decode engine.
    COMPUTED = "computed"
    #: Needs no model execution: answered by any one engine.
    READ = "read"
    #: Asked of every engine; the client gets one joined answer in the format of a single engine.
    JOINED = "joined"
    #: Changes or shows the state of engines: for operators only, sent to every engine.
    OPERATED = "operated"
    #: Answered by the gateway itself.
    GATEWAY = "gateway"
    #: A WebSocket, tunnelled to an aggregated engine.
    TUNNELLED = "tunnelled"
    #: Refused, because it cannot mean the same with several engines behind one address.
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row of the table. `why`: the reason for a refusal."""

    path: str
    methods: tuple[str, ...]
    kind: Kind
    why: str = ""


def _rows(kind: Kind, methods: str, paths: str, why: str = "") -> Iterator[Endpoint]:
    for path in paths.split():
        yield Endpoint(path, tuple(methods.split()), kind, why)


_ONE_ENGINE = "It concerns one engine: ask that engine itself."
_STATE = "Responses are kept by the engine that made them, and the gateway does not know which."
_NESTED = "Its body can hold, deep inside, fields that steer engines, which clients must not set."

#: The paths that stand for themselves.
ENDPOINTS: tuple[Endpoint, ...] = (
    *_rows(Kind.GATEWAY, "GET HEAD", "/health /liveness /ready /readiness /health_generate"),
    *_rows(Kind.GATEWAY, "GET POST", "/ping"),
    *_rows(Kind.GATEWAY, "GET", "/metrics /v1/models"),
    *_rows(Kind.SCHEDULED, "POST", "/v1/chat/completions /v1/completions /v1/messages /v1/responses"),
    *_rows(Kind.SCHEDULED, "POST PUT", "/generate"),
    *_rows(
        Kind.GENERATED,
        "POST",
        """/invocations /v1/chat/completions/batch /cohere/v2/chat
        /api/chat /api/generate /v1/audio/transcriptions /v1/audio/translations""",
    ),
    *_rows(Kind.COMPUTED, "POST PUT", "/classify /encode /v1/rerank"),
    *_rows(
        Kind.COMPUTED,
        "POST",
        """/v1/embeddings /v2/embed /pooling /score /v1/score /rerank /v2/rerank /v1/classify
        /generative_scoring /v1/systemone /v1/decisions""",
    ),
    *_rows(
        Kind.READ,
        "POST",
        """/tokenize /detokenize /v1/tokenize /v1/detokenize /v1/messages/count_tokens
        /v1/chat/completions/render /v1/completions/render /v1/messages/render /v1/responses/render
        /v1/chat/completions/derender /v1/completions/derender /parse_function_call /separate_reasoning
        /api/show""",
    ),
    *_rows(Kind.READ, "GET", "/version /get_model_info /model_info /tokenizer_info /api/tags"),
    *_rows(Kind.JOINED, "GET", "/load /v1/loads /get_load"),
    *_rows(
        Kind.OPERATED,
        "POST",
        """/flush_cache /reset_prefix_cache /reset_mm_cache /reset_encoder_cache
        /v1/load_lora_adapter /v1/unload_lora_adapter /load_lora_adapter /unload_lora_adapter
        /start_profile /stop_profile /sleep /wake_up /pause /resume
        /pause_generation /continue_generation /abort_request /abort_requests
        /release_memory_occupation /resume_memory_occupation /release_kv_cache_memory
        /update_weights_from_disk /update_weight_version /set_internal_state /slow_down
        /configure_logging /set_trace_level /freeze_gc""",
    ),
    *_rows(Kind.OPERATED, "GET", "/server_info /get_server_info /is_sleeping /is_paused /weight_info"),
    *_rows(Kind.TUNNELLED, "GET", "/v1/realtime"),
    *_rows(Kind.REFUSED, "POST", "/inference/v1/generate /vertex_generate", _NESTED),
    *_rows(
        Kind.REFUSED,
        "GET POST PUT DELETE",
        """/collective_rpc /scale_elastic_ep /is_scaling_elastic_ep /kv_event_sources /get_world_size
        /init_weight_transfer_engine /shutdown_weight_transfer_engine /start_weight_update
        /start_draft_weight_update /update_weights /finish_weight_update /weight_checker
        /inference/v1/abort_requests /init_weights_send_group_for_remote_instance
        /send_weights_to_remote_instance /get_remote_instance_transfer_engine_info
        /remote_instance_transfer_engine_info /init_weights_update_group /destroy_weights_update_group
        /update_weights_from_tensor /update_weights_from_distributed /update_weights_from_ipc
        /begin_weight_update /end_weight_update /get_weights_by_name /weights_checker /pd_role_switch
        /load_lora_adapter_from_tensors /open_session /close_session /add_external_corpus
        /remove_external_corpus /list_external_corpora /get_hicache_l3_cache_layout
        /hicache/storage-backend /hicache/storage-backend/clear /start_expert_distribution_record
        /stop_expert_distribution_record /dump_expert_distribution_record /fault_tolerance/apply
        /fault_tolerance/status""",
        _ONE_ENGINE,
    ),
)

#: Paths with a name in them, tried in this order.
_PATTERNS = (
    (re.compile(r"/v1/models/.+"), Endpoint("/v1/models/NAME", ("GET",), Kind.GATEWAY)),
    (
        re.compile(r"/v1/responses/[^/]+"),
        Endpoint("/v1/responses/ID", ("GET", "DELETE"), Kind.REFUSED, _STATE),
    ),
    (
        re.compile(r"/v1/responses/[^/]+/[^/]+"),
        Endpoint("/v1/responses/ID/…", ("GET", "POST"), Kind.REFUSED, _STATE),
    ),
)
_BY_PATH = {each.path: each for each in ENDPOINTS}

_ROLES = {
    Kind.GENERATED: frozenset((Role.AGGREGATED,)),
    Kind.TUNNELLED: frozenset((Role.AGGREGATED,)),
    Kind.COMPUTED: frozenset((Role.AGGREGATED, Role.PREFILL)),
    Kind.READ: frozenset(Role),
}
#: An unknown path under /v1/: no empty segment, nothing encoded twice, no slash at the end.
_UNKNOWN = re.compile(r"/v1(/[A-Za-z0-9._~:@-]+)+")
_DOTS = re.compile(r"\.\.|/\.(/|$)")


def roles_for(kind: Kind) -> frozenset[Role]:
    """Return the roles of the engines that may get a request of this kind."""
    return _ROLES[kind]


def is_operated(path: str) -> bool:
    """Return whether a path is for operators, who need no client key."""
    listed = _BY_PATH.get(path)
    return listed is not None and listed.kind is Kind.OPERATED


@lru_cache(maxsize=256)
def find(path: str) -> Endpoint | None:
    """Return what is to be done with a path, given decoded; None when it does not exist.

    Raises Refusal for another spelling of a listed path (404), and for a path that an engine, or a proxy
    before it, might take for another one (400).
    """
    listed = _BY_PATH.get(path)
    if listed is not None:
        return listed
    plain = plain_path(path)
    if plain in _BY_PATH:
        raise Refusal(404, "unknown_path", f"There is no {path[:100]!r} here: use {plain}.")
    if not path.startswith("/v1/"):
        return None
    for pattern, endpoint in _PATTERNS:
        if pattern.fullmatch(path):
            return endpoint
    if not _UNKNOWN.fullmatch(path) or _DOTS.search(path):
        raise Refusal(400, "invalid_request", "The path is not one of an OpenAI-compatible API.")
    return Endpoint(path, (), Kind.COMPUTED)
