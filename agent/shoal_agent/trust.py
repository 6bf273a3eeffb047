"""What the device believes: which desired state is the controller's word, and which bundles it may use.

`PinnedTrust` knows the key pinned at enrolment and trusts every digest that an admitted state names.
An admitted state is on disk, synced, before anybody acts on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from shoal_agent.clock import Clock
from shoal_agent.features import BUILD_TIME_MS, FEATURES
from shoal_agent.fs import Fs, durable_write
from shoal_protos.bundle import check_digest
from shoal_protos.errors import Conflict, Denied, InvalidInput, ShoalError, TamperedData, Unsupported
from shoal_protos.v1 import desired_pb2

SERVE = "serve"  # answer requests
TRIAL = "trial"  # run in the bench process only
SCHEMA = 1
CLOCK_TOLERANCE_MS = 5 * 60 * 1000  # further from the controller's time the clock is wrong


class Refused(ShoalError):
    """A desired state that was not adopted; says which, for the report to the controller."""

    code = "refused"

    def __init__(self, error: ShoalError, epoch: int, generation: int, reason: str) -> None:
        super().__init__(error.message, error.remedy)
        self.epoch = epoch
        self.generation = generation
        self.reason = reason


class Trust(Protocol):
    """Decides what may be adopted and used."""

    @property
    def state(self) -> desired_pb2.DesiredState | None:
        """The adopted desired state, None before the first."""
        ...

    def admit(self, signed: desired_pb2.Signed) -> desired_pb2.DesiredState:
        """Adopts a state if it is newer, and returns the one now in force.

        Raises:
            Refused: not the controller's word, not for this device, older, or needs a newer agent.
        """
        ...

    def admit_bundle(self, digest: str, use: str) -> None:
        """Passes if the bundle may be installed for `use` (SERVE or TRIAL) now.

        Raises:
            Denied: no state in force names it for that use, or the state has expired.
        """
        ...

    def note_controller_time(self, server_time_ms: int) -> None:
        """Takes the authenticated controller's time as the truth, in this process."""
        ...

    @property
    def clock_wrong(self) -> bool: ...


def _verify_here(signed: desired_pb2.Signed, public_keys: Sequence[bytes]) -> bytes:
    from shoal_protos import signing

    return signing.verify(signed, public_keys)


