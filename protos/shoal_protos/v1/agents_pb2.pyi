from shoal_protos.v1 import desired_pb2 as _desired_pb2
from shoal_protos.v1 import profile_pb2 as _profile_pb2
from shoal_protos.v1 import telemetry_pb2 as _telemetry_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Step(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_UNSPECIFIED: _ClassVar[Step]
    STEP_WAITING: _ClassVar[Step]
    STEP_FETCH: _ClassVar[Step]
    STEP_VERIFY: _ClassVar[Step]
    STEP_PROBE: _ClassVar[Step]
    STEP_SWITCH: _ClassVar[Step]
    STEP_SETTLE: _ClassVar[Step]
    STEP_COMMIT: _ClassVar[Step]
    STEP_ROLLED_BACK: _ClassVar[Step]
    STEP_FAILED: _ClassVar[Step]
STEP_UNSPECIFIED: Step
STEP_WAITING: Step
STEP_FETCH: Step
STEP_VERIFY: Step
STEP_PROBE: Step
STEP_SWITCH: Step
STEP_SETTLE: Step
STEP_COMMIT: Step
STEP_ROLLED_BACK: Step
STEP_FAILED: Step

class LeaveRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: str
    def __init__(self, device: _Optional[str] = ...) -> None: ...

class Up(_message.Message):
    __slots__ = ("hello", "reported", "heartbeat", "spooled")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORTED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SPOOLED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    reported: Reported
    heartbeat: Heartbeat
    spooled: Spooled
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., reported: _Optional[_Union[Reported, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., spooled: _Optional[_Union[Spooled, _Mapping]] = ...) -> None: ...

class Down(_message.Message):
    __slots__ = ("welcome", "desired", "ack", "heartbeat")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    desired: _desired_pb2.Signed
    ack: Ack
    heartbeat: HeartbeatReply
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., desired: _Optional[_Union[_desired_pb2.Signed, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., heartbeat: _Optional[_Union[HeartbeatReply, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("agent_version", "features", "profile", "epoch", "generation", "boot_id", "monotonic_ns")
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_NS_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    features: _containers.RepeatedScalarFieldContainer[str]
    profile: _profile_pb2.Profile
    epoch: int
    generation: int
    boot_id: str
    monotonic_ns: int
    def __init__(self, agent_version: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., profile: _Optional[_Union[_profile_pb2.Profile, _Mapping]] = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ..., boot_id: _Optional[str] = ..., monotonic_ns: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("controller_version", "features", "server_time_ms", "profile_class", "display_name", "class_reason")
    CONTROLLER_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_CLASS_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    CLASS_REASON_FIELD_NUMBER: _ClassVar[int]
    controller_version: str
    features: _containers.RepeatedScalarFieldContainer[str]
    server_time_ms: int
    profile_class: str
    display_name: str
    class_reason: str
    def __init__(self, controller_version: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., server_time_ms: _Optional[int] = ..., profile_class: _Optional[str] = ..., display_name: _Optional[str] = ..., class_reason: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("boot_id", "monotonic_ns", "wall_ms", "number")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_NS_FIELD_NUMBER: _ClassVar[int]
    WALL_MS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    monotonic_ns: int
    wall_ms: int
    number: int
    def __init__(self, boot_id: _Optional[str] = ..., monotonic_ns: _Optional[int] = ..., wall_ms: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("number", "server_time_ms")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    number: int
    server_time_ms: int
    def __init__(self, number: _Optional[int] = ..., server_time_ms: _Optional[int] = ...) -> None: ...

class Reported(_message.Message):
    __slots__ = ("epoch", "generation", "placements", "refusals", "requests", "agent_version", "ports", "bundles_on_disk", "clock_wrong")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_ON_DISK_FIELD_NUMBER: _ClassVar[int]
    CLOCK_WRONG_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    generation: int
    placements: _containers.RepeatedCompositeFieldContainer[PlacementStatus]
    refusals: _containers.RepeatedCompositeFieldContainer[Refusal]
    requests: _containers.RepeatedCompositeFieldContainer[RequestResult]
    agent_version: str
    ports: _profile_pb2.Ports
    bundles_on_disk: _containers.RepeatedScalarFieldContainer[str]
    clock_wrong: bool
    def __init__(self, epoch: _Optional[int] = ..., generation: _Optional[int] = ..., placements: _Optional[_Iterable[_Union[PlacementStatus, _Mapping]]] = ..., refusals: _Optional[_Iterable[_Union[Refusal, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[RequestResult, _Mapping]]] = ..., agent_version: _Optional[str] = ..., ports: _Optional[_Union[_profile_pb2.Ports, _Mapping]] = ..., bundles_on_disk: _Optional[_Iterable[str]] = ..., clock_wrong: bool = ...) -> None: ...

class PlacementStatus(_message.Message):
    __slots__ = ("endpoint", "wanted", "serving", "step", "attempt", "reason", "detail", "logs", "probe", "progress", "role")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    LOGS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    wanted: str
    serving: str
    step: Step
    attempt: int
    reason: str
    detail: str
    logs: bytes
    probe: ProbeReport
    progress: float
    role: int
    def __init__(self, endpoint: _Optional[str] = ..., wanted: _Optional[str] = ..., serving: _Optional[str] = ..., step: _Optional[_Union[Step, str]] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., logs: _Optional[bytes] = ..., probe: _Optional[_Union[ProbeReport, _Mapping]] = ..., progress: _Optional[float] = ..., role: _Optional[int] = ...) -> None: ...

class ProbeReport(_message.Message):
    __slots__ = ("ok", "latency_p50_ms", "latency_p95_ms", "memory_bytes", "int8_share", "max_abs_error", "agreement", "runs", "runtime_version", "unmeasured")
    OK_FIELD_NUMBER: _ClassVar[int]
    LATENCY_P50_MS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_P95_MS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    INT8_SHARE_FIELD_NUMBER: _ClassVar[int]
    MAX_ABS_ERROR_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_VERSION_FIELD_NUMBER: _ClassVar[int]
    UNMEASURED_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    latency_p50_ms: float
    latency_p95_ms: float
    memory_bytes: int
    int8_share: float
    max_abs_error: float
    agreement: float
    runs: int
    runtime_version: str
    unmeasured: str
    def __init__(self, ok: bool = ..., latency_p50_ms: _Optional[float] = ..., latency_p95_ms: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., int8_share: _Optional[float] = ..., max_abs_error: _Optional[float] = ..., agreement: _Optional[float] = ..., runs: _Optional[int] = ..., runtime_version: _Optional[str] = ..., unmeasured: _Optional[str] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("epoch", "generation", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    generation: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., generation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RequestResult(_message.Message):
    __slots__ = ("id", "body")
    ID_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    id: str
    body: bytes
    def __init__(self, id: _Optional[str] = ..., body: _Optional[bytes] = ...) -> None: ...

class Spooled(_message.Message):
    __slots__ = ("spool_id", "sequence", "telemetry", "trial", "sample", "gap")
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    spool_id: str
    sequence: int
    telemetry: _telemetry_pb2.TelemetryWindow
    trial: _telemetry_pb2.TrialResult
    sample: _telemetry_pb2.SampleNotice
    gap: _telemetry_pb2.Gap
    def __init__(self, spool_id: _Optional[str] = ..., sequence: _Optional[int] = ..., telemetry: _Optional[_Union[_telemetry_pb2.TelemetryWindow, _Mapping]] = ..., trial: _Optional[_Union[_telemetry_pb2.TrialResult, _Mapping]] = ..., sample: _Optional[_Union[_telemetry_pb2.SampleNotice, _Mapping]] = ..., gap: _Optional[_Union[_telemetry_pb2.Gap, _Mapping]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("spool_id", "through")
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    THROUGH_FIELD_NUMBER: _ClassVar[int]
    spool_id: str
    through: int
    def __init__(self, spool_id: _Optional[str] = ..., through: _Optional[int] = ...) -> None: ...
