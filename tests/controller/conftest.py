"""Shared by the controller's tests: a data directory, a store on a clock that tests own, a started
controller, and a small agent that speaks the protocol over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shoal_controller import enrolment, identity
from shoal_controller.api.app import create_api
from shoal_controller.app import Controller
from shoal_controller.identity import Keys
from shoal_controller.settings import Settings
from shoal_controller.store.repositories import Store
from shoal_controller.store.tables import Device
from shoal_protos import tokens
from shoal_protos.v1 import (
    agents_pb2,
    agents_pb2_grpc,
    blobs_pb2_grpc,
    desired_pb2,
    enrolment_pb2,
    enrolment_pb2_grpc,
    profile_pb2,
)

START_MS = 1_790_000_000_000


class FakeClock:
    """A controller's clock that only tests move."""

    def __init__(self, now_ms: int = START_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms

    def advance(self, seconds: float) -> int:
        self.now_ms += int(seconds * 1000)
        return self.now_ms


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings.load(
        {
            "home": home,
            "fleet": "test",
            "http_port": 0,
            "enrolment_port": 0,
            "agents_port": 0,
            "heartbeat_seconds": 2,
            "telemetry_seconds": 2,
        },
        {},
    )


@pytest.fixture
def store(home: Path, clock: FakeClock) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{home / 'shoal.db'}", clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def keys(home: Path) -> Keys:
    return identity.init(home, "test")


def profile_of(*runtimes: str, isa: tuple[str, ...] = ("avx2",), cores: int = 2) -> profile_pb2.Profile:
    """A small x86 machine with these runtimes."""
    return profile_pb2.Profile(
        architecture="x86_64",
        isa_features=isa,
        cores=cores,
        memory_bytes=4 << 30,
        runtimes=[profile_pb2.Runtime(name=name, version="1.20.0") for name in runtimes or ("onnxruntime",)],
        agent_version="0.1.0",
        features=["placements.v1", "trials.v1"],
    )


@pytest.fixture
def make_profile() -> Callable[..., profile_pb2.Profile]:
    return profile_of


def csr_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "device")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.DER)


@dataclass
class Joined:
    """A device that joined: its key and what the controller answered."""

    key: ec.EllipticCurvePrivateKey
    reply: enrolment_pb2.EnrollReply

    @property
    def device(self) -> str:
        return self.reply.device

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def certificate_pem(self) -> bytes:
        certificate = x509.load_der_x509_certificate(self.reply.certificate_der)
        return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def add_device(store: Store, keys: Keys, settings: Settings, clock: FakeClock) -> Callable[..., str]:
    """Joins a device in the store without any door; returns its id."""

    def add(name: str = "cam", profile: profile_pb2.Profile | None = None, **labels: str) -> str:
        key = ec.generate_private_key(ec.SECP256R1())
        with store.write() as session:
            _, secret = enrolment.create_token(session, uses=1, ttl_s=60, now_ms=clock(), labels=labels)
            request = enrolment_pb2.EnrollRequest(
                token_secret=secret, csr_der=csr_of(key), profile=profile or profile_of(), name=name
            )
            reply = enrolment.enroll(session, keys, request, settings=settings, now_ms=clock())
        return str(reply.device)

    return add


# ---------------------------------------------------------------------------- a started controller


@pytest.fixture
async def controller(settings: Settings) -> AsyncIterator[Controller]:
    started = Controller(settings)
    await started.start()
    yield started
    await started.stop()


@pytest.fixture
def opened(settings: Settings, clock: FakeClock) -> Iterator[Controller]:
    """A controller without doors, on the tests' clock."""
    found = Controller(settings, clock)
    found.open()
    found.services.addresses = {"enrolment": "127.0.0.1:8442", "agents": "127.0.0.1:8443"}
    yield found
    found.close()


