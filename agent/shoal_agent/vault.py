"""Cryptography in a throwaway process.

The library behind signatures and certificates takes 11 MB of resident memory and is needed for some
milliseconds a day, so the long-lived supervisor does not load it: it asks this module's child.
`python -m shoal_agent.vault verify KEY...` reads a serialized `Signed` and prints the SHA-256 of the
payload that it verified; `... renew DIRECTORY` renews the identity stored there.
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shoal_agent import children
from shoal_agent.fs import RealFs
from shoal_agent.identity import Identity, IdentityStore
from shoal_protos import errors
from shoal_protos.errors import ShoalError, TamperedData, Unavailable
from shoal_protos.v1 import desired_pb2

TIMEOUT_S = 60.0
REFUSED = 3


def verify(signed: desired_pb2.Signed, public_keys: Sequence[bytes], *, prefix: str | None = None) -> bytes:
    """`signing.verify` in a child process. Blocking.

    Args:
        prefix: the setting `child_prefix`, as in `children.interpreter`.

    Raises:
        TamperedData: no trusted key made a valid signature over these bytes.
        Unavailable: the child could not do its work.
    """
    arguments = ["verify", *(key.hex() for key in public_keys)]
    output = _child(arguments, signed.SerializeToString(), prefix)
    if output.strip() != hashlib.sha256(signed.payload).hexdigest().encode():
        raise TamperedData("The signature could not be verified.")
    return signed.payload


async def renew(directory: Path, *, prefix: str | None = None) -> Identity:
    """Renews the identity stored in `directory` and returns the new one.

    Raises:
        Denied, Unavailable, TamperedData: as `link.enrolment.renew`.
    """
    await asyncio.to_thread(_child, ["renew", str(directory)], b"", prefix)
    return IdentityStore(directory, RealFs()).load()


def _child(arguments: Sequence[str], data: bytes, prefix: str | None) -> bytes:
    command = [*children.interpreter(prefix), "-m", "shoal_agent.vault", *arguments]
    try:
        result = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"A helper process failed: {error}.") from error
    if result.returncode == 0:
        return result.stdout
    message = result.stderr.decode(errors="replace").strip()
    if result.returncode == REFUSED:
        code, _, text = message.partition(": ")
        raise _KINDS.get(code, ShoalError)(text)
    raise Unavailable(f"A helper process failed: {message[-500:]}")


_KINDS: dict[str, type[ShoalError]] = {
    kind.code: kind
    for kind in (errors.InvalidInput, errors.NotFound, errors.Denied, Unavailable, TamperedData)
}


def main(arguments: Sequence[str]) -> int:
    """The child: the one place where what it found becomes an exit code."""
    try:
        if arguments[0] == "verify":
            from shoal_protos import signing

            signed = desired_pb2.Signed.FromString(sys.stdin.buffer.read())
            payload = signing.verify(signed, [bytes.fromhex(key) for key in arguments[1:]])
            sys.stdout.write(hashlib.sha256(payload).hexdigest())
        else:
            from shoal_agent.link import enrolment

            store = IdentityStore(Path(arguments[1]), RealFs())
            asyncio.run(enrolment.renew_stored(store))
    except ShoalError as error:
        sys.stderr.write(f"{error.code}: {error}")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
