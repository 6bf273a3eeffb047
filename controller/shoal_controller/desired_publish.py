"""Makes desired states follow the store: loads, merges, compares, signs, stores, then tells devices."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller import desired_inputs
from shoal_controller.blobs import BlobStore
from shoal_controller.clock import Clock, now_ms
from shoal_controller.desired import DesiredContent, merge
from shoal_controller.desired_inputs import PublishedSettings
from shoal_controller.gateway.connections import Connections
from shoal_controller.identity import Keys
from shoal_controller.signing import content_hash, sign_desired
from shoal_controller.store.repositories import Store, get_meta, set_meta
from shoal_controller.store.tables import Desired

BATCH = 500  # states written in one transaction
EPOCH = "epoch"

# One at a time: an older reading must not be written after a newer one.
_publishing = threading.Lock()


@dataclass(frozen=True)
class _News:
    device: str
    content: str
    state: DesiredContent
    changed: bool  # False: only the dates are renewed


def publish(
    store: Store,
    keys: Keys,
    connections: Connections | None,
    devices: Iterable[str] | None = None,
    *,
    clock: Clock = now_ms,
) -> list[str]:
    """Publishes to `devices` (None = all) what they should have now; returns those with news.

    A generation rises only when the content changed; a state past half of its life is signed anew
    under the same generation. Only the controller's process calls it, outside of transactions.
    """
    wanted = None if devices is None else sorted(set(devices))
    if wanted == []:
        return []
    blobs = BlobStore(keys.home / "blobs", clock=clock)
    with _publishing:
        now = clock()
        with store.read() as session:
            published = PublishedSettings.load(session)
            news = _compare(session, blobs, keys.fleet, now, published, wanted)
        for at in range(0, len(news), BATCH):
            with store.write() as session:
                for item in news[at : at + BATCH]:
                    _save(session, keys, item, now, published.desired_seconds * 1000)
    told = [item.device for item in news]
    if connections is not None and told:
        connections.send_desired_all(told)
    return told


def _compare(
    session: Session,
    blobs: BlobStore,
    fleet: str,
    now: int,
    published: PublishedSettings,
    devices: list[str] | None,
) -> list[_News]:
    rows = select(Desired.device, Desired.content, Desired.not_after_ms)
    stored = {row[0]: (row[1], row[2]) for row in session.execute(rows)}
    renew_before = now + published.desired_seconds * 1000 // 2
    news = []
    for inputs in desired_inputs.load(session, blobs, fleet, now, devices):
        state = merge(inputs)
        content = content_hash(state)
        known = stored.get(inputs.device)
        if known is None or known[0] != content:
            news.append(_News(inputs.device, content, state, True))
        elif known[1] < renew_before:
            news.append(_News(inputs.device, content, state, False))
    return news


def _save(session: Session, keys: Keys, item: _News, now: int, life_ms: int) -> None:
    row = session.get(Desired, item.device)
    epoch = int(get_meta(session, EPOCH, "1"))
    if row is None:
        row = Desired(device=item.device, epoch=epoch, generation=0)
        session.add(row)
    if item.changed:
        row.epoch = max(epoch, row.epoch)
        row.generation += 1
    row.content = item.content
    row.issued_ms = now
    row.not_after_ms = now + life_ms
    row.signed = sign_desired(
        item.state,
        keys,
        epoch=row.epoch,
        generation=row.generation,
        issued_at_ms=row.issued_ms,
        not_after_ms=row.not_after_ms,
    ).SerializeToString(deterministic=True)


def outrank(session: Session, device: str, epoch: int, generation: int) -> bool:
    """A device holds a higher (epoch, generation) than the store knows: the database is older than
    the device's state, as after a restored backup. Begins a new epoch for the fleet, so that the
    next `publish` wins. Returns whether it had to.
    """
    row = session.get(Desired, device)
    known = (row.epoch, row.generation) if row is not None else (0, 0)
    if (epoch, generation) <= known:
        return False
    if epoch >= int(get_meta(session, EPOCH, "1")):
        set_meta(session, EPOCH, str(epoch + 1))
    if row is not None:
        row.content = ""  # differs from everything: signed anew at the next publish
    return True
