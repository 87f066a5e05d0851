"""Decides which of Envoy's protobuf messages are read and written, and which of their fields.

Wire-compatible with Envoy's `ext_proc` (service/ext_proc/v3), `accesslog` (service, data) and `config/core`
of version 3: fields have Envoy's numbers, what is not named here is skipped. The messages are described here
and built when the module is loaded, in a package name of our own. Why not generated files: published stubs
(`xds-protos`) own the top package `envoy`, as the packaged server does; and code that `protoc` generates
demands a runtime at least as new as itself, where OpenTelemetry, say, may hold an older one.

Enumerations are plain numbers (they are on the wire too); a bool in a `oneof` says that it was sent.
"""

from typing import Any

from google.protobuf import duration_pb2, struct_pb2, wrappers_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

__all__ = [
    "ACCESS_LOG",
    "ADD_OR_OVERWRITE",
    "BUFFERED",
    "EXT_PROC",
    "FULL_DUPLEX_STREAMED",
    "ProcessingRequest",
    "ProcessingResponse",
    "StreamAccessLogsMessage",
    "StreamAccessLogsResponse",
]

#: The services' names, as paths of their methods begin.
EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"
ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"

#: `BodySendMode`: how Envoy sends bodies. 0 is "not at all".
STREAMED, BUFFERED, FULL_DUPLEX_STREAMED = 1, 2, 4
#: `HeaderAppendAction`.
ADD_OR_OVERWRITE = 2

_Kind = FieldDescriptorProto
_BOOL, _BYTES, _STRING = _Kind.TYPE_BOOL, _Kind.TYPE_BYTES, _Kind.TYPE_STRING
_INT, _UINT = _Kind.TYPE_INT32, _Kind.TYPE_UINT32
_STRUCT, _DURATION = "google.protobuf.Struct", "google.protobuf.Duration"
_PACKAGE = "headway.envoy"

#: Message → field → (number, type). A type in text is a message; "[]" after it: repeated; "{}": a map from
#: text; "|" after the name: of the message's `oneof`.
_MESSAGES: dict[str, dict[str, tuple[int, int | str]]] = {
    # config/core/v3
    "HeaderValue": {"key": (1, _STRING), "value": (2, _STRING), "raw_value": (3, _BYTES)},
    "HeaderMap": {"headers": (1, "HeaderValue[]")},
    "HeaderValueOption": {"header": (1, "HeaderValue"), "append_action": (3, _INT)},
    "Metadata": {"filter_metadata": (1, f"{_STRUCT}{{}}")},
    "SocketAddress": {"address": (2, _STRING), "port_value": (3, _UINT)},
    "Address": {"socket_address": (1, "SocketAddress")},
    # type/v3
    "HttpStatus": {"code": (1, _INT)},
    # service/ext_proc/v3: what Envoy says
    "ProtocolConfiguration": {"request_body_mode": (1, _INT), "response_body_mode": (2, _INT)},
    "HttpHeaders": {"headers": (1, "HeaderMap"), "end_of_stream": (3, _BOOL)},
    "HttpBody": {"body": (1, _BYTES), "end_of_stream": (2, _BOOL)},
    "HttpTrailers": {"trailers": (1, "HeaderMap")},
    "ProcessingRequest": {
        "request_headers|": (2, "HttpHeaders"),
        "response_headers|": (3, "HttpHeaders"),
        "request_body|": (4, "HttpBody"),
        "response_body|": (5, "HttpBody"),
        "request_trailers|": (6, "HttpTrailers"),
        "response_trailers|": (7, "HttpTrailers"),
        "metadata_context": (8, "Metadata"),
        "observability_mode": (10, _BOOL),
        "protocol_config": (11, "ProtocolConfiguration"),
    },
    # and what it is answered
    "HeaderMutation": {"set_headers": (1, "HeaderValueOption[]"), "remove_headers": (2, "string[]")},
    "StreamedBodyResponse": {"body": (1, _BYTES), "end_of_stream": (2, _BOOL)},
    "BodyMutation": {"body|": (1, _BYTES), "streamed_response|": (3, "StreamedBodyResponse")},
    "CommonResponse": {"header_mutation": (2, "HeaderMutation"), "body_mutation": (3, "BodyMutation")},
    "HeadersResponse": {"response": (1, "CommonResponse")},
    "BodyResponse": {"response": (1, "CommonResponse")},
    "TrailersResponse": {"header_mutation": (1, "HeaderMutation")},
    "ImmediateResponse": {
        "status": (1, "HttpStatus"),
        "headers": (2, "HeaderMutation"),
        "body": (3, _BYTES),
        "details": (5, _STRING),
    },
    "ProcessingResponse": {
        "request_headers|": (1, "HeadersResponse"),
        "response_headers|": (2, "HeadersResponse"),
        "request_body|": (3, "BodyResponse"),
        "response_body|": (4, "BodyResponse"),
        "request_trailers|": (5, "TrailersResponse"),
        "response_trailers|": (6, "TrailersResponse"),
        "immediate_response|": (7, "ImmediateResponse"),
        "dynamic_metadata": (8, _STRUCT),
        "override_message_timeout": (10, _DURATION),
    },
    # data/accesslog/v3
    "ResponseFlags": {
        "no_healthy_upstream": (2, _BOOL),
        "upstream_request_timeout": (3, _BOOL),
        "upstream_remote_reset": (5, _BOOL),
        "upstream_connection_failure": (6, _BOOL),
        "upstream_connection_termination": (7, _BOOL),
        "downstream_connection_termination": (15, _BOOL),
        "upstream_protocol_error": (24, _BOOL),
    },
    "AccessLogCommon": {
        "time_to_first_upstream_rx_byte": (9, _DURATION),
        "upstream_remote_address": (13, "Address"),
        "response_flags": (16, "ResponseFlags"),
        "metadata": (17, "Metadata"),
        "duration": (23, _DURATION),
        "upstream_request_attempt_count": (24, _UINT),
        "intermediate_log_entry": (26, _BOOL),
    },
    "HTTPRequestProperties": {"request_id": (9, _STRING)},
    "HTTPResponseProperties": {"response_code": (1, "google.protobuf.UInt32Value")},
    "HTTPAccessLogEntry": {
        "common_properties": (1, "AccessLogCommon"),
        "request": (3, "HTTPRequestProperties"),
        "response": (4, "HTTPResponseProperties"),
    },
    # service/accesslog/v3
    "HTTPAccessLogEntries": {"log_entry": (1, "HTTPAccessLogEntry[]")},
    "StreamAccessLogsMessage": {"http_logs|": (2, "HTTPAccessLogEntries")},
    "StreamAccessLogsResponse": {},
}


