"""A controller for tests: real gRPC doors with a real throwaway CA, everything behind them in memory.

True to the protocol: enrolment with counted tokens, mutual TLS, signed desired states, acknowledgement
after "commit", ranged blobs, resumable pushes. It can go away and come back on the same ports.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shoal_agent.keys import RENEW_DOMAIN
from shoal_agent.profile import class_of
from shoal_protos import signing
from shoal_protos.tokens import JoinToken, server_name
from shoal_protos.v1 import (
    agents_pb2,
    agents_pb2_grpc,
    blobs_pb2,
    blobs_pb2_grpc,
    desired_pb2,
    enrolment_pb2,
    enrolment_pb2_grpc,
)

CHUNK = 64 * 1024


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Authority:
    """A throwaway CA."""

    def __init__(self, fleet: str) -> None:
        self.fleet = fleet
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{fleet} CA")])
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime(1970, 1, 1, tzinfo=timezone.utc))
            .not_valid_after(datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def _issue(
        self, common_name: str, key: Any, san: x509.GeneralName, usage: Any, start: datetime, end: datetime
    ) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName([san]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def door(self) -> tuple[bytes, bytes]:
        """(key, certificate) of a server, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(
            "controller",
            key.public_key(),
            x509.DNSName(server_name(self.fleet)),
            ExtendedKeyUsageOID.SERVER_AUTH,
            datetime(1970, 1, 1, tzinfo=timezone.utc),
            datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc),
        )
        return _key_pem(key), _pem(certificate)

    def device(self, device: str, public_key: Any, life: timedelta) -> x509.Certificate:
        now = datetime.now(timezone.utc)
        return self._issue(
            device,
            public_key,
            x509.UniformResourceIdentifier(f"spiffe://{self.fleet}/device/{device}"),
            ExtendedKeyUsageOID.CLIENT_AUTH,
            now - timedelta(seconds=1),
            now + life,
        )


@dataclass
class Token:
    uses: int
    expires: float = field(default_factory=lambda: time.time() + 3600)


@dataclass
class Device:
    """What the controller knows of one device."""

    id: str
    name: str
    profile: Any
    epoch: int = 1
    generation: int = 0
    signed: desired_pb2.Signed | None = None
    queue: asyncio.Queue[agents_pb2.Down] | None = None  # of the open stream
    hellos: list[agents_pb2.Hello] = field(default_factory=list)
    heartbeats: list[agents_pb2.Heartbeat] = field(default_factory=list)
    reports: list[agents_pb2.Reported] = field(default_factory=list)
    spooled: dict[tuple[str, int], agents_pb2.Spooled] = field(default_factory=dict)
    through: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # highest contiguous
    serials: list[int] = field(default_factory=list)

    @property
    def connected(self) -> bool:
        return self.queue is not None

    def items(self, kind: str) -> list[Any]:
        """Spooled items of one kind, in order of arrival."""
        return [getattr(item, kind) for item in self.spooled.values() if item.WhichOneof("item") == kind]

    def placement(self, endpoint: str) -> agents_pb2.PlacementStatus | None:
        """The last reported status of an endpoint."""
        for status in self.reports[-1].placements if self.reports else ():
            if status.endpoint == endpoint:
                return status
        return None


