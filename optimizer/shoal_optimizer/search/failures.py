"""Why a trial failed, in words: the search leaves it out and goes on."""

from __future__ import annotations

import errno

from shoal_protos.errors import ShoalError


def reason_of(error: BaseException) -> str:
    """The reason for the report: memory, disk, a killed worker, or what the code that broke says."""
    if isinstance(error, ShoalError):
        return error.message
    if no_memory(error):
        return "Memory did not suffice. Use fewer data, a smaller batch, or a machine with more memory."
    if no_disk(error):
        return "The disk is full. Make room below the job's directory."
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error.strerror or error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:300]}"


def no_memory(error: BaseException | None) -> bool:
    """True where Python, torch or numpy found no memory, also beneath other errors."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if "can't allocate memory" in text or "not enough memory" in text or "bad_alloc" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def no_disk(error: BaseException | None) -> bool:
    """True where the disk (or a quota, or a limit on files) is full, also beneath other errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        # torch says the second where a file ends early while it writes one
        if any(
            text in str(error) for text in ("No space left on device", "unexpected pos", "failed writing")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
