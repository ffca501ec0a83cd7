"""LoraService: adapters that clients load into the running server, and unload. Each method checks, calls the engine and returns."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import google_crc32c
import grpc

from reelstep.engine import request as core
from reelstep.engine.resolve import Adaptable, Engine, Served, choose_model
from reelstep.engine.service import messages
from reelstep.engine.service.calls import Context, Read, client_stream, unary
from reelstep.errors import ConfigError, DeadlineExceeded, FieldViolation, InvalidRequest, NotAllowed, Overloaded, StorageError, UnsupportedRequest
from reelstep.protos.reelstep.v1 import lora_pb2 as pb

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["LoraService"].full_name
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_CONFIG_BYTES = 64 << 10
MAX_UPLOADS = 4
"""At once, so that what they have sent so far is bounded too."""
RETRY_AFTER_S = 5.0


class LoraService:
    """The methods of reelstep.v1.LoraService.

    ready: the engine, or raises Unavailable. allowed: whether clients may load and unload. most: adapters of one model. max_upload_s: for one upload.
    """

    def __init__(self, ready: Callable[[], Engine], allowed: bool, most: int, max_upload_s: float) -> None:
        self._ready, self._allowed, self._most, self._max_upload_s = ready, allowed, most, max_upload_s
        self._uploads = 0

    def handler(self) -> grpc.GenericRpcHandler:
        methods = {"LoadLora": client_stream(pb.LoadLoraRequest, self.load), "UnloadLora": unary(pb.UnloadLoraRequest, self.unload)}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def load(self, read: Read[pb.LoadLoraRequest], context: Context) -> pb.LoadLoraResponse:
        engine = self._open()
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} LoRAs are being uploaded, the most at once; try again in {RETRY_AFTER_S:g} s", RETRY_AFTER_S)
        self._uploads += 1
        try:
            async with asyncio.timeout(self._max_upload_s):
                loaded = await self._load(engine, read)
            log.info("%s loaded LoRA %s of %s, sha256 %s", context.peer(), loaded.lora.name, loaded.model, loaded.lora.sha256)
            return loaded
        except TimeoutError as error:
            raise DeadlineExceeded("uploading") from error
        finally:
            self._uploads -= 1

    async def unload(self, request: pb.UnloadLoraRequest, context: Context) -> pb.UnloadLoraResponse:
        engine = self._open()
        model = choose_model(request.model, engine.models).name
        engine.unload_lora(model, request.name)
        log.info("%s unloaded LoRA %s of %s", context.peer(), request.name, model)
        return pb.UnloadLoraResponse()

    def _open(self) -> Engine:
        """Refuses before any byte of an upload is read. Raises NotAllowed or Unavailable."""
        if not self._allowed:
            raise NotAllowed("this server lets no client load or unload a LoRA; start it with --allow-lora-uploads, or with --lora NAME=FILE")
        return self._ready()

    async def _load(self, engine: Engine, read: Read[pb.LoadLoraRequest]) -> pb.LoadLoraResponse:
        start = (await read() or pb.LoadLoraRequest()).start
        served = choose_model(start.model, engine.models)
        check_start(start, served)
        with TemporaryDirectory(prefix="reelstep-lora-") as folder:  # goes however this ends; nothing that a client says is part of a path
            file = Path(folder) / "adapter.safetensors"
            try:
                await receive(read, start, file)
            except OSError as error:
                raise StorageError(f"the upload could not be kept: {error.strerror}; the server needs {start.size_bytes} bytes of temporary space") from error
            try:
                loaded = await asyncio.to_thread(engine.load_lora, served.name, start.name, file, start.adapter_config, self._most, start.replace)
            except ConfigError as error:
                raise InvalidRequest([FieldViolation("file", str(error))]) from error
        return pb.LoadLoraResponse(model=served.name, lora=messages.to_lora(start.name, loaded))


def check_start(start: pb.LoadLoraRequest.Start, served: Served) -> None:
    """Raises UnsupportedRequest for a model that takes no LoRA, InvalidRequest for fields, before any byte of the file."""
    takes = served.settings.lora
    if takes is None:
        raise UnsupportedRequest(f"model {served.name!r} was compiled to take no LoRA; serve a bundle compiled with --lora-rank")
    bad: list[FieldViolation] = []
    rule = "up to 64 letters, digits, '.', '_' and '-', the first of them a letter or a digit"
    core.check(bad, NAME.fullmatch(start.name) is not None, "name", f"{start.name[:80]!r} is not {rule}")
    most = most_bytes(takes)
    says = f"{start.size_bytes}; a LoRA of rank {takes.rank}, the most that this bundle takes, has 1 to {most} bytes: send such a one, or compile with a larger"
    core.check(bad, 0 < start.size_bytes <= most, "size_bytes", f"{says} --lora-rank")
    core.check(bad, len(start.sha256) == hashlib.sha256().digest_size, "sha256", f"{len(start.sha256)} bytes; it has {hashlib.sha256().digest_size}")
    config_bytes = len(start.adapter_config.encode())
    core.check(bad, config_bytes <= MAX_CONFIG_BYTES, "adapter_config", f"{config_bytes} bytes; at most {MAX_CONFIG_BYTES}")
    if bad:
        raise InvalidRequest(bad)


def most_bytes(takes: Adaptable) -> int:
    """The largest file that an adapter of this rank is saved in: numbers of 4 bytes, and room for keys, alphas and metadata."""
    numbers = takes.rank * sum(inputs + outputs for _, inputs, outputs in takes.layers)
    return 4 * numbers + 1024 * len(takes.layers) + (1 << 20)


async def receive(read: Read[pb.LoadLoraRequest], start: pb.LoadLoraRequest.Start, file: Path) -> None:
    """Write the pieces to the file. Raises InvalidRequest for one that is damaged or out of place, and for a whole that is not what `start` says."""
    digest, size = hashlib.sha256(), 0
    with file.open("xb") as out:
        while (part := await read()) is not None:
            chunk = part.chunk
            bad: list[FieldViolation] = []
            core.check(bad, part.WhichOneof("part") == "chunk" and 0 < len(chunk.data) <= core.CHUNK_BYTES, "chunk.data", f"1 to {core.CHUNK_BYTES} bytes")
            core.check(bad, chunk.offset == size, "chunk.offset", f"{chunk.offset}, where byte {size} was due; send the file again")
            core.check(bad, google_crc32c.value(chunk.data) == chunk.crc32c, "chunk.crc32c", f"the piece at byte {size} is damaged; send the file again")
            size += len(chunk.data)
            core.check(bad, size <= start.size_bytes, "size_bytes", f"more than {start.size_bytes} bytes came; say how many there are")
            if bad:
                raise InvalidRequest(bad)
            digest.update(chunk.data)
            await asyncio.to_thread(out.write, chunk.data)
    if size != start.size_bytes:
        raise InvalidRequest([FieldViolation("size_bytes", f"{size} of {start.size_bytes} bytes came; send the file again")])
    if digest.digest() != start.sha256:
        raise InvalidRequest([FieldViolation("sha256", "is of other bytes than those that came; send the file again")])
