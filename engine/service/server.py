"""The gRPC server: bind, load, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from reelstep.engine.resolve import Engine
from reelstep.engine.service.generation import SERVICE, MediaService
from reelstep.engine.service.lora import SERVICE as LORA_SERVICE
from reelstep.engine.service.lora import LoraService
from reelstep.errors import ConfigError

log = logging.getLogger(__name__)

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
MAX_LORAS = 16
"""Unless the operator says otherwise. Each holds at most the numbers of the bundle's rank, 4 bytes each."""
LAST_WORDS_S = 1.0
"""For writes that are under way when the work itself has ended. One open Health.Watch would use up all of it, so it is short."""


@dataclass(frozen=True)
class ServerOptions:
    """Where and how to serve."""

    host: str = "127.0.0.1"
    port: int = 50051  # 0 takes a free one
    allow_plaintext: bool = False  # on an address that other machines reach
    reflection: bool = True
    grace_s: float = 30.0  # for running work after SIGTERM
    max_request_s: float = 600.0  # the deadline of a client that sets none, and the longest that is granted
    max_receive_bytes: int = 9 << 20  # the largest picture that models take, and its request
    media_threads: int = 2
    allow_lora_uploads: bool = False  # any client may then load LoRAs, and unload them
    max_loras: int = MAX_LORAS  # of one model, that clients may bring it up to

    def __post_init__(self) -> None:
        if self.host not in ("127.0.0.1", "::1", "localhost") and not self.allow_plaintext:
            raise ConfigError(f"{self.host} can be reached from other machines and the connection is not encrypted; pass --allow-plaintext to accept that")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not in 0..65535")
        if not (self.grace_s >= 0 and self.max_request_s > 0):
            raise ConfigError(f"grace {self.grace_s} s must be at least 0, and the longest request {self.max_request_s} s more than 0")
        if self.max_loras < 1:
            raise ConfigError(f"at most {self.max_loras} LoRAs; a number above 0, or else let clients load none")

    def channel_options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 0),  # else a second server takes the port too and half of the calls go to each
            ("grpc.max_receive_message_length", self.max_receive_bytes),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # clients that ping in a silent call are not cut off
        ]


def serve(load: Callable[[], Engine], options: ServerOptions, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cancels what still runs.

    The port is bound first, so that a taken one fails at once; health says SERVING when `load` has returned, which is also when
    `announce` gets the address. Raises ConfigError for a port that cannot be bound, and whatever `load` raises.
    """
    asyncio.run(Server(options).run(load, announce))


class Server:
    """One process's server. Lives on the running event loop."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    async def run(self, load: Callable[[], Engine], announce: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(self.options.media_threads, "media") as media_threads:
            options = self.options
            self.service = MediaService(media_threads, options.max_request_s)
            self.loras = LoraService(self.service.ready, options.allow_lora_uploads, options.max_loras, options.max_request_s)
            self.health = health.aio.HealthServicer()
            self.grpc = grpc.aio.server(options=self.options.channel_options())
            self._add_services()
            address = bind(self.grpc, self.options)
            await self._set_health(NOT_SERVING)
            await self.grpc.start()
            try:
                await self._serve(load, lambda: announce(address))
            finally:
                await self.grpc.stop(LAST_WORDS_S)

    async def _serve(self, load: Callable[[], Engine], announce: Callable[[], None]) -> None:
        engine = await asyncio.to_thread(load)  # a signal in here ends the process: there is no work to lose
        try:
            self._catch_signals()
            self.service.open(engine)
            await self._set_health(SERVING)
            announce()
            await self.stop.wait()
            await self._drain()
        finally:
            await asyncio.to_thread(engine.close, 0.0)
            await self._wait_idle(LAST_WORDS_S)

    async def _drain(self) -> None:
        """Refuse new work and wait for the running, which is counted here because `grpc.aio` also waits for health watchers."""
        self.service.closed = "the server is shutting down"
        await self.health.enter_graceful_shutdown()
        log.info("draining %d running requests", len(self.service.running))
        hurried = asyncio.ensure_future(self.hurry.wait())
        idle = asyncio.ensure_future(self.service.idle.wait())
        _, pending = await asyncio.wait((hurried, idle), timeout=self.options.grace_s, return_when=asyncio.FIRST_COMPLETED)
        for waiter in pending:
            waiter.cancel()

    async def _wait_idle(self, timeout_s: float) -> None:
        """Let calls that the engine has just ended tell their clients."""
        idle = asyncio.ensure_future(self.service.idle.wait())
        await asyncio.wait((idle,), timeout=timeout_s)
        idle.cancel()

    def _add_services(self) -> None:
        self.grpc.add_generic_rpc_handlers((self.service.handler(), self.loras.handler()))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        if self.options.reflection:
            names = (SERVICE, LORA_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
            reflection.enable_server_reflection(names, self.grpc)
            self.grpc.add_generic_rpc_handlers((reflection_v1(names),))

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()

    async def _set_health(self, status: int) -> None:
        for name in (health.OVERALL_HEALTH, SERVICE):
            await self.health.set(name, status)


def bind(server: grpc.aio.Server, options: ServerOptions) -> str:
    """Take the port. Returns host:port. Raises ConfigError."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.port}"
    try:
        return f"{host}:{server.add_insecure_port(address)}"
    except RuntimeError as error:
        text = f"cannot listen on {address}: the port is in use or not ours to take; choose another with --port, or stop the other server"
        raise ConfigError(text) from error


def reflection_v1(names: tuple[str, ...]) -> grpc.GenericRpcHandler:
    """The v1 service, whose messages are those of v1alpha under another name; grpcio-reflection has only that one."""
    servicer = reflection.aio.ReflectionServicer(names)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": method})
