"""The same store on PostgreSQL. Skipped where no server is installed."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select

from shoal_controller import desired_publish, enrolment, identity
from shoal_controller.settings import Settings
from shoal_controller.store.repositories import Store, new_id, record
from shoal_controller.store.tables import Base, Desired, Event
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import enrolment_pb2

from .conftest import START_MS, csr_of, profile_of

pytest.importorskip("psycopg")
BINARIES = next((path for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An ephemeral server's URL. PostgreSQL refuses to run as root: then as `postgres`."""
    if BINARIES is None:
        pytest.skip("PostgreSQL is not installed")
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    made = subprocess.run([*as_user, "mktemp", "-d"], capture_output=True, text=True, cwd="/")
    if made.returncode:
        pytest.skip("no user to run PostgreSQL as")
    data = Path(made.stdout.strip())

    def call(*arguments: str) -> None:
        subprocess.run(
            [*as_user, *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call(str(BINARIES / "initdb"), "-N", "-A", "trust", "-U", "shoal", "-D", f"{data}/db")
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = str(BINARIES / "pg_ctl")
    call(control, "-D", f"{data}/db", "-l", f"{data}/log", "-o", options, "-w", "start")
    yield f"postgresql+psycopg://shoal@127.0.0.1:{port}/postgres"
    call(control, "-D", f"{data}/db", "-m", "immediate", "-w", "stop")
    shutil.rmtree(data, ignore_errors=True)


async def test_the_store_works_unchanged(server: str, home: Path, settings: Settings) -> None:
    store = Store.open(server, clock=lambda: START_MS)
    other = Store.open(server, clock=lambda: START_MS)  # as the worker does
    try:
        with store.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, Base.metadata) == []
        _ids_are_unique(store, other)
        await _group_commit(store)
        _joins_and_publishes(store, home, settings)
    finally:
        store.close()
        other.close()


def _ids_are_unique(store: Store, other: Store) -> None:
    ids = []
    for _ in range(5):
        for one in (store, other):
            with one.write() as session:
                ids.append(new_id(session, "x"))
    assert len(set(ids)) == 10


async def _group_commit(store: Store) -> None:
    def good(session: Any) -> None:
        record(session, actor="a", verb="v", kind="k", object="o")

    def bad(session: Any) -> None:
        good(session)
        session.flush()
        raise InvalidInput("no")

    work = [store.submit(bad if at % 4 == 0 else good) for at in range(40)]
    results = await asyncio.gather(*work, return_exceptions=True)
    assert sum(isinstance(result, InvalidInput) for result in results) == 10
    with store.read() as session:
        assert len(session.scalars(select(Event)).all()) == 30


def _joins_and_publishes(store: Store, home: Path, settings: Settings) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = identity.init(home, "test")
    key = ec.generate_private_key(ec.SECP256R1())
    with store.write() as session:
        _, secret = enrolment.create_token(session, uses=1, ttl_s=60, now_ms=START_MS)
        request = enrolment_pb2.EnrollRequest(
            token_secret=secret, csr_der=csr_of(key), profile=profile_of(), name="cam"
        )
        reply = enrolment.enroll(session, keys, request, settings=settings, now_ms=START_MS)
    assert desired_publish.publish(store, keys, None, clock=lambda: START_MS) == [reply.device]
    with store.read() as session:
        assert session.get_one(Desired, reply.device).generation == 1