class PinnedTrust:
    """Trusts the desired-state keys pinned at enrolment. May be called from several threads.

    Nothing is adopted before the stored state was read (`load`): an older one must never replace it.

    Args:
        path: where the adopted message is kept, as carried (`trust/desired.bin`).
        keys: raw 32-byte Ed25519 public keys.
        verify: returns the payload of a message that one of the keys signed, else raises TamperedData.
    """

    def __init__(
        self,
        path: Path,
        *,
        fleet: str,
        device: str,
        keys: Sequence[bytes],
        clock: Clock,
        fs: Fs,
        features: Mapping[str, str] = FEATURES,
        verify: Callable[[desired_pb2.Signed, Sequence[bytes]], bytes] = _verify_here,
    ) -> None:
        self._path = path
        self._fleet, self._device, self._keys = fleet, device, tuple(keys)
        self._clock, self._fs, self._features = clock, fs, features
        self._controller_offset_ms: int | None = None  # controller's time minus monotonic time
        self._verified = verify
        self._lock = threading.RLock()
        self._loaded = False
        self._state: desired_pb2.DesiredState | None = None

    @property
    def state(self) -> desired_pb2.DesiredState | None:
        return self._state

    def load(self) -> None:
        """Reads the stored state; one that no longer verifies counts as none (the controller sends it
        again)."""
        with self._lock:
            if self._loaded:
                return
            try:
                signed = desired_pb2.Signed.FromString(self._fs.read(self._path))
                self._state = self._verify(signed)
            except (OSError, DecodeError, Refused):
                self._state = None
            self._loaded = True

    def admit(self, signed: desired_pb2.Signed) -> desired_pb2.DesiredState:
        with self._lock:
            self.load()
            return self._admit(signed)

    def _admit(self, signed: desired_pb2.Signed) -> desired_pb2.DesiredState:
        new = self._verify(signed)
        old = self._state
        if old is not None:
            order = (new.epoch, new.generation), (old.epoch, old.generation)
            if order[0] < order[1]:
                raise _refuse(
                    new, Conflict(f"Generation {new.generation} is older than ours."), "lower generation"
                )
            if order[0] == order[1]:
                if _content(new) != _content(old):
                    error = Conflict(f"Generation {new.generation} came with another content.")
                    raise _refuse(new, error, "same generation, other content")
                if new.not_after_ms <= old.not_after_ms:
                    return old
        durable_write(self._fs, self._path, signed.SerializeToString())
        self._state = new
        return new

    def _verify(self, signed: desired_pb2.Signed) -> desired_pb2.DesiredState:
        try:
            payload = self._verified(signed, self._keys)
            state = desired_pb2.DesiredState.FromString(payload)
        except TamperedData as error:
            raise Refused(error, 0, 0, "bad signature") from error
        except DecodeError as error:
            raise Refused(InvalidInput("The desired state is malformed."), 0, 0, "malformed") from error
        if (state.fleet, state.device) != (self._fleet, self._device):
            wrong = Denied(f"The desired state is for {state.fleet}/{state.device}.")
            raise _refuse(state, wrong, "wrong device")
        self._check_understood(state)
        return state

    def _check_understood(self, state: desired_pb2.DesiredState) -> None:
        if state.schema > SCHEMA:
            error = Unsupported(f"The desired state has schema {state.schema}.", "Update the agent.")
            raise _refuse(state, error, f"unknown schema {state.schema}")
        for need in state.requires:
            if need.feature not in self._features:
                remedy = f"Update the agent to Shoal {need.since_version} or newer."
                error = Unsupported(f"The desired state needs the feature '{need.feature}'.", remedy)
                raise _refuse(state, error, f"unknown feature {need.feature}, needs {need.since_version}")
        try:
            for digest in [*_named(state), *state.keep]:
                check_digest(digest)
        except InvalidInput as error:
            raise _refuse(state, error, "malformed digest") from error

    def admit_bundle(self, digest: str, use: str) -> None:
        state = self._state
        if state is None:
            raise Denied("No desired state has been adopted yet.")
        allowed = _served(state) if use == SERVE else _named(state)
        if digest not in allowed:
            raise Denied(f"The desired state does not name the bundle {digest[:19]} to {use}.")
        if state.not_after_ms and self.now_ms() > state.not_after_ms:
            raise Denied(
                "The desired state has expired, so nothing is installed; what serves goes on.",
                "It is renewed as soon as the controller is reached.",
            )

    def now_ms(self) -> int:
        """Time for expiry: never before the build or the highest signed time; the authenticated
        controller's time, once heard, stands in for a clock that may be wrong in either direction."""
        issued = self._state.issued_at_ms if self._state is not None else 0
        wall = self._clock.wall_ms()
        if self._controller_offset_ms is not None:
            wall = self._clock.monotonic_ns() // 1_000_000 + self._controller_offset_ms
        return max(wall, BUILD_TIME_MS, issued)

    def note_controller_time(self, server_time_ms: int) -> None:
        if server_time_ms > 0:
            self._controller_offset_ms = server_time_ms - self._clock.monotonic_ns() // 1_000_000

    @property
    def clock_wrong(self) -> bool:
        if self._controller_offset_ms is None:
            return False
        true = self._clock.monotonic_ns() // 1_000_000 + self._controller_offset_ms
        return abs(self._clock.wall_ms() - true) > CLOCK_TOLERANCE_MS


def _refuse(state: desired_pb2.DesiredState, error: ShoalError, reason: str) -> Refused:
    return Refused(error, state.epoch, state.generation, reason)


def _served(state: desired_pb2.DesiredState) -> set[str]:
    return {placement.bundle for placement in state.placements}


def _named(state: desired_pb2.DesiredState) -> set[str]:
    trials = {digest for trial in state.trials for digest in (trial.bundle, trial.incumbent) if digest}
    return _served(state) | trials


def _content(state: desired_pb2.DesiredState) -> bytes:
    """Everything but the dates, in one deterministic form."""
    copy = desired_pb2.DesiredState()
    copy.CopyFrom(state)
    copy.issued_at_ms = copy.not_after_ms = 0
    return copy.SerializeToString(deterministic=True)
