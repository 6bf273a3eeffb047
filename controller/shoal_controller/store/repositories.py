"""The store: one database behind SQLAlchemy, transactions, ids and events.

SQLite by default (WAL, `synchronous=FULL`: NORMAL loses acknowledged rows at power loss), PostgreSQL
by URL; the code is the same. Writes are serialised, within a process and between processes, so ids
and events rise in commit order.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shoal_controller.clock import Clock, now_ms
from shoal_controller.store import migrations
from shoal_controller.store.tables import Base, Event, Meta
from shoal_protos.errors import InvalidInput, NotFound, Overloaded, Unavailable

T = TypeVar("T")
Row = TypeVar("Row", bound=Base)

BUSY_SECONDS = 30.0  # how long a writer waits for another process's transaction
GROUP_SECONDS = 0.05
GROUP_SIZE = 500
QUEUE_SIZE = 20_000  # submitted functions waiting; beyond it the sender is slowed down

# Any fixed number: the lock that serialises writers on PostgreSQL.
_WRITER_LOCK = 0x5B0A1
_EVENTS = "shoal_events"


class Store:
    """Transactions over one database. Thread-safe; open one per process."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine = engine
        self.clock = clock
        self._writing = engine.execution_options(shoal_write=True)
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._listeners: list[Callable[[], None]] = []
        self._writer = _GroupWriter(self)

    @classmethod
    def open(cls, url: str, *, clock: Clock = now_ms) -> Store:
        """Connects and brings the schema up to date.

        Raises:
            Unavailable: the database cannot be reached or opened.
            Unsupported: a newer Shoal wrote it.
        """
        engine = _engine(url)
        store = cls(engine, clock)
        try:
            with store._writing.begin() as connection:
                migrations.upgrade(connection)
        except OperationalError as error:
            engine.dispose()
            raise Unavailable(f"The database cannot be opened: {error.orig}.") from error
        except BaseException:
            engine.dispose()
            raise
        return store

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view; nothing written in it is kept."""
        with Session(self.engine, autoflush=False, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: commits at the end, rolls back on an exception. Never nest it.

        Events recorded in it wake up listeners after the commit.
        """
        me = threading.get_ident()
        assert self._owner != me, "store.write() inside store.write(): pass the session on instead"
        with self._lock:
            self._owner = me
            try:
                with Session(self._writing, expire_on_commit=False) as session:
                    with session.begin():
                        session.info["store"] = self
                        yield session
                    recorded = session.info.pop(_EVENTS, 0)
            except OperationalError as error:
                if "locked" in str(error.orig):
                    raise Overloaded("The database is busy.", "Try again.") from error
                raise
            finally:
                self._owner = None
        if recorded:
            self.notify()

    async def submit(self, function: Callable[[Session], T]) -> T:
        """Runs `function` in a shared transaction and returns its result after the commit.

        Functions are committed together every 50 ms or 500 of them, each in a savepoint of its own:
        one that raises spoils nothing but itself.

        Raises:
            Overloaded: too many functions wait already.
            Exception: whatever `function` or the commit raised.
        """
        return await asyncio.wrap_future(self._writer.put(function))

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls `callback` (from any thread) after commits that recorded events; returns a remover."""
        self._listeners.append(callback)

        def remove() -> None:
            if callback in self._listeners:
                self._listeners.remove(callback)

        return remove

    def notify(self) -> None:
        for callback in list(self._listeners):
            callback()

    def close(self) -> None:
        """Commits what was submitted, then disconnects."""
        self._writer.close()
        self.engine.dispose()


class _GroupWriter:
    """A thread that commits submitted functions in groups."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: queue.Queue[tuple[Callable[[Session], Any], Future[Any]] | None] = queue.Queue(
            QUEUE_SIZE
        )
        self._thread: threading.Thread | None = None
        self._start = threading.Lock()
        self._closed = False

    def put(self, function: Callable[[Session], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._start:
            if self._closed:
                raise Unavailable("The store is closed.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="store-writer", daemon=True)
                self._thread.start()
            try:
                self._queue.put_nowait((function, future))
            except queue.Full:
                raise Overloaded("The controller's database falls behind.", "Try again later.") from None
        return future

    def close(self) -> None:
        with self._start:
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _loop(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            group, last = self._collect(item)
            self._commit([entry for entry in group if entry[1].set_running_or_notify_cancel()])
            if last:
                return

    def _collect(
        self, first: tuple[Callable[[Session], Any], Future[Any]]
    ) -> tuple[list[tuple[Callable[[Session], Any], Future[Any]]], bool]:
        group = [first]
        deadline = time.monotonic() + GROUP_SECONDS
        while len(group) < GROUP_SIZE:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return group, True
            group.append(item)
        return group, False

    def _commit(self, group: list[tuple[Callable[[Session], Any], Future[Any]]]) -> None:
        outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            with self._store.write() as session:
                for function, future in group:
                    recorded = session.info.get(_EVENTS, 0)
                    try:
                        with session.begin_nested():
                            outcomes.append((future, function(session), None))
                    except Exception as error:
                        session.info[_EVENTS] = recorded
                        outcomes = [entry for entry in outcomes if entry[0] is not future]
                        outcomes.append((future, None, error))
        except BaseException as failure:
            for _, future in group:
                future.set_exception(failure)
            return
        for future, result, problem in outcomes:
            if problem is None:
                future.set_result(result)
            else:
                future.set_exception(problem)


def record(
    session: Session,
    *,
    actor: str,
    verb: str,
    kind: str,
    object: str,
    project: str = "default",
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    reason: str = "",
) -> Event:
    """Appends one event in the caller's transaction; listeners wake up after its commit."""
    store: Store | None = session.info.get("store")
    row = Event(
        time_ms=(store.clock if store else now_ms)(),
        project=project,
        actor=actor,
        verb=verb,
        kind=kind,
        object=object,
        before=before,
        after=after,
        reason=reason,
    )
    session.add(row)
    session.info[_EVENTS] = session.info.get(_EVENTS, 0) + 1
    return row


def new_id(session: Session, prefix: str) -> str:
    """The next id of a kind, `r-0001`, `r-0002`...; never given twice."""
    key = f"counter:{prefix}"
    counter = session.get(Meta, key)
    if counter is None:
        counter = Meta(key=key, value="0")
        session.add(counter)
    counter.value = str(int(counter.value) + 1)
    session.flush()
    return f"{prefix}-{int(counter.value):04d}"


def find(session: Session, table: type[Row], key: str, *, project: str | None = None) -> Row:
    """The row with this id, this name, or the only one whose id starts with `key`.

    Raises:
        NotFound: there is none.
        InvalidInput: the prefix fits several.
    """
    columns: Any = table
    kind = table.__name__.lower()
    if not key:
        raise InvalidInput(f"Which {kind}? The name is empty.")
    exact = session.get(table, key)
    if exact is not None:
        return exact
    conditions = [columns.project == project] if project and hasattr(table, "project") else []
    if hasattr(table, "name"):
        named = session.scalars(select(table).where(columns.name == key, *conditions).limit(2)).all()
        if len(named) == 1:
            return named[0]
    begins = columns.id.startswith(key, autoescape=True)
    found = session.scalars(select(table).where(begins, *conditions).order_by(columns.id).limit(6)).all()
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFound(f"There is no {kind} '{key[:80]}'.", f"List them with: shoal {kind} list")
    some: Any = found[:5]
    names = ", ".join(row.id for row in some)
    raise InvalidInput(f"'{key}' fits several {kind}s: {names}.", "Give more of the id.")


def get_meta(session: Session, key: str, default: str = "") -> str:
    row = session.get(Meta, key)
    return default if row is None else row.value


def set_meta(session: Session, key: str, value: str) -> None:
    row = session.get(Meta, key)
    if row is None:
        session.add(Meta(key=key, value=value))
    else:
        row.value = value


# ---------------------------------------------------------------------------- engines


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        engine = create_engine(url, pool_pre_ping=True)
        event.listen(engine, "begin", _begin_server)
        return engine
    engine = create_engine(
        url,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        pool_size=8,
        max_overflow=32,
    )
    event.listen(engine, "connect", _connect_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connect_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not begin transactions by itself: it would begin them deferred, and a
    # deferred transaction that turns into a writer fails at once when another process writes.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    writing = connection.get_execution_options().get("shoal_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _begin_server(connection: Any) -> None:
    if connection.get_execution_options().get("shoal_write"):
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITER_LOCK})
