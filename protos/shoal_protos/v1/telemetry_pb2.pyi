from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Histogram(_message.Message):
    __slots__ = ("scale", "offset", "counts", "count", "sum", "min", "max", "zero_count")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    ZERO_COUNT_FIELD_NUMBER: _ClassVar[int]
    scale: int
    offset: int
    counts: _containers.RepeatedScalarFieldContainer[int]
    count: int
    sum: float
    min: float
    max: float
    zero_count: int
    def __init__(self, scale: _Optional[int] = ..., offset: _Optional[int] = ..., counts: _Optional[_Iterable[int]] = ..., count: _Optional[int] = ..., sum: _Optional[float] = ..., min: _Optional[float] = ..., max: _Optional[float] = ..., zero_count: _Optional[int] = ...) -> None: ...

class Sketch(_message.Message):
    __slots__ = ("name", "low", "width", "counts", "count", "sum", "sum_squares", "min", "max")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    SUM_SQUARES_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    name: str
    low: float
    width: float
    counts: _containers.RepeatedScalarFieldContainer[int]
    count: int
    sum: float
    sum_squares: float
    min: float
    max: float
    def __init__(self, name: _Optional[str] = ..., low: _Optional[float] = ..., width: _Optional[float] = ..., counts: _Optional[_Iterable[int]] = ..., count: _Optional[int] = ..., sum: _Optional[float] = ..., sum_squares: _Optional[float] = ..., min: _Optional[float] = ..., max: _Optional[float] = ...) -> None: ...

class SketchSet(_message.Message):
    __slots__ = ("kind", "rule_version", "count", "sketches", "mean_log_spectrum")
    KIND_FIELD_NUMBER: _ClassVar[int]
    RULE_VERSION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SKETCHES_FIELD_NUMBER: _ClassVar[int]
    MEAN_LOG_SPECTRUM_FIELD_NUMBER: _ClassVar[int]
    kind: str
    rule_version: int
    count: int
    sketches: _containers.RepeatedCompositeFieldContainer[Sketch]
    mean_log_spectrum: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, kind: _Optional[str] = ..., rule_version: _Optional[int] = ..., count: _Optional[int] = ..., sketches: _Optional[_Iterable[_Union[Sketch, _Mapping]]] = ..., mean_log_spectrum: _Optional[_Iterable[float]] = ...) -> None: ...

class TelemetryWindow(_message.Message):
    __slots__ = ("boot_id", "monotonic_start_ns", "monotonic_end_ns", "wall_end_ms", "system", "placements", "wire_bytes")
    class WireBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_START_NS_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_END_NS_FIELD_NUMBER: _ClassVar[int]
    WALL_END_MS_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    monotonic_start_ns: int
    monotonic_end_ns: int
    wall_end_ms: int
    system: System
    placements: _containers.RepeatedCompositeFieldContainer[PlacementWindow]
    wire_bytes: _containers.ScalarMap[str, int]
    def __init__(self, boot_id: _Optional[str] = ..., monotonic_start_ns: _Optional[int] = ..., monotonic_end_ns: _Optional[int] = ..., wall_end_ms: _Optional[int] = ..., system: _Optional[_Union[System, _Mapping]] = ..., placements: _Optional[_Iterable[_Union[PlacementWindow, _Mapping]]] = ..., wire_bytes: _Optional[_Mapping[str, int]] = ...) -> None: ...

class System(_message.Message):
    __slots__ = ("cpu_share", "memory_used_bytes", "agent_rss_bytes", "server_rss_bytes", "temperature_celsius", "throttled", "disk_free_bytes")
    CPU_SHARE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGENT_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVER_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    THROTTLED_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    cpu_share: float
    memory_used_bytes: int
    agent_rss_bytes: int
    server_rss_bytes: int
    temperature_celsius: float
    throttled: bool
    disk_free_bytes: int
    def __init__(self, cpu_share: _Optional[float] = ..., memory_used_bytes: _Optional[int] = ..., agent_rss_bytes: _Optional[int] = ..., server_rss_bytes: _Optional[int] = ..., temperature_celsius: _Optional[float] = ..., throttled: bool = ..., disk_free_bytes: _Optional[int] = ...) -> None: ...

