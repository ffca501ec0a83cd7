import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_EXPIRED: _ClassVar[JobState]
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_EXPIRED: JobState

class GenerationSpec(_message.Message):
    __slots__ = ("model", "prompt", "negative_prompt", "seed", "count", "width", "height", "frames", "frames_per_second", "steps", "guidance", "assets", "output_media_type", "extra", "solver", "schedule", "image", "guidance_rule", "guidance_options", "quality", "step_cache", "step_cache_options", "lora")
    class Lora(_message.Message):
        __slots__ = ("name", "strength")
        NAME_FIELD_NUMBER: _ClassVar[int]
        STRENGTH_FIELD_NUMBER: _ClassVar[int]
        name: str
        strength: float
        def __init__(self, name: _Optional[str] = ..., strength: _Optional[float] = ...) -> None: ...
    class GuidanceOptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class StepCacheOptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    ASSETS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_RULE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    STEP_CACHE_FIELD_NUMBER: _ClassVar[int]
    STEP_CACHE_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    negative_prompt: str
    seed: int
    count: int
    width: int
    height: int
    frames: int
    frames_per_second: float
    steps: int
    guidance: float
    assets: _containers.RepeatedScalarFieldContainer[str]
    output_media_type: str
    extra: _struct_pb2.Struct
    solver: str
    schedule: str
    image: bytes
    guidance_rule: str
    guidance_options: _containers.ScalarMap[str, float]
    quality: str
    step_cache: str
    step_cache_options: _containers.ScalarMap[str, float]
    lora: _containers.RepeatedCompositeFieldContainer[GenerationSpec.Lora]
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., seed: _Optional[int] = ..., count: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., frames: _Optional[int] = ..., frames_per_second: _Optional[float] = ..., steps: _Optional[int] = ..., guidance: _Optional[float] = ..., assets: _Optional[_Iterable[str]] = ..., output_media_type: _Optional[str] = ..., extra: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., solver: _Optional[str] = ..., schedule: _Optional[str] = ..., image: _Optional[bytes] = ..., guidance_rule: _Optional[str] = ..., guidance_options: _Optional[_Mapping[str, float]] = ..., quality: _Optional[str] = ..., step_cache: _Optional[str] = ..., step_cache_options: _Optional[_Mapping[str, float]] = ..., lora: _Optional[_Iterable[_Union[GenerationSpec.Lora, _Mapping]]] = ...) -> None: ...

