from reelstep.protos.reelstep.v1 import media_pb2 as _media_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadLoraRequest(_message.Message):
    __slots__ = ("start", "chunk")
    class Start(_message.Message):
        __slots__ = ("model", "name", "size_bytes", "sha256", "replace", "adapter_config")
        MODEL_FIELD_NUMBER: _ClassVar[int]
        NAME_FIELD_NUMBER: _ClassVar[int]
        SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
        SHA256_FIELD_NUMBER: _ClassVar[int]
        REPLACE_FIELD_NUMBER: _ClassVar[int]
        ADAPTER_CONFIG_FIELD_NUMBER: _ClassVar[int]
        model: str
        name: str
        size_bytes: int
        sha256: bytes
        replace: bool
        adapter_config: str
        def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., replace: bool = ..., adapter_config: _Optional[str] = ...) -> None: ...
    class Chunk(_message.Message):
        __slots__ = ("offset", "data", "crc32c")
        OFFSET_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        CRC32C_FIELD_NUMBER: _ClassVar[int]
        offset: int
        data: bytes
        crc32c: int
        def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: LoadLoraRequest.Start
    chunk: LoadLoraRequest.Chunk
    def __init__(self, start: _Optional[_Union[LoadLoraRequest.Start, _Mapping]] = ..., chunk: _Optional[_Union[LoadLoraRequest.Chunk, _Mapping]] = ...) -> None: ...

class LoadLoraResponse(_message.Message):
    __slots__ = ("model", "lora")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    model: str
    lora: _media_pb2.Model.Lora
    def __init__(self, model: _Optional[str] = ..., lora: _Optional[_Union[_media_pb2.Model.Lora, _Mapping]] = ...) -> None: ...

class UnloadLoraRequest(_message.Message):
    __slots__ = ("model", "name")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class UnloadLoraResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