@pytest.fixture
async def client(opened: Controller) -> AsyncIterator[httpx.AsyncClient]:
    """The API of `opened`, called in process."""
    transport = httpx.ASGITransport(app=create_api(opened), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as found:
        yield found


@dataclass
class FakeAgent:
    """Speaks the agents' side of the protocol. `desired` holds the states received."""

    controller: Controller
    joined: Joined
    profile: profile_pb2.Profile
    boot_id: str = "boot-1"
    monotonic_ns: int = 1_000_000_000_000
    desired: list[desired_pb2.DesiredState] = field(default_factory=list)
    acks: dict[str, int] = field(default_factory=dict)
    heartbeats: list[int] = field(default_factory=list)
    channel: grpc.aio.Channel | None = None
    channels: list[grpc.aio.Channel] = field(default_factory=list)
    call: Any = None
    reader: asyncio.Task[None] | None = None
    welcome: agents_pb2.Welcome | None = None
    ended: grpc.aio.AioRpcError | None = None

    def open_channel(self) -> grpc.aio.Channel:
        keys = self.controller.keys
        credentials = grpc.ssl_channel_credentials(
            keys.ca_pem, self.joined.key_pem, self.joined.certificate_pem
        )
        self.channels.append(secure_channel(self.controller.ports["agents"], credentials, keys.fleet))
        return self.channels[-1]

    async def connect(self, epoch: int = 0, generation: int = 0) -> None:
        self.channel = self.open_channel()
        self.call = agents_pb2_grpc.AgentsStub(self.channel).Connect()  # type: ignore[no-untyped-call]
        hello = agents_pb2.Hello(
            agent_version="0.1.0",
            profile=self.profile,
            epoch=epoch,
            generation=generation,
            boot_id=self.boot_id,
            monotonic_ns=self.monotonic_ns,
        )
        await self.send(hello=hello)
        first = await self.call.read()
        if first is grpc.aio.EOF:
            await self._fail(self.call)
        self.welcome = first.welcome
        self.reader = asyncio.create_task(self._read(self.call))

    async def send(self, **message: Any) -> None:
        await self.call.write(agents_pb2.Up(**message))

    async def _fail(self, call: Any) -> None:
        raise grpc.aio.AioRpcError(
            await call.code(),
            await call.initial_metadata(),
            await call.trailing_metadata(),
            details=await call.details(),
        )

    async def _read(self, call: Any) -> None:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                kind = message.WhichOneof("message")
                if kind == "desired":
                    self.desired.append(desired_pb2.DesiredState.FromString(message.desired.payload))
                elif kind == "ack":
                    self.acks[message.ack.spool_id] = message.ack.through
                elif kind == "heartbeat":
                    self.heartbeats.append(message.heartbeat.number)
            await self._fail(call)
        except grpc.aio.AioRpcError as error:
            self.ended = error

    def blobs(self) -> Any:
        return blobs_pb2_grpc.BlobsStub(self.channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        if self.reader is not None:
            self.reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.reader
        for channel in self.channels:
            await channel.close()


def secure_channel(port: int, credentials: grpc.ChannelCredentials, fleet: str) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(
        f"127.0.0.1:{port}",
        credentials,
        [
            ("grpc.ssl_target_name_override", tokens.server_name(fleet)),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", 64 << 20),
        ],
    )


@pytest.fixture
def open_secure_channel() -> Callable[..., grpc.aio.Channel]:
    return secure_channel


async def enroll(
    controller: Controller,
    secret: str,
    *,
    key: ec.EllipticCurvePrivateKey | None = None,
    name: str = "cam",
    profile: profile_pb2.Profile | None = None,
) -> Joined:
    """Joins through door 8442."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    credentials = grpc.ssl_channel_credentials(controller.keys.ca_pem)
    channel = secure_channel(controller.ports["enrolment"], credentials, controller.keys.fleet)
    async with channel:
        stub = enrolment_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        reply = await stub.Enroll(
            enrolment_pb2.EnrollRequest(
                token_secret=secret, csr_der=csr_of(key), profile=profile or profile_of(), name=name
            )
        )
    return Joined(key, reply)


@pytest.fixture
def join(controller: Controller) -> Callable[..., Awaitable[Joined]]:
    async def joining(secret: str = "", **options: Any) -> Joined:
        return await enroll(controller, secret or new_secret(controller), **options)

    return joining


def new_secret(controller: Controller, uses: int = 1, ttl_s: int = 60) -> str:
    with controller.store.write() as session:
        _, secret = enrolment.create_token(session, uses=uses, ttl_s=ttl_s, now_ms=controller.clock())
    return secret


@pytest.fixture
def make_secret(controller: Controller) -> Callable[..., str]:
    return lambda **options: new_secret(controller, **options)


@pytest.fixture
async def agents(controller: Controller) -> AsyncIterator[Callable[..., Awaitable[FakeAgent]]]:
    """Makes connected agents and closes them at the end."""
    made: list[FakeAgent] = []

    async def make(name: str = "cam", *, connect: bool = True, **options: Any) -> FakeAgent:
        profile = options.pop("profile", None) or profile_of()
        joined = await enroll(controller, new_secret(controller), name=name, profile=profile)
        agent = FakeAgent(controller, joined, profile, **options)
        made.append(agent)
        if connect:
            await agent.connect()
        return agent

    yield make
    for agent in made:
        await agent.close()


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Waits for a condition, patiently: a busy machine is no failure."""
    async with asyncio.timeout(seconds):
        while not (found := condition()):
            await asyncio.sleep(0.02)
    return found


@pytest.fixture
def eventually() -> Callable[..., Awaitable[Any]]:
    return until


@pytest.fixture
def device_row(controller: Controller) -> Callable[[str], Device]:
    def read(device: str) -> Device:
        with controller.store.read() as session:
            row = session.get(Device, device)
            assert row is not None
            return row

    return read
