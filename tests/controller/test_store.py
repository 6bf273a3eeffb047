"""Transactions, group commit, ids, events, migrations."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from shoal_controller.store.repositories import Store, find, get_meta, new_id, record, set_meta
from shoal_controller.store.tables import Base, Event, Meta, Model
from shoal_protos.errors import InvalidInput, NotFound, Unavailable, Unsupported


def test_migrations_make_the_tables(store: Store) -> None:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_every_connection_is_durable(store: Store) -> None:
    with store.read() as session:
        assert session.scalar(text("PRAGMA synchronous")) == 2  # FULL
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
        assert session.scalar(text("PRAGMA busy_timeout")) > 0


def test_a_database_of_a_newer_version_is_refused(home: Path) -> None:
    url = f"sqlite:///{home / 'shoal.db'}"
    store = Store.open(url)
    with store.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(Unsupported, match=r"9999.*update Shoal"):
        Store.open(url)


def test_a_database_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be opened"):
        Store.open(f"sqlite:///{tmp_path / 'nowhere' / 'shoal.db'}")


def test_an_exception_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.write() as session:  # noqa: PT012
        set_meta(session, "a", "1")
        raise ZeroDivisionError
    with store.read() as session:
        assert get_meta(session, "a", "nothing") == "nothing"


def test_nested_writes_are_a_loud_bug(store: Store) -> None:
    with store.write(), pytest.raises(AssertionError, match="inside"), store.write():
        pass


def test_ids_are_readable_and_never_given_twice(store: Store) -> None:
    with store.write() as session:
        assert [new_id(session, "r"), new_id(session, "r"), new_id(session, "e")] == [
            "r-0001",
            "r-0002",
            "e-0001",
        ]
    with store.write() as session:
        assert new_id(session, "r") == "r-0003"


def test_ids_are_unique_between_processes(home: Path, store: Store) -> None:
    """Controller and worker write the same database."""
    script = (
        "import sys\n"
        "from shoal_controller.store.repositories import Store, new_id\n"
        "store = Store.open(sys.argv[1])\n"
        "for _ in range(25):\n"
        "    with store.write() as session:\n"
        "        print(new_id(session, 'x'))\n"
    )
    url = f"sqlite:///{home / 'shoal.db'}"
    others = [
        subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    mine = []
    for _ in range(25):
        with store.write() as session:
            mine.append(new_id(session, "x"))
    theirs = [line for other in others for line in other.communicate()[0].split()]
    assert [other.returncode for other in others] == [0, 0]
    assert len(set(mine) | set(theirs)) == 75


async def test_submitted_functions_share_a_commit_and_fail_alone(store: Store) -> None:
    def good(session: Any) -> Any:
        session.add(Meta(key=f"k{new_id(session, 'k')}", value=""))
        record(session, actor="a", verb="v", kind="k", object="o")

    def bad(session: Any) -> Any:
        record(session, actor="a", verb="bad", kind="k", object="o")
        session.flush()
        raise InvalidInput("no")

    results = await asyncio.gather(
        *(store.submit(bad if at % 5 == 0 else good) for at in range(100)), return_exceptions=True
    )
    assert sum(isinstance(result, InvalidInput) for result in results) == 20
    with store.read() as session:
        assert {event.verb for event in session.scalars(select(Event))} == {"v"}
        assert len(session.scalars(select(Meta).where(Meta.key.like("kk-%"))).all()) == 80


async def test_submitted_functions_run_in_order(store: Store) -> None:
    seen: list[int] = []

    def note(number: int) -> Callable[[Session], None]:
        return lambda _session: seen.append(number)

    await asyncio.gather(*(store.submit(note(number)) for number in range(50)))
    assert seen == list(range(50))


async def test_closing_commits_what_was_submitted(home: Path) -> None:
    url = f"sqlite:///{home / 'other.db'}"
    store = Store.open(url)
    waiting = asyncio.ensure_future(store.submit(lambda session: set_meta(session, "last", "kept")))
    await asyncio.sleep(0)
    await asyncio.to_thread(store.close)
    await waiting
    with pytest.raises(Unavailable):
        await store.submit(lambda session: None)
    again = Store.open(url)
    with again.read() as session:
        assert get_meta(session, "last") == "kept"
    again.close()


def test_listeners_hear_of_events_after_the_commit(store: Store) -> None:
    heard = []
    remove = store.listen(lambda: heard.append(True))
    with store.write() as session:
        record(session, actor="a", verb="v", kind="k", object="o")
        assert not heard
    assert heard == [True]
    with store.write() as session:
        set_meta(session, "quiet", "1")
    with pytest.raises(ZeroDivisionError), store.write() as session:  # noqa: PT012
        record(session, actor="a", verb="v", kind="k", object="o")
        raise ZeroDivisionError
    assert heard == [True]
    remove()


def test_objects_are_found_by_id_name_and_unique_prefix(store: Store) -> None:
    with store.write() as session:
        for number, name in ((1, "digits"), (2, "signs"), (10, "faces")):
            session.add(Model(id=f"m-{number:04d}", name=name, created_ms=0))
    with store.read() as session:
        assert find(session, Model, "m-0002").name == "signs"
        assert find(session, Model, "signs").id == "m-0002"
        assert find(session, Model, "m-001").name == "faces"
        with pytest.raises(InvalidInput, match=r"m-0001, m-0002.*Give more"):
            find(session, Model, "m-000")
        with pytest.raises(NotFound, match=r"no model 'cars'.*shoal model list"):
            find(session, Model, "cars")
        with pytest.raises(InvalidInput):
            find(session, Model, "")
        with pytest.raises(NotFound):
            find(session, Model, "%")