class FakeController:
    """`async with FakeController() as controller:` opens both doors on free loopback ports."""

    def __init__(self, fleet: str = "test", certificate_life: timedelta = timedelta(days=30)) -> None:
        self.fleet = fleet
        self.authority = Authority(fleet)
        self.signing_key = Ed25519PrivateKey.generate()
        self.certificate_life = certificate_life
        self.tokens: dict[str, Token] = {}
        self.devices: dict[str, Device] = {}
        self.by_key: dict[bytes, str] = {}
        self.revoked: set[str] = set()
        self.left: dict[str, str] = {}  # device -> the reason that it gave
        self.blobs: dict[str, bytes] = {}
        self.pushed: dict[str, bytearray] = defaultdict(bytearray)
        self.acknowledge = True  # False: messages arrive and are never committed
        self.heartbeat_replies = True
        self.cut_fetch_after: int | None = None  # bytes after which one transfer breaks off
        self.damage: Callable[[bytes], bytes] = lambda data: data
        self.fetches: list[tuple[str, int]] = []  # (digest, offset)
        self.server_time_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
        self.enrolment_port = self.agents_port = 0
        self._servers: list[grpc.aio.Server] = []

    # ------------------------------------------------------------------ doors

    async def __aenter__(self) -> FakeController:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        key, certificate = self.authority.door()
        ca = _pem(self.authority.certificate)
        enrolment, agents = grpc.aio.server(), grpc.aio.server()
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(_Enrolment(self), enrolment)  # type: ignore[no-untyped-call]
        agents_pb2_grpc.add_AgentsServicer_to_server(_Agents(self), agents)  # type: ignore[no-untyped-call]
        blobs_pb2_grpc.add_BlobsServicer_to_server(_Blobs(self), agents)  # type: ignore[no-untyped-call]
        self.enrolment_port = enrolment.add_secure_port(
            f"127.0.0.1:{self.enrolment_port}", grpc.ssl_server_credentials([(key, certificate)])
        )
        self.agents_port = agents.add_secure_port(
            f"127.0.0.1:{self.agents_port}",
            grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True),
        )
        self._servers = [enrolment, agents]
        for server in self._servers:
            await server.start()

    async def stop(self) -> None:
        """Closes the doors; everything known stays, `start` opens them again on the same ports."""
        for server in self._servers:
            await server.stop(0)
        self._servers = []
        for device in self.devices.values():
            device.queue = None

    @property
    def enrolment_address(self) -> str:
        return f"127.0.0.1:{self.enrolment_port}"

    @property
    def agents_address(self) -> str:
        return f"127.0.0.1:{self.agents_port}"

    # ------------------------------------------------------------------ what tests say

    def token(self, secret: str = "secret", uses: int = 10, **changes: Any) -> JoinToken:
        self.tokens.setdefault(secret, Token(uses))
        fields: dict[str, Any] = {
            "fleet": self.fleet,
            "enrolment_addresses": (self.enrolment_address,),
            "agent_addresses": (self.agents_address,),
            "secret": secret,
            "ca_der": _der(self.authority.certificate),
        }
        return JoinToken(**{**fields, **changes})

    def add_bundle(self, layout: Any, digest: str) -> None:
        """Makes every blob of a bundle on disk fetchable."""
        del digest  # its blobs are all in the layout
        for path in (layout / "blobs" / "sha256").iterdir():
            self.blobs[f"sha256:{path.name}"] = path.read_bytes()

    def add_blob(self, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def sign(self, state: desired_pb2.DesiredState) -> desired_pb2.Signed:
        return signing.sign(state.SerializeToString(), self.signing_key)

    def state(self, device: str, **fields: Any) -> desired_pb2.DesiredState:
        """The device's next desired state, unsigned."""
        known = self.devices[device]
        now = self.server_time_ms()
        defaults: dict[str, Any] = {
            "schema": 1,
            "fleet": self.fleet,
            "device": device,
            "epoch": known.epoch,
            "generation": known.generation + 1,
            "issued_at_ms": now,
            "not_after_ms": now + 3_600_000,
        }
        return desired_pb2.DesiredState(**{**defaults, **fields})

    def publish(self, device: str, **fields: Any) -> desired_pb2.DesiredState:
        """Signs the device's next desired state and sends it if the device is connected."""
        known = self.devices[device]
        state = self.state(device, **fields)
        known.epoch, known.generation = state.epoch, state.generation
        known.signed = self.sign(state)
        self.send(device, agents_pb2.Down(desired=known.signed))
        return state

    def send(self, device: str, message: agents_pb2.Down) -> None:
        queue = self.devices[device].queue
        if queue is not None:
            queue.put_nowait(message)

    def revoke(self, device: str) -> None:
        self.revoked.add(device)
        queue = self.devices[device].queue
        if queue is not None:
            queue.put_nowait(agents_pb2.Down())  # wakes the stream, which then aborts

    async def until(self, condition: Callable[[], Any], what: str = "", timeout: float = 30.0) -> Any:
        """Waits until `condition()` is true and returns its value."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            await asyncio.sleep(0.02)
        raise AssertionError(f"did not happen within {timeout} s: {what or condition}")


class _Enrolment(enrolment_pb2_grpc.EnrolmentServicer):
    def __init__(self, controller: FakeController) -> None:
        self._controller = controller

    async def Enroll(self, request: Any, context: Any) -> enrolment_pb2.EnrollReply:
        controller = self._controller
        token = controller.tokens.get(request.token_secret)
        if token is None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "The join token is not known here.")
        assert token is not None
        if token.expires < time.time():
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "The join token has expired.")
        public = self._public_key(request.csr_der)
        key = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        device = controller.by_key.get(key)
        if device is None:
            if token.uses <= 0:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "The join token is used up.")
            token.uses -= 1
            device = f"d-{len(controller.devices) + 1:04d}"
            controller.by_key[key] = device
            controller.devices[device] = Device(device, request.name, request.profile)
        return self._reply(device, public)

    async def Renew(self, request: Any, context: Any) -> enrolment_pb2.EnrollReply:
        controller = self._controller
        old = x509.load_der_x509_certificate(request.old_certificate_der)
        if request.device not in controller.devices or request.device in controller.revoked:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "The device was revoked.")
        try:
            old.verify_directly_issued_by(controller.authority.certificate)
            public_key = old.public_key()
            assert isinstance(public_key, ec.EllipticCurvePublicKey)
            public_key.verify(request.proof, RENEW_DOMAIN + request.csr_der, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "The proof is not by the old key.")
        return self._reply(request.device, self._public_key(request.csr_der))

    @staticmethod
    def _public_key(csr_der: bytes) -> Any:
        request = x509.load_der_x509_csr(csr_der)
        assert request.is_signature_valid
        return request.public_key()

    def _reply(self, device: str, public: Any) -> enrolment_pb2.EnrollReply:
        controller = self._controller
        known = controller.devices[device]
        certificate = controller.authority.device(device, public, controller.certificate_life)
        known.serials.append(certificate.serial_number)
        return enrolment_pb2.EnrollReply(
            fleet=controller.fleet,
            device=device,
            certificate_der=_der(certificate),
            ca_certificates_der=[_der(controller.authority.certificate)],
            desired_state_keys=[signing.public_bytes(controller.signing_key)],
            profile_class=class_of(known.profile),
            agent_addresses=[controller.agents_address],
            server_time_ms=controller.server_time_ms(),
            display_name=known.name,
            class_reason=f"{class_of(known.profile)}: measured",
        )


def _device_of(context: Any) -> str:
    return str(context.auth_context()["x509_common_name"][0].decode())


class _Agents(agents_pb2_grpc.AgentsServicer):
    def __init__(self, controller: FakeController) -> None:
        self._controller = controller

    async def Connect(self, requests: Any, context: Any) -> AsyncIterator[agents_pb2.Down]:
        controller = self._controller
        name = _device_of(context)
        device = controller.devices.get(name)
        if device is None or name in controller.revoked:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "The device was revoked.")
        assert device is not None
        first = await anext(aiter(requests))
        assert first.WhichOneof("message") == "hello", "the first message must be hello"
        device.hellos.append(first.hello)
        queue: asyncio.Queue[agents_pb2.Down] = asyncio.Queue()
        device.queue = queue
        welcome = agents_pb2.Welcome(
            controller_version="0.1.0",
            server_time_ms=controller.server_time_ms(),
            profile_class=class_of(first.hello.profile),
            display_name=device.name,
            class_reason=f"{class_of(first.hello.profile)}: measured",
        )
        reader = asyncio.ensure_future(self._read(device, requests, queue))
        try:
            yield agents_pb2.Down(welcome=welcome)
            if device.signed is not None:
                yield agents_pb2.Down(desired=device.signed)
            while not reader.done():
                getter = asyncio.ensure_future(queue.get())
                await asyncio.wait([getter, reader], return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    getter.cancel()
                    break
                if name in controller.revoked:
                    await context.abort(grpc.StatusCode.PERMISSION_DENIED, "The device was revoked.")
                yield getter.result()
        finally:
            reader.cancel()
            if device.queue is queue:
                device.queue = None

    async def Leave(self, request: Any, context: Any) -> agents_pb2.LeaveReply:
        name = _device_of(context)
        self._controller.revoked.add(name)
        self._controller.left[name] = request.reason
        known = self._controller.devices.get(name)
        if known is not None and known.queue is not None:
            known.queue.put_nowait(agents_pb2.Down())  # wakes the stream, which then aborts
        return agents_pb2.LeaveReply(device=name)

    async def _read(self, device: Device, requests: Any, queue: asyncio.Queue[agents_pb2.Down]) -> None:
        async for message in requests:
            kind = message.WhichOneof("message")
            if kind == "heartbeat":
                device.heartbeats.append(message.heartbeat)
                if self._controller.heartbeat_replies:
                    reply = agents_pb2.HeartbeatReply(
                        number=message.heartbeat.number, server_time_ms=self._controller.server_time_ms()
                    )
                    queue.put_nowait(agents_pb2.Down(heartbeat=reply))
            elif kind == "reported":
                device.reports.append(message.reported)
            elif kind == "spooled" and self._controller.acknowledge:
                queue.put_nowait(agents_pb2.Down(ack=self._commit(device, message.spooled)))

    @staticmethod
    def _commit(device: Device, spooled: agents_pb2.Spooled) -> agents_pb2.Ack:
        through = device.through[spooled.spool_id]
        last = spooled.gap.to_sequence if spooled.WhichOneof("item") == "gap" else spooled.sequence
        if spooled.sequence <= through + 1 or not through:
            device.spooled[spooled.spool_id, spooled.sequence] = spooled
            device.through[spooled.spool_id] = max(through, last)
        return agents_pb2.Ack(spool_id=spooled.spool_id, through=device.through[spooled.spool_id])


class _Blobs(blobs_pb2_grpc.BlobsServicer):
    def __init__(self, controller: FakeController) -> None:
        self._controller = controller

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[blobs_pb2.Chunk]:
        controller = self._controller
        data = controller.blobs.get(request.digest)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"No blob {request.digest[:19]}.")
        assert data is not None
        controller.fetches.append((request.digest, request.offset))
        data = controller.damage(data)
        end = min(len(data), request.offset + request.length) if request.length else len(data)
        sent = 0
        for offset in range(request.offset, end, CHUNK):
            if controller.cut_fetch_after is not None and sent >= controller.cut_fetch_after:
                controller.cut_fetch_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut off")
            chunk = data[offset : min(offset + CHUNK, end)]
            sent += len(chunk)
            yield blobs_pb2.Chunk(offset=offset, data=chunk, total=len(data))

    async def Stat(self, request: Any, context: Any) -> blobs_pb2.StatReply:
        return self._state(request.digest)

    async def Push(self, requests: Any, context: Any) -> blobs_pb2.StatReply:
        header = (await anext(aiter(requests))).header
        partial = self._controller.pushed[header.digest]
        if header.offset != len(partial):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Resume at Stat.received.")
        async for request in requests:
            partial += request.data
        if len(partial) == header.size:
            digest = "sha256:" + hashlib.sha256(partial).hexdigest()
            if digest != header.digest:
                partial.clear()
                await context.abort(grpc.StatusCode.DATA_LOSS, "The blob does not match its digest.")
            self._controller.blobs[digest] = bytes(partial)
        return self._state(header.digest)

    def _state(self, digest: str) -> blobs_pb2.StatReply:
        whole = self._controller.blobs.get(digest)
        received = len(whole) if whole is not None else len(self._controller.pushed[digest])
        return blobs_pb2.StatReply(digest=digest, received=received, complete=whole is not None)
