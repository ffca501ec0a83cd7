"""LoRAs loaded into a running server and dropped from it, over a real connection, by an engine whose results are closed forms."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from reelstep import __main__ as cli
from reelstep.compiler.lora import Layer, Layout
from reelstep.engine.checkpoints import Checkpoints
from reelstep.engine.client import AsyncClient, Client, from_error
from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import Engine, warmed_up
from reelstep.engine.lora import BASE
from reelstep.engine.request import CHUNK_BYTES, PEFT_FILE, Defaults
from reelstep.engine.result import Generation
from reelstep.engine.runner import Runner
from reelstep.engine.served import ServedModel, read_loras
from reelstep.engine.service import lora as service
from reelstep.engine.service.generation import MediaService
from reelstep.engine.service.lora import SERVICE, most_bytes
from reelstep.engine.service.server import ServerOptions
from reelstep.errors import (
    AlreadyExists,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    NotAllowed,
    NotFound,
    Overloaded,
    ReelstepError,
    Unavailable,
    UnsupportedRequest,
)
from reelstep.protos.reelstep.v1 import lora_pb2 as pb
from reelstep.tests.engine.conftest import PROGRAMS, SETTINGS, TARGET, Heard, denoise, make_model, make_request
from reelstep.tests.engine.service.fake_engine import FakeEngine, FakeModel, FakeSettings
from reelstep.tests.engine.service.in_process import served, wait_until

LAYOUT = Layout(2, (Layer("blocks.0.q", 3, 3),))
IMAGE = Defaults("euler", "linear", 4, 1.0, 1, 8.0)
ALLOWED = ServerOptions(port=0, grace_s=0.2, allow_lora_uploads=True)
QUARTER, EIGHTH = 0.25, 0.125
"""How far files here move the target."""


def toy_model(loras: Mapping[str, Path] | None = None) -> ServedModel:
    settings = replace(SETTINGS, tasks=("text_to_video", "text_to_image"), lora=LAYOUT, defaults={**SETTINGS.defaults, "text_to_image": IMAGE})
    return replace(make_model(), settings=settings, loras=read_loras("toy", settings, loras or {}))


def moved(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`denoise` whose target moves by the first entry of the change."""
    ((down, up),) = LAYOUT.pairs(given["lora"])
    shift = (down[:, :1] @ up[:, :, :1])[:, :, :, None, None]
    return denoise({**{k: v for k, v in given.items() if k != "lora"}, "condition": given["condition"] + shift})


