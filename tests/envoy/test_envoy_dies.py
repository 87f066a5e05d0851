"""An Envoy that dies takes its own requests with it alone; the port may ask for a certificate."""

import asyncio
import datetime

import aiohttp
import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from envoys import Envoy, front, run, until

from headway.core.errors import ConfigError
from headway.hosts.envoy.config import SecureSpec
from headway.hosts.envoy.messages import ACCESS_LOG, StreamAccessLogsMessage, StreamAccessLogsResponse
from headway.hosts.envoy.secure import pem_of

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


async def ask(client):
    async with client.post("/v1/chat/completions", json=CHAT) as answer:
        return answer.status


def second_envoy(front):
    envoy = Envoy("override-host")
    envoy.ask(front.picker.grpc_port)
    envoy.knows(*(int(each.url.rpartition(":")[2]) for each in front.engines))
    return envoy


@pytest.mark.parametrize("processors", [1, 2])
def test_of_two_envoys_the_dead_ones_requests_are_over_within_seconds_and_the_others_go_on(processors):
    async def test():
        tables = {"accounting": {"reconnect_s": 0.3}, "server": {"processors": processors}}
        async with front(engines=1, **tables) as f:
            f.engines[0].go.clear()
            lost = [asyncio.create_task(f.chat()) for _ in range(3)]
            await until(lambda: f.picker.picks.under_way == 3, "the first Envoy's requests")
            async with second_envoy(f) as other, aiohttp.ClientSession(other.url) as client:
                kept = [asyncio.create_task(ask(client)) for _ in range(2)]
                await until(lambda: f.picker.picks.under_way == 5, "the second Envoy's requests")
                f.envoy.process.kill()
                await asyncio.gather(*lost, return_exceptions=True)
                await until(lambda: f.picker.picks.under_way == 2, "the end of the first Envoy's requests")
                assert f.oddities("envoy_gone") == 3
                f.engines[0].go.set()
                assert [await each for each in kept] == [200, 200]
                await until(lambda: f.picker.picks.under_way == 0, "the access log")
                assert f.oddities("envoy_gone") == 3 and f.oddities("unknown_key") == 0

    run(test())


def test_an_access_log_that_others_write_ends_no_request():
    async def test():
        async with front(engines=1) as f:
            f.engines[0].go.clear()
            asked = asyncio.create_task(f.chat())
            await until(lambda: f.engines[0].requests, "the request")
            forged = {"log_entry": [{"request": {"request_id": f.engines[0].requests[0][1]["x-request-id"]}}]}
            async with grpc.aio.insecure_channel(f"127.0.0.1:{f.picker.grpc_port}") as channel:
                log = channel.stream_unary(
                    f"/{ACCESS_LOG}/StreamAccessLogs",
                    request_serializer=StreamAccessLogsMessage.SerializeToString,
                    response_deserializer=StreamAccessLogsResponse.FromString,
                )
                await log(iter([StreamAccessLogsMessage(http_logs=forged)]))
            assert f.oddities("not_its_envoy") == 1
            assert f.picker.picks.under_way == 1
            f.engines[0].go.set()
            assert (await asked)[0] == 200
            await until(lambda: f.picker.picks.under_way == 0, "the access log")

    run(test())


# Client certificates


def authority(folder):
    """Write an authority's certificate and a client's that it signed; return the paths."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name, key, issuer, signer, *, is_authority):
        return (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .sign(signer, hashes.SHA256())
        )

    ca_key, client_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    ca = certificate("ca", ca_key, "ca", ca_key, is_authority=True)
    client = certificate("envoy", client_key, "ca", ca_key, is_authority=False)
    plain = serialization.NoEncryption()
    files = {name: folder / name for name in ("ca.crt", "client.crt", "client.key")}
    files["ca.crt"].write_bytes(ca.public_bytes(pem))
    files["client.crt"].write_bytes(client.public_bytes(pem))
    files["client.key"].write_bytes(client_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return {name: str(file) for name, file in files.items()}


def _named(name):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


@pytest.mark.parametrize(("shows", "processors", "status"), [(True, 1, 200), (True, 2, 200), (False, 1, 500)])
def test_with_a_client_ca_only_an_envoy_with_a_certificate_is_served(tmp_path, shows, processors, status):
    files = authority(tmp_path)

    async def test():
        def change(envoy):
            envoy.ext_proc["failure_mode_allow"] = False
            if shows:
                context = envoy.cluster("picker")["transport_socket"]["typed_config"]["common_tls_context"]
                context["tls_certificates"] = [
                    {
                        "certificate_chain": {"filename": files["client.crt"]},
                        "private_key": {"filename": files["client.key"]},
                    }
                ]

        tls = {"mode": "self-signed", "client_ca": files["ca.crt"]}
        async with front(change=change, tls=tls, server={"processors": processors}) as f:
            assert (await f.chat())[0] == status

    run(test())


def test_a_client_ca_that_is_none_is_said_in_one_line(tmp_path):
    (tmp_path / "ca.crt").write_text("nothing")
    with pytest.raises(ConfigError, match=r"tls\.client_ca: no certificates in "):
        pem_of(SecureSpec(client_ca=tmp_path / "ca.crt"))