def _describe(name: str, fields: dict[str, tuple[int, int | str]]) -> DescriptorProto:
    message = DescriptorProto(name=name)
    for key, (number, kind) in fields.items():
        field = message.field.add(name=key.rstrip("|"), number=number, label=_Kind.LABEL_OPTIONAL)
        if key.endswith("|"):
            if not message.oneof_decl:
                message.oneof_decl.add(name="kind")
            field.oneof_index = 0
        _type(message, field, kind)
    return message


def _type(message: DescriptorProto, field: FieldDescriptorProto, kind: int | str) -> None:
    if isinstance(kind, int):
        field.type = kind
        return
    if kind.endswith("{}"):
        entry = message.nested_type.add(name=f"{field.name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_Kind.LABEL_OPTIONAL, type=_STRING)
        value = entry.field.add(name="value", number=2, label=_Kind.LABEL_OPTIONAL)
        _type(entry, value, kind.removesuffix("{}"))
        kind = f"{message.name}.{entry.name}[]"
    if kind.endswith("[]"):
        field.label = _Kind.LABEL_REPEATED
        kind = kind.removesuffix("[]")
    if kind == "string":
        field.type = _STRING
        return
    field.type = _Kind.TYPE_MESSAGE
    field.type_name = f".{kind}" if kind.startswith("google.") else f".{_PACKAGE}.{kind}"


def _build() -> dict[str, Any]:
    pool = DescriptorPool()
    wanted = (duration_pb2, struct_pb2, wrappers_pb2)
    for module in wanted:
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    ours = FileDescriptorProto(name="headway/envoy.proto", package=_PACKAGE, syntax="proto3")
    ours.dependency.extend(module.DESCRIPTOR.name for module in wanted)
    ours.message_type.extend(_describe(name, fields) for name, fields in _MESSAGES.items())
    pool.AddSerializedFile(ours.SerializeToString())
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES}


_built = _build()
ProcessingRequest = _built["ProcessingRequest"]
ProcessingResponse = _built["ProcessingResponse"]
StreamAccessLogsMessage = _built["StreamAccessLogsMessage"]
StreamAccessLogsResponse = _built["StreamAccessLogsResponse"]