@contextmanager
def server(
    options: ServerOptions = ALLOWED, loras: Mapping[str, Path] | None = None, adapted: Callable[..., Any] = moved, **limits: Any
) -> Iterator[tuple[Client, Engine]]:
    programs = PROGRAMS | {("denoise_lora", profile): adapted for profile in ("video", "image")}
    engine = Engine({"toy": toy_model(loras)}, Inline({"toy": Runner(programs, dict.fromkeys(programs, 8))}), **limits)
    with served(engine, options) as running, Client(running.address) as client:  # type: ignore[arg-type]  # a real engine
        yield client, engine


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Client, Engine]]:
    """A server that allows them, whose temporary files would be seen in tmp_path/temporary."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with server() as running:
        yield running
    assert list((tmp_path / "temporary").iterdir()) == []


def pairs(shift: float, rank: int = 1, prefix: str = "transformer.") -> dict[str, Tensor]:
    """Matrices whose product is `shift` everywhere."""
    made = {"A": torch.ones(rank, 3), "B": torch.full((3, rank), shift / rank)}
    return {f"{prefix}blocks.0.q.lora_{letter}.weight": matrix for letter, matrix in made.items()}


def saved(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, name: str = "style") -> Path:
    file = folder / f"{name}.safetensors"
    save_file(dict(tensors), file, metadata)
    return file


def picture(client: Client, prompt: str = "a fox", **options: Any) -> Generation:
    return client.generate(prompt, media_type="image/png", seed=3, timeout=20, **options)


def level(got: Generation) -> int:
    """The one value that all pixels have."""
    return int(np.unique(np.asarray(Image.open(io.BytesIO(got.artifacts[0].data)))).item())


def drawn(shift: float) -> int:
    """Of the exact solution, which is the target."""
    return round((TARGET + shift + 1) * 127.5)


def names(client: Client) -> list[str]:
    (model,) = client.models()
    return [lora.name for lora in model.loras]


def upload(client: Client, parts: Iterator[pb.LoadLoraRequest] | list[pb.LoadLoraRequest], timeout: float = 10) -> pb.LoadLoraResponse:
    """By a plain gRPC client."""
    with grpc.insecure_channel(client.address) as channel:
        method = channel.stream_unary(f"/{SERVICE}/LoadLora", pb.LoadLoraRequest.SerializeToString, pb.LoadLoraResponse.FromString)
        try:
            return method(iter(parts), timeout=timeout)  # type: ignore[no-any-return]  # a channel's methods are untyped
        except grpc.RpcError as error:
            raise from_error(error, client.address, started=False) from error


def start_of(data: bytes, **changed: Any) -> pb.LoadLoraRequest:
    start = {"name": "style", "size_bytes": len(data), "sha256": hashlib.sha256(data).digest()}
    return pb.LoadLoraRequest(start=pb.LoadLoraRequest.Start(**{**start, **changed}))


def piece_of(whole: bytes, offset: int, end: int, **changed: Any) -> pb.LoadLoraRequest:
    piece = {"offset": offset, "data": whole[offset:end], "crc32c": google_crc32c.value(whole[offset:end])}
    return pb.LoadLoraRequest(chunk=pb.LoadLoraRequest.Chunk(**{**piece, **changed}))


def test_what_was_loaded_draws_as_if_it_had_been_there_from_the_start(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    file = saved(tmp_path, pairs(QUARTER))
    assert names(client) == []
    with pytest.raises(NotFound, match="'neon'"):
        picture(client, lora={"neon": 1.0})
    loaded = client.load_lora("neon", file)
    assert (loaded.name, loaded.rank, loaded.layers, loaded.sha256) == ("neon", 1, 1, hashlib.sha256(file.read_bytes()).hexdigest())
    (model,) = client.models()
    assert list(model.loras) == [loaded]
    got = picture(client, lora={"neon": 1.0})
    assert (level(got), level(picture(client)), level(picture(client, lora={"neon": 0.5}))) == (drawn(QUARTER), drawn(0.0), drawn(QUARTER / 2))
    file.unlink()
    assert picture(client, lora={"neon": 1.0}).artifacts[0].data == got.artifacts[0].data, "the file is not needed again"
    with server(loras={"neon": saved(tmp_path, pairs(QUARTER))}) as (other, _):
        assert picture(other, lora={"neon": 1.0}).artifacts[0].data == got.artifacts[0].data


def test_a_file_that_changes_after_it_was_read_changes_nothing(tmp_path: Path) -> None:
    file = saved(tmp_path, pairs(QUARTER))
    with server(loras={"neon": file}) as (client, _):
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
        assert level(picture(client, lora={"neon": 1.0})) == drawn(QUARTER)


def test_the_same_again_changes_nothing_and_another_one_must_be_a_wish(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, engine = uploads
    first, second = (saved(tmp_path, pairs(shift), name=name) for name, shift in (("first", QUARTER), ("second", EIGHTH)))
    client.load_lora("neon", first)
    before = engine.models["toy"]
    client.load_lora("neon", first)
    client.load_lora("neon", first, replace=True)
    assert engine.models["toy"] is before
    with pytest.raises(AlreadyExists, match=r"LoRA 'neon' of 'toy' is another one, of sha256 [0-9a-f]{12}; .* replace that one \(`--replace`\), or"):
        client.load_lora("neon", second)
    assert level(picture(client, lora={"neon": 1.0})) == drawn(QUARTER)
    client.load_lora("neon", second, replace=True)
    assert level(picture(client, lora={"neon": 1.0})) == drawn(EIGHTH)
    client.load_lora("ink", first)
    assert level(picture(client, lora={"neon": 1.0, "ink": 1.0})) == drawn(QUARTER + EIGHTH)


def test_what_was_unloaded_is_refused_with_what_is_left(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    for name in ("neon", "ink"):
        client.load_lora(name, saved(tmp_path, pairs(QUARTER)))
    client.unload_lora("neon", model="toy")
    with pytest.raises(NotFound, match=r"'neon'.*ink"):
        picture(client, lora={"neon": 1.0})
    with pytest.raises(NotFound, match="unknown LoRA 'neon'; known: ink"):
        client.unload_lora("neon")
    with pytest.raises(NotFound, match="unknown model 'yot'"):
        client.unload_lora("ink", model="yot")
    assert names(client) == ["ink"]


def test_what_was_loaded_at_the_start_can_be_dropped_too(tmp_path: Path) -> None:
    with server(loras={"neon": saved(tmp_path, pairs(QUARTER))}) as (client, _):
        client.unload_lora("neon")
        assert names(client) == []


def test_a_server_lets_nobody_in_unless_it_was_started_to(tmp_path: Path) -> None:
    neon = saved(tmp_path, pairs(QUARTER))
    says = "lets no client load or unload a LoRA; start it with --allow-lora-uploads"
    with server(ServerOptions(port=0, grace_s=0.2), {"neon": neon}) as (client, _):
        with pytest.raises(NotAllowed, match=says) as caught:
            client.load_lora("ink", neon)
        assert isinstance(caught.value.__cause__, grpc.RpcError)
        assert isinstance(caught.value.__cause__, grpc.Call)
        assert caught.value.__cause__.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(NotAllowed, match=says):
            client.unload_lora("neon")
        with pytest.raises(NotAllowed, match=says):
            upload(client, endless := Endless())
        assert endless.sent * CHUNK_BYTES < 8 << 20, "it is refused before it is read: what was sent is what the connection holds"
        assert names(client) == ["neon"]


class Endless(Iterator[pb.LoadLoraRequest]):
    """Pieces without end, slower than a refusal."""

    def __init__(self) -> None:
        self.sent = 0
        self.piece = piece_of(bytes(CHUNK_BYTES), 0, CHUNK_BYTES)

    def __next__(self) -> pb.LoadLoraRequest:
        self.sent += 1
        return self.piece


NAN, COMPLEX = torch.full((3, 1), float("nan")), torch.ones(3, 1, dtype=torch.complex64)
PEFT = "base_model.model."
WRONG: dict[str, tuple[Mapping[str, Tensor], dict[str, str], str]] = {
    "another model's": (pairs(1.0), {BASE: "reel-big"}, "LoRA 'neon': it was trained on 'reel-big' and this is 'toy'"),
    "rank": (pairs(1.0, rank=3), {}, "rank 3 of 'neon', where this bundle takes 2; .*--lora-rank 3"),
    "layer": ({f"{k.replace('q', 'z')}": v for k, v in pairs(1.0).items()}, {}, r"'transformer.blocks.0.z.lora_A.weight' is no part of a LoRA for 'toy'"),
    "half": (dict([next(iter(pairs(1.0).items()))]), {}, "a pair is A and B"),
    "shape": (pairs(1.0) | {"transformer.blocks.0.q.lora_A.weight": torch.ones(1, 4)}, {}, r"is \[1, 4\]; layer 'blocks.0.q' takes \[rank, 3\]"),
    "numbers": (pairs(1.0) | {"transformer.blocks.0.q.lora_B.weight": NAN}, {}, "numbers that are not finite"),
    "kind of numbers": (pairs(1.0) | {"transformer.blocks.0.q.lora_B.weight": COMPLEX}, {}, "holds numbers of type C64; save it as one of F64, F32, F16"),
    "whole numbers": (pairs(1.0) | {"transformer.blocks.0.q.lora_B.weight": NAN.int()}, {}, "holds numbers of type I32; save it as one of .* F8_E5M2$"),
    "no configuration": (pairs(1.0, prefix=PEFT), {}, "PEFT keeps alpha in adapter_config.json, and there is none beside it"),
    "no table": (pairs(1.0), {"lora_adapter_metadata": "[1]"}, "its configuration is not PEFT's"),
    "no number": (pairs(1.0), {"lora_adapter_metadata": '{"transformer.lora_alpha": [8]}'}, "its configuration is not PEFT's"),
    "a vast number": (pairs(1.0), {"lora_adapter_metadata": '{"lora_alpha": 1' + "0" * 400 + "}"}, "too large"),
    "nested": (pairs(1.0), {"lora_adapter_metadata": "[" * 100_000}, "nested too deeply"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_none_for_the_model_is_refused_with_what_is_wrong_and_no_path_of_the_server(
    wrong: str, uploads: tuple[Client, Engine], tmp_path: Path
) -> None:
    client, _ = uploads
    tensors, metadata, says = WRONG[wrong]
    with pytest.raises(InvalidRequest, match=f"file: .*{says}") as caught:
        client.load_lora("neon", saved(tmp_path, tensors, metadata))
    assert str(tmp_path) not in str(caught.value)
    assert names(client) == []


def test_what_is_no_safetensors_file_is_refused(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    for data in (b"PK\x03\x04 a pickle in a zip", bytes(8), b"\xff" * 100):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(InvalidRequest, match="file: LoRA 'neon': no safetensors file, or not a whole one"):
            client.load_lora("neon", tmp_path / "file")
    with pytest.raises(InvalidRequest, match=r"file: cannot read .*nothing: No such file"):
        client.load_lora("neon", tmp_path / "nothing")
    assert names(client) == []


@pytest.mark.parametrize("name", ["", "../neon", "a/b", "a b", ".neon", "-neon", "neon\n", "ä", "n" * 65, "a=b"])
def test_a_name_of_other_characters_is_refused(name: str, uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    with pytest.raises(InvalidRequest, match=r"name: .* is not up to 64 letters, digits, "):
        client.load_lora(name, saved(tmp_path, pairs(QUARTER)))
    client.load_lora("n" * 63 + "_", saved(tmp_path, pairs(QUARTER)))


def test_a_name_that_the_wire_cannot_carry_is_refused_before_it_is_sent(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    with pytest.raises(InvalidRequest, match="name: is not UTF-8"):
        client.load_lora("\udcff", saved(tmp_path, pairs(QUARTER)))


DATA = bytes(range(256)) * 2
CUT: dict[str, tuple[list[pb.LoadLoraRequest], str]] = {
    "nothing": ([], "name: .*size_bytes: 0; a LoRA of rank 2, .* has 1 to .* compile with a larger --lora-rank"),
    "no start": ([piece_of(DATA, 0, 512)], "name: .*sha256: 0 bytes; it has 32"),
    "too early an end": ([start_of(DATA), piece_of(DATA, 0, 300)], "size_bytes: 300 of 512 bytes came; send the file again"),
    "start alone": ([start_of(DATA)], "size_bytes: 0 of 512 bytes came"),
    "too late an end": ([start_of(DATA, size_bytes=300), piece_of(DATA, 0, 512)], "size_bytes: more than 300 bytes came"),
    "a gap": ([start_of(DATA), piece_of(DATA, 0, 100), piece_of(DATA, 200, 512)], "chunk.offset: 200, where byte 100 was due"),
    "a changed bit": ([start_of(DATA), piece_of(DATA, 0, 512, data=bytes(512))], "chunk.crc32c: the piece at byte 0 is damaged"),
    "another file": ([start_of(DATA, sha256=bytes(32)), piece_of(DATA, 0, 512)], "sha256: is of other bytes than those that came"),
    "an empty piece": ([start_of(DATA), piece_of(DATA, 0, 0)], f"chunk.data: 1 to {CHUNK_BYTES} bytes"),
    "two starts": ([start_of(DATA), start_of(DATA)], f"chunk.data: 1 to {CHUNK_BYTES} bytes"),
    "a large piece": ([start_of(DATA), piece_of(bytes(CHUNK_BYTES + 1), 0, CHUNK_BYTES + 1)], "chunk.data: 1 to"),
    "too large": ([start_of(DATA, size_bytes=most_bytes(LAYOUT) + 1)], f"size_bytes: {most_bytes(LAYOUT) + 1}; a LoRA of rank 2"),
    "negative": ([start_of(DATA, size_bytes=-1)], "size_bytes: -1; a LoRA of rank 2"),
    "a long configuration": ([start_of(DATA, adapter_config="x" * 65537)], "adapter_config: 65537 bytes; at most 65536"),
}


@pytest.mark.parametrize("cut", CUT)
def test_an_upload_that_is_not_whole_is_refused_and_leaves_nothing(cut: str, uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    parts, says = CUT[cut]
    with pytest.raises(InvalidRequest, match=says):
        upload(client, parts)
    assert names(client) == []
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_file_of_the_largest_rank_and_width_fits(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    file = saved(tmp_path, pairs(QUARTER, rank=2), {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "more": "x" * 50_000})})
    assert client.load_lora("neon", file).rank == 2
    assert level(picture(client, lora={"neon": 0.5})) == drawn(QUARTER), "alpha 4 of rank 2 doubles it"


def test_the_configuration_of_peft_goes_with_its_file(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    file = saved(tmp_path, pairs(EIGHTH, prefix=PEFT), name="adapter_model")
    (tmp_path / PEFT_FILE).write_text(json.dumps({"lora_alpha": 2}))
    client.load_lora("neon", file)
    assert level(picture(client, lora={"neon": 1.0})) == drawn(2 * EIGHTH)
    (tmp_path / PEFT_FILE).write_text(json.dumps({"lora_alpha": 4}))
    with pytest.raises(AlreadyExists):
        client.load_lora("neon", file)
    client.load_lora("neon", file, replace=True)
    assert level(picture(client, lora={"neon": 1.0})) == drawn(4 * EIGHTH)


def test_there_are_no_more_than_the_server_has_room_for(tmp_path: Path) -> None:
    first, second = (saved(tmp_path, pairs(shift), name=name) for name, shift in (("first", QUARTER), ("second", EIGHTH)))
    with server(replace(ALLOWED, max_loras=2), {"one": first}) as (client, _):
        client.load_lora("two", first)
        with pytest.raises(Overloaded, match=r"'toy' has 2 LoRAs, and clients may bring it up to 2; unload one, or .*--max-loras\. Loaded: one, two") as caught:
            client.load_lora("three", first)
        assert isinstance(caught.value.__cause__, grpc.Call)
        assert caught.value.__cause__.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        client.load_lora("two", second, replace=True)
        client.unload_lora("one")
        client.load_lora("three", first)
        assert names(client) == ["three", "two"]


class Stalled(Iterator[pb.LoadLoraRequest]):
    """An upload that stops after its first piece."""

    def __init__(self) -> None:
        self.parts = iter([start_of(DATA), piece_of(DATA, 0, 300)])
        self.waits, self.go = threading.Event(), threading.Event()

    def __next__(self) -> pb.LoadLoraRequest:
        for part in self.parts:
            return part
        self.waits.set()
        self.go.wait(20)
        raise StopIteration


@contextmanager
def stalled(client: Client) -> Iterator[grpc.Future]:
    parts = Stalled()
    with grpc.insecure_channel(client.address) as channel:
        method = channel.stream_unary(f"/{SERVICE}/LoadLora", pb.LoadLoraRequest.SerializeToString)
        call = method.future(parts)
        try:
            assert parts.waits.wait(5)
            yield call
        finally:
            parts.go.set()


def test_a_piece_is_at_most_what_the_proto_says() -> None:
    assert f"// data, at most {CHUNK_BYTES >> 10} KiB." in Path(pb.__file__).with_name("lora.proto").read_text()


def test_a_client_that_goes_in_the_middle_leaves_nothing(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    with stalled(client) as call:
        wait_until(lambda: any((tmp_path / "temporary").iterdir()))
        call.cancel()
    wait_until(lambda: not any((tmp_path / "temporary").iterdir()))
    assert names(client) == []


def test_uploads_are_few_at_once_and_none_lasts_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_UPLOADS", 1)
    file = saved(tmp_path, pairs(QUARTER))
    with server(replace(ALLOWED, max_request_s=1.0)) as (client, _), stalled(client) as call:
        with pytest.raises(Overloaded, match="1 LoRAs are being uploaded, the most at once; try again in 5 s"):
            client.load_lora("neon", file)
        error = call.exception(10)
        assert isinstance(from_error(error, "", False), DeadlineExceeded)
        assert "uploading" in str(error)
        client.load_lora("neon", file)


def test_a_request_under_way_keeps_what_was_loaded_when_it_came(tmp_path: Path) -> None:
    """One runs, one waits for its place; both see nothing of what is loaded and unloaded meanwhile."""
    runs, go = threading.Event(), threading.Event()

    def held(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        runs.set()
        assert go.wait(20)
        return moved(given)

    first, second = (saved(tmp_path, pairs(shift), name=name) for name, shift in (("first", QUARTER), ("second", EIGHTH)))
    with server(adapted=held, max_running=1) as (client, engine), ExitStack() as stack:
        stack.callback(go.set)
        client.load_lora("neon", first)
        got: dict[str, int] = {}

        def ask(who: str) -> None:
            got[who] = level(picture(client, lora={"neon": 1.0}))

        threads = [threading.Thread(target=ask, args=(who,)) for who in ("runs", "waits", "after")]
        threads[0].start()
        assert runs.wait(10)
        threads[1].start()
        wait_until(lambda: len(engine._admitted) == 2)
        client.unload_lora("neon")
        with pytest.raises(NotFound):
            picture(client, lora={"neon": 1.0})
        client.load_lora("neon", second)
        threads[2].start()
        wait_until(lambda: len(engine._admitted) == 3)
        go.set()
        for thread in threads:
            thread.join(20)
    assert got == {"runs": drawn(QUARTER), "waits": drawn(QUARTER), "after": drawn(EIGHTH)}


def test_many_load_and_unload_at_once_and_every_picture_is_of_one_of_them(tmp_path: Path) -> None:
    shifts = {f"lora-{k}": k / 32 for k in range(6)}
    files = {name: saved(tmp_path, pairs(shift), name=name) for name, shift in shifts.items()}
    wrong: list[object] = []

    def churn(name: str) -> None:
        for _ in range(5):
            client.load_lora(name, files[name])
            if (found := level(picture(client, lora={name: 1.0}))) != drawn(shifts[name]):
                wrong.append((name, found))
            client.unload_lora(name)

    with server() as (client, _):
        threads = [threading.Thread(target=churn, args=(name,)) for name in list(shifts)[:4]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []
        assert names(client) == []


def test_the_first_that_is_loaded_meets_a_program_that_has_run(tmp_path: Path) -> None:
    seen: list[tuple[tuple[str, str], int]] = []
    with server(adapted=moved, on_batch=lambda record: seen.append((record.key[1:], record.rows))) as (client, engine):
        before = engine.models
        assert warmed_up(engine) is engine
        assert engine.models is before
        assert names(client) == []
        ran = {rows for (program, _), rows in seen if program == "denoise_lora"}
        assert min(ran) == 1
        assert max(ran) > 1
    packed = toy_model().with_some_lora().lora(make_request(lora={"none": 1.0}))
    assert packed is not None
    assert not packed.any(), "it changes nothing"


def test_a_checkpoint_is_of_one_adapter_and_not_of_its_name(tmp_path: Path) -> None:
    kept: list[Path] = []
    for file in (saved(tmp_path, pairs(QUARTER), name="first"), saved(tmp_path, pairs(EIGHTH), name="second"), saved(tmp_path, pairs(QUARTER), name="third")):
        model = toy_model({"neon": file})
        store = Checkpoints(tmp_path / "states", 1, {"toy": "a"})
        request = make_request(id="same", lora={"neon": 1.0})
        kept.append(store.path(request, model.adapters(request)))
        store.close()
    assert kept[0] != kept[1]
    assert kept[0] == kept[2]


def test_the_engine_keeps_states_by_what_is_loaded(tmp_path: Path) -> None:
    """A request under one adapter leaves a state that the same request under another one must not take up."""
    programs = PROGRAMS | {("denoise_lora", profile): moved for profile in ("video", "image")}
    first, second = (saved(tmp_path, pairs(shift), name=name) for name, shift in (("first", QUARTER), ("second", EIGHTH)))
    ran = threading.Event()
    ends: list[int] = []
    for file in (first, second, first):
        gate, calls = threading.Event(), [0]

        def counted(given: Mapping[str, Tensor], calls: list[int] = calls, gate: threading.Event = gate) -> dict[str, Tensor]:
            calls[0] += 1
            if not ends and calls[0] == 4:  # the first engine stops in the middle
                ran.set()
                assert gate.wait(20)
            return moved(given)

        table = programs | {("denoise_lora", "video"): counted}
        store = Checkpoints(tmp_path / "states", 1, {"toy": "a"})
        engine = Engine({"toy": toy_model()}, Inline({"toy": Runner(table, dict.fromkeys(table, 8))}), checkpoints=store)
        engine.load_lora("toy", "neon", file, "", 1, False)
        heard = Heard()
        engine.submit(make_request(steps=8, seed=11, lora={"neon": 1.0}), heard)
        if not ends:
            assert ran.wait(20)
            closer = threading.Thread(target=engine.close, args=(0.0,))
            closer.start()
            gate.set()
            closer.join(20)
            ends.append(calls[0])
        else:
            heard.result()
            engine.close(5)
            ends.append(calls[0])
    assert ends[1] == 8, "another adapter of this name begins anew"
    assert ends[2] < 8, "the first one goes on where it was"


def test_a_model_that_takes_none_and_a_server_that_is_not_ready_say_so(tmp_path: Path) -> None:
    file = saved(tmp_path, pairs(QUARTER))
    with served(FakeEngine(FakeModel(settings=FakeSettings(lora=None, fused=()), loras={})), ALLOWED) as running, Client(running.address) as client:
        with pytest.raises(UnsupportedRequest, match="model 'fake' was compiled to take no LoRA; serve a bundle compiled with --lora-rank"):
            client.load_lora("neon", file)
        with pytest.raises(NotFound, match="'other'"):
            client.load_lora("neon", file, model="other")
    loading = service.LoraService(MediaService(ThreadPoolExecutor(1), 1.0).ready, True, 1, 1.0)
    with pytest.raises(Unavailable, match="loading its models"):
        asyncio.run(loading.unload(pb.UnloadLoraRequest(name="neon"), None))  # type: ignore[arg-type]  # it refuses before it asks who calls


def test_asyncio_does_the_same(uploads: tuple[Client, Engine], tmp_path: Path) -> None:
    client, _ = uploads
    file = saved(tmp_path, pairs(QUARTER))

    async def both() -> None:
        async with AsyncClient(client.address) as other:
            assert (await other.load_lora("neon", file)).name == "neon"
            assert names(client) == ["neon"]
            await other.unload_lora("neon")
            with pytest.raises(NotFound):
                await other.unload_lora("neon")
            with pytest.raises(InvalidRequest):
                await other.load_lora("a/b", file)

    asyncio.run(both())
    assert names(client) == []


def test_the_command_line_loads_lists_and_unloads(uploads: tuple[Client, Engine], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client, _ = uploads
    first, second = (saved(tmp_path, pairs(shift), name=name) for name, shift in (("first", QUARTER), ("second", EIGHTH)))
    digest = hashlib.sha256(first.read_bytes()).hexdigest()

    def lora(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["lora", *arguments, "--server", client.address])
        return status, *capsys.readouterr()

    assert lora("list") == (0, "toy: LoRAs of rank up to 2\n", "")
    assert lora("load", f"neon={first}") == (0, f"neon  rank 1 in 1 layers, sha256 {digest}\n", "")
    assert lora("list", "--model", "toy") == (0, f"toy: LoRAs of rank up to 2\n  neon  rank 1 in 1 layers, sha256 {digest}\n", "")
    status, _, error = lora("load", f"neon={second}")
    assert (status, "replace that one" in error) == (2, True)
    assert lora("load", f"neon={second}", "--replace")[0] == 0
    assert level(picture(client, lora={"neon": 1.0})) == drawn(EIGHTH)
    assert lora("unload", "neon") == (0, "", "")
    assert lora("unload", "neon") == (2, "", "reelstep: unknown LoRA 'neon'; known: none\n")
    assert lora("list", "--model", "yot") == (2, "", "reelstep: unknown model 'yot'; known: toy\n")


def test_a_limit_without_permission_is_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "a.reel", "--max-loras", "3"]) == 2
    assert "--max-loras is of LoRAs that clients load; add --allow-lora-uploads" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="at most 0 LoRAs; a number above 0"):
        ServerOptions(max_loras=0)


def test_the_service_answers_every_method_that_the_proto_has(uploads: tuple[Client, Engine]) -> None:
    client, _ = uploads
    with grpc.insecure_channel(client.address) as channel:
        for method in pb.DESCRIPTOR.services_by_name["LoraService"].methods:
            call = channel.stream_unary(f"/{SERVICE}/{method.name}")
            with pytest.raises(grpc.RpcError) as caught:
                call(iter([b"\xff"]), timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert isinstance(from_error(caught.value, client.address, False), ReelstepError)
