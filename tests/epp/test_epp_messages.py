"""The wire: bytes as Envoy writes them, with its field numbers spelt out."""

from headway.hosts.envoy.messages import (
    ProcessingRequest,
    ProcessingResponse,
    StreamAccessLogsMessage,
)


def field(number, value):
    """A length-delimited field: what strings, bytes and messages are on the wire."""
    value = value if isinstance(value, bytes) else value.encode()
    assert number < 16 and len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def flag(number, value=1):
    return bytes([number << 3, value])


def test_request_headers_of_envoy_are_read():
    header = field(1, ":path") + field(3, "/v1/completions")
    mode = field(11, flag(1, 4) + flag(2, 1))
    wire = field(2, field(1, field(1, header)) + flag(3)) + mode
    message = ProcessingRequest.FromString(wire)
    assert message.WhichOneof("kind") == "request_headers" and message.request_headers.end_of_stream
    (told,) = message.request_headers.headers.headers
    assert (told.key, told.raw_value) == (":path", b"/v1/completions")
    assert (message.protocol_config.request_body_mode, message.protocol_config.response_body_mode) == (4, 1)


def test_a_subset_hint_of_envoy_is_read():
    endpoints = field(6, field(1, field(3, "10.0.0.1:80")))  # Value.list_value of Values with string_value
    entry = field(1, field(1, "x-gateway-destination-endpoint-subset") + field(2, endpoints))
    metadata = field(1, field(1, "envoy.lb.subset_hint") + field(2, entry))
    message = ProcessingRequest.FromString(field(8, metadata))
    said = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    assert list(said["x-gateway-destination-endpoint-subset"]) == ["10.0.0.1:80"]


def test_bodies_go_back_as_streamed_responses():
    reply = ProcessingResponse(
        request_body={
            "response": {"body_mutation": {"streamed_response": {"body": b"{}", "end_of_stream": True}}}
        }
    )
    assert reply.SerializeToString() == field(3, field(1, field(3, field(3, field(1, "{}") + flag(2)))))


def test_a_destination_is_a_header_that_replaces_and_metadata():
    option = {"header": {"key": "a", "raw_value": b"b"}, "append_action": 2}
    mutation = {"header_mutation": {"set_headers": [option], "remove_headers": ["c"]}}
    reply = ProcessingResponse(request_headers={"response": mutation})
    expected = field(1, field(1, "a") + field(3, "b")) + flag(3, 2)
    assert reply.SerializeToString() == field(1, field(1, field(2, field(1, expected) + field(2, "c"))))


def test_an_immediate_response_has_a_status_and_a_body():
    reply = ProcessingResponse(immediate_response={"status": {"code": 99}, "body": b"no", "details": "why"})
    assert reply.SerializeToString() == field(7, field(1, flag(1, 99)) + field(3, "no") + field(5, "why"))


def test_an_entry_of_the_access_log_is_read():
    address = field(1, field(2, "10.0.0.1") + flag(3, 80))
    common = b"".join(
        [
            field(9, flag(1, 2)),  # time_to_first_upstream_rx_byte: 2 s
            field(13, address),
            bytes([16 << 3 & 0x7F | 2 | 0x80, 1]) + bytes([2]) + flag(6),  # response_flags
        ]
    )
    entry = field(1, common) + field(4, field(1, flag(1, 100)))
    message = StreamAccessLogsMessage.FromString(field(2, field(1, entry)))
    (told,) = message.http_logs.log_entry
    assert told.common_properties.time_to_first_upstream_rx_byte.seconds == 2
    assert told.common_properties.upstream_remote_address.socket_address.port_value == 80
    assert told.common_properties.response_flags.upstream_connection_failure
    assert told.response.response_code.value == 100


def test_what_is_not_named_is_skipped():
    message = ProcessingRequest.FromString(field(15, "new in a later version"))
    assert message.WhichOneof("kind") is None
