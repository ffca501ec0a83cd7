"""The committed protobuf code is what the pinned generator makes of the schema."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from reelstep.protos import generate
from reelstep.protos.reelstep.v1 import media_pb2 as pb


def test_regenerating_gives_the_committed_code(tmp_path: Path) -> None:
    try:
        found = version("grpcio-tools")
    except PackageNotFoundError:
        pytest.skip(f"grpcio-tools {generate.GRPCIO_TOOLS} is not installed")
    if found != generate.GRPCIO_TOOLS:
        pytest.skip(f"grpcio-tools {found} is installed; the committed code is made by {generate.GRPCIO_TOOLS}")
    committed = Path(generate.__file__).parent
    made = generate.generate(committed, tmp_path)
    assert made
    for file in made:
        assert (committed / file).read_bytes() == (tmp_path / file).read_bytes(), f"{file} is stale; run `make protos`"


def test_the_schema_registers_under_our_own_path_and_package() -> None:
    assert pb.DESCRIPTOR.name == "reelstep/protos/reelstep/v1/media.proto"
    assert pb.DESCRIPTOR.package == "reelstep.v1"


def test_field_numbers_are_those_that_were_published() -> None:
    numbers = {f.name: f.number for f in pb.GenerationSpec.DESCRIPTOR.fields}
    names = (
        "model prompt negative_prompt seed count width height frames frames_per_second steps guidance assets output_media_type extra solver "
        "schedule image guidance_rule guidance_options quality step_cache step_cache_options lora"
    )
    assert numbers == {name: i + 1 for i, name in enumerate(names.split())}
    assert {f.name: f.number for f in pb.GenerateRequest.DESCRIPTOR.fields} == {"spec": 1, "preview": 2, "inline_artifacts": 3, "request_id": 4}
    assert {f.name: f.number for f in pb.ArtifactChunk.DESCRIPTOR.fields} == {"artifact": 1, "offset": 2, "data": 3, "crc32c": 4, "last": 5}