class PreviewPolicy(_message.Message):
    __slots__ = ("every_steps", "max_bytes", "media_type")
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    every_steps: int
    max_bytes: int
    media_type: str
    def __init__(self, every_steps: _Optional[int] = ..., max_bytes: _Optional[int] = ..., media_type: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("nfe", "forwards", "queue", "compute", "solver", "schedule", "guidance", "task", "guidance_rule", "quality", "cached", "step_cache", "auto")
    class ComputeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _duration_pb2.Duration
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
    NFE_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_RULE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    STEP_CACHE_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    nfe: int
    forwards: int
    queue: _duration_pb2.Duration
    compute: _containers.MessageMap[str, _duration_pb2.Duration]
    solver: str
    schedule: str
    guidance: float
    task: str
    guidance_rule: str
    quality: str
    cached: int
    step_cache: str
    auto: bool
    def __init__(self, nfe: _Optional[int] = ..., forwards: _Optional[int] = ..., queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., compute: _Optional[_Mapping[str, _duration_pb2.Duration]] = ..., solver: _Optional[str] = ..., schedule: _Optional[str] = ..., guidance: _Optional[float] = ..., task: _Optional[str] = ..., guidance_rule: _Optional[str] = ..., quality: _Optional[str] = ..., cached: _Optional[int] = ..., step_cache: _Optional[str] = ..., auto: bool = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("name", "state", "spec", "create_time", "start_time", "end_time", "expire_time", "queue_position", "steps_done", "steps_total", "artifacts", "error", "priority", "attempt", "labels", "usage")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: JobState
    spec: GenerationSpec
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    queue_position: int
    steps_done: int
    steps_total: int
    artifacts: _containers.RepeatedCompositeFieldContainer[Artifact]
    error: _status_pb2.Status
    priority: int
    attempt: int
    labels: _containers.ScalarMap[str, str]
    usage: Usage
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., spec: _Optional[_Union[GenerationSpec, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., queue_position: _Optional[int] = ..., steps_done: _Optional[int] = ..., steps_total: _Optional[int] = ..., artifacts: _Optional[_Iterable[_Union[Artifact, _Mapping]]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., priority: _Optional[int] = ..., attempt: _Optional[int] = ..., labels: _Optional[_Mapping[str, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class Artifact(_message.Message):
    __slots__ = ("name", "media_type", "size_bytes", "sha256", "width", "height", "frames", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    media_type: str
    size_bytes: int
    sha256: bytes
    width: int
    height: int
    frames: int
    seed: int
    def __init__(self, name: _Optional[str] = ..., media_type: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., frames: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("sequence", "time", "queued", "progress", "preview", "artifact", "finished", "heartbeat")
    class Queued(_message.Message):
        __slots__ = ("position", "estimated_wait")
        POSITION_FIELD_NUMBER: _ClassVar[int]
        ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
        position: int
        estimated_wait: _duration_pb2.Duration
        def __init__(self, position: _Optional[int] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
    class Progress(_message.Message):
        __slots__ = ("stage", "step", "steps", "estimated_remaining")
        STAGE_FIELD_NUMBER: _ClassVar[int]
        STEP_FIELD_NUMBER: _ClassVar[int]
        STEPS_FIELD_NUMBER: _ClassVar[int]
        ESTIMATED_REMAINING_FIELD_NUMBER: _ClassVar[int]
        stage: str
        step: int
        steps: int
        estimated_remaining: _duration_pb2.Duration
        def __init__(self, stage: _Optional[str] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., estimated_remaining: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
    class Preview(_message.Message):
        __slots__ = ("media_type", "data", "step")
        MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        STEP_FIELD_NUMBER: _ClassVar[int]
        media_type: str
        data: bytes
        step: int
        def __init__(self, media_type: _Optional[str] = ..., data: _Optional[bytes] = ..., step: _Optional[int] = ...) -> None: ...
    class Heartbeat(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: _timestamp_pb2.Timestamp
    queued: JobEvent.Queued
    progress: JobEvent.Progress
    preview: JobEvent.Preview
    artifact: Artifact
    finished: Job
    heartbeat: JobEvent.Heartbeat
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., queued: _Optional[_Union[JobEvent.Queued, _Mapping]] = ..., progress: _Optional[_Union[JobEvent.Progress, _Mapping]] = ..., preview: _Optional[_Union[JobEvent.Preview, _Mapping]] = ..., artifact: _Optional[_Union[Artifact, _Mapping]] = ..., finished: _Optional[_Union[Job, _Mapping]] = ..., heartbeat: _Optional[_Union[JobEvent.Heartbeat, _Mapping]] = ...) -> None: ...

class ArtifactChunk(_message.Message):
    __slots__ = ("artifact", "offset", "data", "crc32c", "last")
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    artifact: str
    offset: int
    data: bytes
    crc32c: int
    last: bool
    def __init__(self, artifact: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., last: bool = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("spec", "preview", "inline_artifacts", "request_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    INLINE_ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    spec: GenerationSpec
    preview: PreviewPolicy
    inline_artifacts: bool
    request_id: str
    def __init__(self, spec: _Optional[_Union[GenerationSpec, _Mapping]] = ..., preview: _Optional[_Union[PreviewPolicy, _Mapping]] = ..., inline_artifacts: bool = ..., request_id: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("event", "chunk")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    event: JobEvent
    chunk: ArtifactChunk
    def __init__(self, event: _Optional[_Union[JobEvent, _Mapping]] = ..., chunk: _Optional[_Union[ArtifactChunk, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "tasks", "max_width", "max_height", "max_frames", "max_steps", "max_count", "output_media_types", "capabilities", "sizes", "frames", "solvers", "schedules", "max_guidance", "max_prompt_bytes", "max_image_bytes", "defaults", "guidance_rules", "fits", "step_caches", "student", "loras", "lora_rank", "lora_layers", "fused")
    class Size(_message.Message):
        __slots__ = ("width", "height")
        WIDTH_FIELD_NUMBER: _ClassVar[int]
        HEIGHT_FIELD_NUMBER: _ClassVar[int]
        width: int
        height: int
        def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...
    class Choice(_message.Message):
        __slots__ = ("quality", "solver", "schedule", "steps", "guidance_rule", "guidance_options", "guidance", "forwards", "psnr_db", "ssim", "frechet", "command")
        class GuidanceOptionsEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: float
            def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
        QUALITY_FIELD_NUMBER: _ClassVar[int]
        SOLVER_FIELD_NUMBER: _ClassVar[int]
        SCHEDULE_FIELD_NUMBER: _ClassVar[int]
        STEPS_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_RULE_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_OPTIONS_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_FIELD_NUMBER: _ClassVar[int]
        FORWARDS_FIELD_NUMBER: _ClassVar[int]
        PSNR_DB_FIELD_NUMBER: _ClassVar[int]
        SSIM_FIELD_NUMBER: _ClassVar[int]
        FRECHET_FIELD_NUMBER: _ClassVar[int]
        COMMAND_FIELD_NUMBER: _ClassVar[int]
        quality: str
        solver: str
        schedule: str
        steps: int
        guidance_rule: str
        guidance_options: _containers.ScalarMap[str, float]
        guidance: float
        forwards: float
        psnr_db: float
        ssim: float
        frechet: float
        command: str
        def __init__(self, quality: _Optional[str] = ..., solver: _Optional[str] = ..., schedule: _Optional[str] = ..., steps: _Optional[int] = ..., guidance_rule: _Optional[str] = ..., guidance_options: _Optional[_Mapping[str, float]] = ..., guidance: _Optional[float] = ..., forwards: _Optional[float] = ..., psnr_db: _Optional[float] = ..., ssim: _Optional[float] = ..., frechet: _Optional[float] = ..., command: _Optional[str] = ...) -> None: ...
    class Defaults(_message.Message):
        __slots__ = ("solver", "schedule", "steps", "guidance", "frames", "frames_per_second", "guidance_rule", "menu")
        SOLVER_FIELD_NUMBER: _ClassVar[int]
        SCHEDULE_FIELD_NUMBER: _ClassVar[int]
        STEPS_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_FIELD_NUMBER: _ClassVar[int]
        FRAMES_FIELD_NUMBER: _ClassVar[int]
        FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_RULE_FIELD_NUMBER: _ClassVar[int]
        MENU_FIELD_NUMBER: _ClassVar[int]
        solver: str
        schedule: str
        steps: int
        guidance: float
        frames: int
        frames_per_second: float
        guidance_rule: str
        menu: _containers.RepeatedCompositeFieldContainer[Model.Choice]
        def __init__(self, solver: _Optional[str] = ..., schedule: _Optional[str] = ..., steps: _Optional[int] = ..., guidance: _Optional[float] = ..., frames: _Optional[int] = ..., frames_per_second: _Optional[float] = ..., guidance_rule: _Optional[str] = ..., menu: _Optional[_Iterable[_Union[Model.Choice, _Mapping]]] = ...) -> None: ...
    class GuidanceRule(_message.Message):
        __slots__ = ("name", "options")
        class OptionsEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: float
            def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
        NAME_FIELD_NUMBER: _ClassVar[int]
        OPTIONS_FIELD_NUMBER: _ClassVar[int]
        name: str
        options: _containers.ScalarMap[str, float]
        def __init__(self, name: _Optional[str] = ..., options: _Optional[_Mapping[str, float]] = ...) -> None: ...
    class StepCache(_message.Message):
        __slots__ = ("name", "options")
        class OptionsEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: float
            def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
        NAME_FIELD_NUMBER: _ClassVar[int]
        OPTIONS_FIELD_NUMBER: _ClassVar[int]
        name: str
        options: _containers.ScalarMap[str, float]
        def __init__(self, name: _Optional[str] = ..., options: _Optional[_Mapping[str, float]] = ...) -> None: ...
    class Student(_message.Message):
        __slots__ = ("teacher", "guidance", "grids")
        class Grid(_message.Message):
            __slots__ = ("steps", "times")
            STEPS_FIELD_NUMBER: _ClassVar[int]
            TIMES_FIELD_NUMBER: _ClassVar[int]
            steps: int
            times: _containers.RepeatedScalarFieldContainer[float]
            def __init__(self, steps: _Optional[int] = ..., times: _Optional[_Iterable[float]] = ...) -> None: ...
        TEACHER_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_FIELD_NUMBER: _ClassVar[int]
        GRIDS_FIELD_NUMBER: _ClassVar[int]
        teacher: str
        guidance: float
        grids: _containers.RepeatedCompositeFieldContainer[Model.Student.Grid]
        def __init__(self, teacher: _Optional[str] = ..., guidance: _Optional[float] = ..., grids: _Optional[_Iterable[_Union[Model.Student.Grid, _Mapping]]] = ...) -> None: ...
    class Fit(_message.Message):
        __slots__ = ("name", "tasks", "solver", "schedule", "steps", "guidance_rule", "guidance_options", "guidance")
        class GuidanceOptionsEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: float
            def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
        NAME_FIELD_NUMBER: _ClassVar[int]
        TASKS_FIELD_NUMBER: _ClassVar[int]
        SOLVER_FIELD_NUMBER: _ClassVar[int]
        SCHEDULE_FIELD_NUMBER: _ClassVar[int]
        STEPS_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_RULE_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_OPTIONS_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_FIELD_NUMBER: _ClassVar[int]
        name: str
        tasks: _containers.RepeatedScalarFieldContainer[str]
        solver: str
        schedule: str
        steps: int
        guidance_rule: str
        guidance_options: _containers.ScalarMap[str, float]
        guidance: float
        def __init__(self, name: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., solver: _Optional[str] = ..., schedule: _Optional[str] = ..., steps: _Optional[int] = ..., guidance_rule: _Optional[str] = ..., guidance_options: _Optional[_Mapping[str, float]] = ..., guidance: _Optional[float] = ...) -> None: ...
    class Lora(_message.Message):
        __slots__ = ("name", "rank", "layers", "sha256")
        NAME_FIELD_NUMBER: _ClassVar[int]
        RANK_FIELD_NUMBER: _ClassVar[int]
        LAYERS_FIELD_NUMBER: _ClassVar[int]
        SHA256_FIELD_NUMBER: _ClassVar[int]
        name: str
        rank: int
        layers: int
        sha256: str
        def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., layers: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...
    class Fused(_message.Message):
        __slots__ = ("name", "sha256", "strength", "rank", "layers")
        NAME_FIELD_NUMBER: _ClassVar[int]
        SHA256_FIELD_NUMBER: _ClassVar[int]
        STRENGTH_FIELD_NUMBER: _ClassVar[int]
        RANK_FIELD_NUMBER: _ClassVar[int]
        LAYERS_FIELD_NUMBER: _ClassVar[int]
        name: str
        sha256: str
        strength: float
        rank: int
        layers: int
        def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., strength: _Optional[float] = ..., rank: _Optional[int] = ..., layers: _Optional[int] = ...) -> None: ...
    class DefaultsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Model.Defaults
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Model.Defaults, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    MAX_WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_COUNT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_MEDIA_TYPES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    SOLVERS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_FIELD_NUMBER: _ClassVar[int]
    MAX_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_RULES_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    STEP_CACHES_FIELD_NUMBER: _ClassVar[int]
    STUDENT_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    LORA_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FUSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    max_width: int
    max_height: int
    max_frames: int
    max_steps: int
    max_count: int
    output_media_types: _containers.RepeatedScalarFieldContainer[str]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    sizes: _containers.RepeatedCompositeFieldContainer[Model.Size]
    frames: _containers.RepeatedScalarFieldContainer[int]
    solvers: _containers.RepeatedScalarFieldContainer[str]
    schedules: _containers.RepeatedScalarFieldContainer[str]
    max_guidance: float
    max_prompt_bytes: int
    max_image_bytes: int
    defaults: _containers.MessageMap[str, Model.Defaults]
    guidance_rules: _containers.RepeatedCompositeFieldContainer[Model.GuidanceRule]
    fits: _containers.RepeatedCompositeFieldContainer[Model.Fit]
    step_caches: _containers.RepeatedCompositeFieldContainer[Model.StepCache]
    student: Model.Student
    loras: _containers.RepeatedCompositeFieldContainer[Model.Lora]
    lora_rank: int
    lora_layers: _containers.RepeatedScalarFieldContainer[str]
    fused: _containers.RepeatedCompositeFieldContainer[Model.Fused]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., max_width: _Optional[int] = ..., max_height: _Optional[int] = ..., max_frames: _Optional[int] = ..., max_steps: _Optional[int] = ..., max_count: _Optional[int] = ..., output_media_types: _Optional[_Iterable[str]] = ..., capabilities: _Optional[_Iterable[str]] = ..., sizes: _Optional[_Iterable[_Union[Model.Size, _Mapping]]] = ..., frames: _Optional[_Iterable[int]] = ..., solvers: _Optional[_Iterable[str]] = ..., schedules: _Optional[_Iterable[str]] = ..., max_guidance: _Optional[float] = ..., max_prompt_bytes: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., defaults: _Optional[_Mapping[str, Model.Defaults]] = ..., guidance_rules: _Optional[_Iterable[_Union[Model.GuidanceRule, _Mapping]]] = ..., fits: _Optional[_Iterable[_Union[Model.Fit, _Mapping]]] = ..., step_caches: _Optional[_Iterable[_Union[Model.StepCache, _Mapping]]] = ..., student: _Optional[_Union[Model.Student, _Mapping]] = ..., loras: _Optional[_Iterable[_Union[Model.Lora, _Mapping]]] = ..., lora_rank: _Optional[int] = ..., lora_layers: _Optional[_Iterable[str]] = ..., fused: _Optional[_Iterable[_Union[Model.Fused, _Mapping]]] = ...) -> None: ...
