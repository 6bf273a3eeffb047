from shoal_protos.v1 import profile_pb2 as _profile_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrollRequest(_message.Message):
    __slots__ = ("token_secret", "csr_der", "profile", "name")
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    token_secret: str
    csr_der: bytes
    profile: _profile_pb2.Profile
    name: str
    def __init__(self, token_secret: _Optional[str] = ..., csr_der: _Optional[bytes] = ..., profile: _Optional[_Union[_profile_pb2.Profile, _Mapping]] = ..., name: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("device", "csr_der", "old_certificate_der", "proof")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    OLD_CERTIFICATE_DER_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    device: str
    csr_der: bytes
    old_certificate_der: bytes
    proof: bytes
    def __init__(self, device: _Optional[str] = ..., csr_der: _Optional[bytes] = ..., old_certificate_der: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("fleet", "device", "certificate_der", "ca_certificates_der", "desired_state_keys", "profile_class", "agent_addresses", "server_time_ms", "display_name", "class_reason")
    FLEET_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_DER_FIELD_NUMBER: _ClassVar[int]
    CA_CERTIFICATES_DER_FIELD_NUMBER: _ClassVar[int]
    DESIRED_STATE_KEYS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_CLASS_FIELD_NUMBER: _ClassVar[int]
    AGENT_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    CLASS_REASON_FIELD_NUMBER: _ClassVar[int]
    fleet: str
    device: str
    certificate_der: bytes
    ca_certificates_der: _containers.RepeatedScalarFieldContainer[bytes]
    desired_state_keys: _containers.RepeatedScalarFieldContainer[bytes]
    profile_class: str
    agent_addresses: _containers.RepeatedScalarFieldContainer[str]
    server_time_ms: int
    display_name: str
    class_reason: str
    def __init__(self, fleet: _Optional[str] = ..., device: _Optional[str] = ..., certificate_der: _Optional[bytes] = ..., ca_certificates_der: _Optional[_Iterable[bytes]] = ..., desired_state_keys: _Optional[_Iterable[bytes]] = ..., profile_class: _Optional[str] = ..., agent_addresses: _Optional[_Iterable[str]] = ..., server_time_ms: _Optional[int] = ..., display_name: _Optional[str] = ..., class_reason: _Optional[str] = ...) -> None: ...
