from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PRIMARY: _ClassVar[Role]
    ROLE_SHADOW: _ClassVar[Role]

class TrialKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRIAL_KIND_UNSPECIFIED: _ClassVar[TrialKind]
    TRIAL_KIND_TIMING: _ClassVar[TrialKind]
    TRIAL_KIND_OUTPUTS: _ClassVar[TrialKind]

class RequestKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_KIND_UNSPECIFIED: _ClassVar[RequestKind]
    REQUEST_KIND_LOGS: _ClassVar[RequestKind]
    REQUEST_KIND_DIAGNOSE: _ClassVar[RequestKind]
    REQUEST_KIND_PROFILE: _ClassVar[RequestKind]
ROLE_UNSPECIFIED: Role
ROLE_PRIMARY: Role
ROLE_SHADOW: Role
TRIAL_KIND_UNSPECIFIED: TrialKind
TRIAL_KIND_TIMING: TrialKind
TRIAL_KIND_OUTPUTS: TrialKind
REQUEST_KIND_UNSPECIFIED: RequestKind
REQUEST_KIND_LOGS: RequestKind
REQUEST_KIND_DIAGNOSE: RequestKind
REQUEST_KIND_PROFILE: RequestKind

class Signed(_message.Message):
    __slots__ = ("payload", "signatures")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signatures: _containers.RepeatedCompositeFieldContainer[Signature]
    def __init__(self, payload: _Optional[bytes] = ..., signatures: _Optional[_Iterable[_Union[Signature, _Mapping]]] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("key_id", "value")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    value: bytes
    def __init__(self, key_id: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...

class DesiredState(_message.Message):
    __slots__ = ("schema", "fleet", "device", "epoch", "generation", "requires", "placements", "trials", "requests", "keep", "agent_settings", "min_targets_version", "issued_at_ms", "not_after_ms")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    FLEET_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    AGENT_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    MIN_TARGETS_VERSION_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    schema: int
    fleet: str
    device: str
    epoch: int
    generation: int
    requires: _containers.RepeatedCompositeFieldContainer[Requirement]
    placements: _containers.RepeatedCompositeFieldContainer[Placement]
    trials: _containers.RepeatedCompositeFieldContainer[Trial]
    requests: _containers.RepeatedCompositeFieldContainer[Request]
    keep: _containers.RepeatedScalarFieldContainer[str]
    agent_settings: AgentSettings
    min_targets_version: int
    issued_at_ms: int
    not_after_ms: int
    def __init__(self, schema: _Optional[int] = ..., fleet: _Optional[str] = ..., device: _Optional[str] = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ..., requires: _Optional[_Iterable[_Union[Requirement, _Mapping]]] = ..., placements: _Optional[_Iterable[_Union[Placement, _Mapping]]] = ..., trials: _Optional[_Iterable[_Union[Trial, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., keep: _Optional[_Iterable[str]] = ..., agent_settings: _Optional[_Union[AgentSettings, _Mapping]] = ..., min_targets_version: _Optional[int] = ..., issued_at_ms: _Optional[int] = ..., not_after_ms: _Optional[int] = ...) -> None: ...

class Requirement(_message.Message):
    __slots__ = ("feature", "since_version")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    SINCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    feature: str
    since_version: str
    def __init__(self, feature: _Optional[str] = ..., since_version: _Optional[str] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("endpoint", "bundle", "role", "attempt", "settings")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    bundle: str
    role: Role
    attempt: int
    settings: PlacementSettings
    def __init__(self, endpoint: _Optional[str] = ..., bundle: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., attempt: _Optional[int] = ..., settings: _Optional[_Union[PlacementSettings, _Mapping]] = ...) -> None: ...

class PlacementSettings(_message.Message):
    __slots__ = ("project", "model", "model_version", "variant", "envelope", "promised_int8_share", "options", "settle", "sampling", "fallback", "shadow_share")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    PROMISED_INT8_SHARE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    SHADOW_SHARE_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    model_version: int
    variant: str
    envelope: Envelope
    promised_int8_share: float
    options: RuntimeOptions
    settle: Settle
    sampling: Sampling
    fallback: bool
    shadow_share: float
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., model_version: _Optional[int] = ..., variant: _Optional[str] = ..., envelope: _Optional[_Union[Envelope, _Mapping]] = ..., promised_int8_share: _Optional[float] = ..., options: _Optional[_Union[RuntimeOptions, _Mapping]] = ..., settle: _Optional[_Union[Settle, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., fallback: bool = ..., shadow_share: _Optional[float] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("latency_p95_ms", "latency_tolerance", "memory_bytes", "accuracy")
    LATENCY_P95_MS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    latency_p95_ms: float
    latency_tolerance: float
    memory_bytes: int
    accuracy: float
    def __init__(self, latency_p95_ms: _Optional[float] = ..., latency_tolerance: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., accuracy: _Optional[float] = ...) -> None: ...

class RuntimeOptions(_message.Message):
    __slots__ = ("threads", "extra")
    class ExtraEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    THREADS_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    threads: int
    extra: _containers.ScalarMap[str, str]
    def __init__(self, threads: _Optional[int] = ..., extra: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Settle(_message.Message):
    __slots__ = ("seconds", "max_error_share", "max_latency_ratio", "min_requests")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_SHARE_FIELD_NUMBER: _ClassVar[int]
    MAX_LATENCY_RATIO_FIELD_NUMBER: _ClassVar[int]
    MIN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    seconds: int
    max_error_share: float
    max_latency_ratio: float
    min_requests: int
    def __init__(self, seconds: _Optional[int] = ..., max_error_share: _Optional[float] = ..., max_latency_ratio: _Optional[float] = ..., min_requests: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("share", "max_samples_per_window", "max_bytes_per_day", "label_wait_seconds")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_PER_WINDOW_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    LABEL_WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    share: float
    max_samples_per_window: int
    max_bytes_per_day: int
    label_wait_seconds: int
    def __init__(self, share: _Optional[float] = ..., max_samples_per_window: _Optional[int] = ..., max_bytes_per_day: _Optional[int] = ..., label_wait_seconds: _Optional[int] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("id", "bundle", "kind", "dataset", "incumbent", "not_after_ms", "max_bytes", "options")
    ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    bundle: str
    kind: TrialKind
    dataset: str
    incumbent: str
    not_after_ms: int
    max_bytes: int
    options: RuntimeOptions
    def __init__(self, id: _Optional[str] = ..., bundle: _Optional[str] = ..., kind: _Optional[_Union[TrialKind, str]] = ..., dataset: _Optional[str] = ..., incumbent: _Optional[str] = ..., not_after_ms: _Optional[int] = ..., max_bytes: _Optional[int] = ..., options: _Optional[_Union[RuntimeOptions, _Mapping]] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "kind", "not_after_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: RequestKind
    not_after_ms: int
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[_Union[RequestKind, str]] = ..., not_after_ms: _Optional[int] = ...) -> None: ...

class AgentSettings(_message.Message):
    __slots__ = ("controllers", "telemetry_seconds", "heartbeat_seconds", "bandwidth_bytes_per_s")
    CONTROLLERS_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    controllers: _containers.RepeatedCompositeFieldContainer[ControllerAddress]
    telemetry_seconds: int
    heartbeat_seconds: int
    bandwidth_bytes_per_s: int
    def __init__(self, controllers: _Optional[_Iterable[_Union[ControllerAddress, _Mapping]]] = ..., telemetry_seconds: _Optional[int] = ..., heartbeat_seconds: _Optional[int] = ..., bandwidth_bytes_per_s: _Optional[int] = ...) -> None: ...

class ControllerAddress(_message.Message):
    __slots__ = ("carrier", "address")
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    carrier: str
    address: str
    def __init__(self, carrier: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...
