"""Exit codes, and the three lines that an error becomes: what, why, what to do."""

from __future__ import annotations

import sys

OK = 0
FAILED = 1  # the thing you asked for went wrong
USAGE = 2  # a wrong line, or an object that does not exist
DENIED = 3  # not signed in or not allowed
UNREACHABLE = 4  # no controller answers
STOPPED = 5  # rolled back, or a gate stopped it
TIMED_OUT = 6  # gave up watching; it is still going
INTERRUPTED = 130

BY_CODE = {
    "invalid": USAGE,
    "not_found": USAGE,
    "denied": DENIED,
    "unavailable": UNREACHABLE,
    "stopped": STOPPED,
    "timed_out": TIMED_OUT,
}


def code_of(error: BaseException) -> int:
    """The exit code that an exception ends the command with."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BY_CODE.get(getattr(error, "code", ""), FAILED)


def explain(error: BaseException) -> int:
    """Says on stderr what went wrong and what to do next; returns the exit code."""
    message = getattr(error, "message", None)
    if message is None:  # a bug of ours, or the machine's
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        remedy = "Run the same command with `shoal --debug ...` and report what it shows."
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
            remedy = ""
    else:
        remedy = getattr(error, "remedy", "")
    lines = [f"Error: {message}"]
    if remedy:
        lines.append(f"  -> {remedy}")
    if request := getattr(error, "request_id", ""):
        lines.append(f"  request {request}")
    print("\n".join(lines), file=sys.stderr)  # noqa: T201
    return code_of(error)
