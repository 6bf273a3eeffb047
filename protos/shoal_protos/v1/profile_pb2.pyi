from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Profile(_message.Message):
    __slots__ = ("architecture", "cpu_model", "isa_features", "cores", "memory_bytes", "accelerators", "runtimes", "os", "ports", "agent_version", "features", "hardware_part", "emulated", "python_version")
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CPU_MODEL_FIELD_NUMBER: _ClassVar[int]
    ISA_FEATURES_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATORS_FIELD_NUMBER: _ClassVar[int]
    RUNTIMES_FIELD_NUMBER: _ClassVar[int]
    OS_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_PART_FIELD_NUMBER: _ClassVar[int]
    EMULATED_FIELD_NUMBER: _ClassVar[int]
    PYTHON_VERSION_FIELD_NUMBER: _ClassVar[int]
    architecture: str
    cpu_model: str
    isa_features: _containers.RepeatedScalarFieldContainer[str]
    cores: int
    memory_bytes: int
    accelerators: _containers.RepeatedCompositeFieldContainer[Accelerator]
    runtimes: _containers.RepeatedCompositeFieldContainer[Runtime]
    os: str
    ports: Ports
    agent_version: str
    features: _containers.RepeatedScalarFieldContainer[str]
    hardware_part: str
    emulated: bool
    python_version: str
    def __init__(self, architecture: _Optional[str] = ..., cpu_model: _Optional[str] = ..., isa_features: _Optional[_Iterable[str]] = ..., cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., accelerators: _Optional[_Iterable[_Union[Accelerator, _Mapping]]] = ..., runtimes: _Optional[_Iterable[_Union[Runtime, _Mapping]]] = ..., os: _Optional[str] = ..., ports: _Optional[_Union[Ports, _Mapping]] = ..., agent_version: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., hardware_part: _Optional[str] = ..., emulated: bool = ..., python_version: _Optional[str] = ...) -> None: ...

class Accelerator(_message.Message):
    __slots__ = ("vendor", "kind", "name", "driver_version")
    VENDOR_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DRIVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    vendor: str
    kind: str
    name: str
    driver_version: str
    def __init__(self, vendor: _Optional[str] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., driver_version: _Optional[str] = ...) -> None: ...

class Runtime(_message.Message):
    __slots__ = ("name", "version", "providers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROVIDERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    providers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., providers: _Optional[_Iterable[str]] = ...) -> None: ...

class Ports(_message.Message):
    __slots__ = ("http", "grpc", "metrics", "host")
    HTTP_FIELD_NUMBER: _ClassVar[int]
    GRPC_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    http: int
    grpc: int
    metrics: int
    host: str
    def __init__(self, http: _Optional[int] = ..., grpc: _Optional[int] = ..., metrics: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...
