"""A server's life: bind, load, health, reflection, drain, and being killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from reelstep.engine.client import Client
from reelstep.engine.resolve import Engine
from reelstep.engine.service.generation import SERVICE
from reelstep.engine.service.server import ServerOptions
from reelstep.errors import BundleError, Cancelled, ConfigError, Unavailable
from reelstep.tests.engine.service.fake_engine import FakeEngine
from reelstep.tests.engine.service.fake_server import MODULE, running_server
from reelstep.tests.engine.service.in_process import Served, ThreadServer, wait_until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def check(channel: grpc.Channel, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status)


def test_health_knows_the_process_and_the_service_and_nothing_else(fake: Served) -> None:
    with grpc.insecure_channel(fake.address) as channel:
        assert check(channel, "") == check(channel, SERVICE) == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(channel, "nonesuch")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_service_and_gives_its_schema(fake: Served, version: str) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    with grpc.insecure_channel(fake.address) as channel:
        method = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        listed, described = method(iter(requests), timeout=5)
    assert SERVICE in [s.name for s in listed.list_services_response.service]
    assert any(b"GenerationSpec" in data for data in described.file_descriptor_response.file_descriptor_proto)


def test_before_the_models_are_loaded_health_says_so_and_calls_are_turned_away() -> None:
    release, ready, seen = threading.Event(), threading.Event(), threading.Event()
    held: list[ThreadServer] = []
    port: list[int] = []

    def load() -> Engine:
        seen.set()
        assert release.wait(10)
        return FakeEngine()

    async def run() -> None:
        server = ThreadServer(ServerOptions(port=free_port(), grace_s=0.1))
        held.append(server)
        port.append(server.options.port)
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(server.stop.set))
        await server.run(load, lambda _: ready.set())

    stop: list[object] = []
    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert seen.wait(5)
    address = f"127.0.0.1:{port[0]}"
    with grpc.insecure_channel(address) as channel, Client(address) as client:
        assert check(channel, "") == check(channel, SERVICE) == NOT_SERVING
        with pytest.raises(Unavailable, match="loading its models") as caught:
            client.generate("a fox")
        assert caught.value.retry_after_s == 1.0
        release.set()
        assert ready.wait(5)
        assert check(channel, SERVICE) == SERVING
        assert client.generate("a fox").artifacts
    stop[0]()  # type: ignore[operator]
    thread.join(10)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_bundle_that_does_not_load_ends_the_server_with_its_error() -> None:
    def load() -> Engine:
        raise BundleError("graph.pt2 is damaged")

    with pytest.raises(BundleError, match="damaged"):
        asyncio.run(ThreadServer(ServerOptions(port=0)).run(load, lambda _: None))


def test_two_servers_on_one_port_fail_with_a_clear_error(fake: Served) -> None:
    port = fake.address.rsplit(":", 1)[1]
    second = subprocess.run([sys.executable, "-m", MODULE, port, "1"], capture_output=True, text=True, timeout=30, cwd="/")
    assert second.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
    assert "--port" in second.stderr
    assert "Traceback" not in second.stderr
    assert second.stdout == ""


def test_a_port_is_not_opened_to_other_machines_in_plaintext_unless_asked() -> None:
    with pytest.raises(ConfigError, match="--allow-plaintext"):
        ServerOptions(host="0.0.0.0")
    assert ServerOptions(host="0.0.0.0", allow_plaintext=True).host == "0.0.0.0"
    with pytest.raises(ConfigError, match="port"):
        ServerOptions(port=70000)


def in_background(client: Client, prompt: str) -> tuple[threading.Thread, list[object]]:
    """A request on a thread; the list gets its events and then its error, if any."""
    seen: list[object] = []

    def run() -> None:
        try:
            client.generate(prompt, steps=20, on_event=seen.append)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: bool(seen), 10)
    return thread, seen


def test_sigterm_lets_running_work_end_refuses_new_work_and_exits_with_0() -> None:
    with running_server() as (process, address), Client(address) as client, grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert next(watch).status == SERVING
        thread, seen = in_background(client, "slow")  # one second of work
        process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate("a fox")
        thread.join(10)
        assert type(seen[-1]).__name__ == "Generation"
        assert process.wait(5) == 0


def test_work_that_outlives_the_grace_is_cancelled_and_told_so() -> None:
    with running_server(grace_s=0.3) as (process, address), Client(address) as client:
        thread, seen = in_background(client, "endless")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert time.monotonic() - began < 2.5
        thread.join(5)
        assert isinstance(seen[-1], Cancelled)


def test_a_second_signal_does_not_wait_for_the_grace() -> None:
    with running_server(grace_s=60) as (process, address), Client(address) as client:
        thread, seen = in_background(client, "endless")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        thread.join(5)
        assert isinstance(seen[-1], Cancelled)


def test_a_server_that_is_killed_while_a_client_streams_is_unavailable() -> None:
    with running_server() as (process, address), Client(address) as client:
        thread, seen = in_background(client, "endless")
        process.kill()
        thread.join(10)
        assert isinstance(seen[-1], Unavailable)
        assert "went away while it was generating" in str(seen[-1])


def test_the_service_and_the_client_need_no_torch() -> None:
    code = "import sys, reelstep.engine.service.server, reelstep.engine.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, cwd="/").returncode == 0