class PlacementWindow(_message.Message):
    __slots__ = ("endpoint", "bundle", "role", "requests", "errors", "errors_by_reason", "latency", "inputs", "outputs", "labelled", "correct", "label_unmatched", "inference", "compared", "agreed")
    class ErrorsByReasonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_BY_REASON_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    LABEL_UNMATCHED_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_FIELD_NUMBER: _ClassVar[int]
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    AGREED_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    bundle: str
    role: int
    requests: int
    errors: int
    errors_by_reason: _containers.ScalarMap[str, int]
    latency: Histogram
    inputs: SketchSet
    outputs: SketchSet
    labelled: int
    correct: int
    label_unmatched: int
    inference: Histogram
    compared: int
    agreed: int
    def __init__(self, endpoint: _Optional[str] = ..., bundle: _Optional[str] = ..., role: _Optional[int] = ..., requests: _Optional[int] = ..., errors: _Optional[int] = ..., errors_by_reason: _Optional[_Mapping[str, int]] = ..., latency: _Optional[_Union[Histogram, _Mapping]] = ..., inputs: _Optional[_Union[SketchSet, _Mapping]] = ..., outputs: _Optional[_Union[SketchSet, _Mapping]] = ..., labelled: _Optional[int] = ..., correct: _Optional[int] = ..., label_unmatched: _Optional[int] = ..., inference: _Optional[_Union[Histogram, _Mapping]] = ..., compared: _Optional[int] = ..., agreed: _Optional[int] = ...) -> None: ...

class TrialResult(_message.Message):
    __slots__ = ("trial", "ok", "error", "timing", "outputs_blob", "context")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_BLOB_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    trial: str
    ok: bool
    error: str
    timing: TimingResult
    outputs_blob: str
    context: _containers.ScalarMap[str, str]
    def __init__(self, trial: _Optional[str] = ..., ok: bool = ..., error: _Optional[str] = ..., timing: _Optional[_Union[TimingResult, _Mapping]] = ..., outputs_blob: _Optional[str] = ..., context: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TimingResult(_message.Message):
    __slots__ = ("candidate", "incumbent", "ratio", "ratio_low", "ratio_high", "winner", "int8_share")
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    RATIO_LOW_FIELD_NUMBER: _ClassVar[int]
    RATIO_HIGH_FIELD_NUMBER: _ClassVar[int]
    WINNER_FIELD_NUMBER: _ClassVar[int]
    INT8_SHARE_FIELD_NUMBER: _ClassVar[int]
    candidate: Series
    incumbent: Series
    ratio: float
    ratio_low: float
    ratio_high: float
    winner: str
    int8_share: float
    def __init__(self, candidate: _Optional[_Union[Series, _Mapping]] = ..., incumbent: _Optional[_Union[Series, _Mapping]] = ..., ratio: _Optional[float] = ..., ratio_low: _Optional[float] = ..., ratio_high: _Optional[float] = ..., winner: _Optional[str] = ..., int8_share: _Optional[float] = ...) -> None: ...

class Series(_message.Message):
    __slots__ = ("rounds", "runs", "p50_ms", "p50_low_ms", "p50_high_ms", "p95_ms", "p95_low_ms", "p95_high_ms", "rss_bytes", "cpu_ms")
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    P50_MS_FIELD_NUMBER: _ClassVar[int]
    P50_LOW_MS_FIELD_NUMBER: _ClassVar[int]
    P50_HIGH_MS_FIELD_NUMBER: _ClassVar[int]
    P95_MS_FIELD_NUMBER: _ClassVar[int]
    P95_LOW_MS_FIELD_NUMBER: _ClassVar[int]
    P95_HIGH_MS_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_MS_FIELD_NUMBER: _ClassVar[int]
    rounds: int
    runs: int
    p50_ms: float
    p50_low_ms: float
    p50_high_ms: float
    p95_ms: float
    p95_low_ms: float
    p95_high_ms: float
    rss_bytes: int
    cpu_ms: float
    def __init__(self, rounds: _Optional[int] = ..., runs: _Optional[int] = ..., p50_ms: _Optional[float] = ..., p50_low_ms: _Optional[float] = ..., p50_high_ms: _Optional[float] = ..., p95_ms: _Optional[float] = ..., p95_low_ms: _Optional[float] = ..., p95_high_ms: _Optional[float] = ..., rss_bytes: _Optional[int] = ..., cpu_ms: _Optional[float] = ...) -> None: ...

class SampleNotice(_message.Message):
    __slots__ = ("endpoint", "bundle", "blob", "size", "count", "labelled")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    bundle: str
    blob: str
    size: int
    count: int
    labelled: int
    def __init__(self, endpoint: _Optional[str] = ..., bundle: _Optional[str] = ..., blob: _Optional[str] = ..., size: _Optional[int] = ..., count: _Optional[int] = ..., labelled: _Optional[int] = ...) -> None: ...

class Gap(_message.Message):
    __slots__ = ("from_sequence", "to_sequence", "reason")
    FROM_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TO_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    from_sequence: int
    to_sequence: int
    reason: str
    def __init__(self, from_sequence: _Optional[int] = ..., to_sequence: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
