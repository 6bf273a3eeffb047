"""A job's process: `python -m shoal_optimizer.jobs JOBDIR`. See docs/architecture.md for its contract.

Its stdout carries JSON lines and nothing else: whatever libraries or the user's code print goes to
stderr. It runs without the environment's credentials and within limits of memory and CPU time.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from shoal_optimizer import jobspec
from shoal_optimizer.jobspec import JobSpec
from shoal_optimizer.jobstate import STATE_FILE, State, Voice
from shoal_protos.errors import ShoalError

# The user's code sees these of the environment and nothing else: no token, no key, no proxy password.
KEPT = frozenset(
    [
        *("PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_ALL", "LC_CTYPE"),
        *("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONUNBUFFERED", "LD_LIBRARY_PATH"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
        *("XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME"),
        "SHOAL_LITERT_PYTHON",  # a path: targets/litert.py
        *("SHOAL_DATA", "SHOAL_QUICK"),  # a folder of public data, and less of it: the examples' settings
    ]
)
LIMITLESS = "SHOAL_JOB_NO_LIMITS"  # set for debugging: a traceback instead of a killed process
CLEANED = "SHOAL_JOB"  # set once the environment is clean
MIN_MEMORY = 4 << 30
EXIT_ERROR, EXIT_USAGE = 1, 2


def main(argv: Sequence[str]) -> int:
    """Runs the job in the directory that `argv` names; returns the exit code."""
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.stderr.write("usage: python -m shoal_optimizer.jobs JOBDIR\n")
        return EXIT_USAGE
    if CLEANED not in os.environ:
        clean = clean_environment(os.environ)
        command = [sys.executable, "-m", "shoal_optimizer.jobs", *argv]
        # Replacing the process is what cleans /proc/self/environ too.
        os.execve(sys.executable, command, clean)  # noqa: S606
    folder = Path(argv[0]).resolve()
    with own_stdout() as stream:
        voice = Voice(stream)
        try:
            spec = jobspec.read(folder)
            if LIMITLESS not in os.environ:
                set_limits(spec)
            state = State(folder / STATE_FILE)
            from shoal_optimizer import work  # imports torch: only once the job is known to be readable

            work.perform(spec, folder, state, voice)
        except ShoalError as error:
            traceback.print_exc()
            voice.say("error", message=error.message, remedy=error.remedy, field=_field(error))
            return EXIT_ERROR
        except MemoryError:
            traceback.print_exc()
            voice.say(
                "error",
                message="The job ran out of memory.",
                remedy="Use fewer data, a smaller batch, or a machine with more memory.",
                field="",
            )
            return EXIT_ERROR
        except Exception as error:
            traceback.print_exc()
            voice.say(
                "error",
                message=f"The job failed: {type(error).__name__}: {str(error)[:500]}",
                remedy="The job's log has the whole traceback; please report it.",
                field="",
            )
            return EXIT_ERROR
    return 0


def _field(error: ShoalError) -> str:
    """The part of the task that the message names: "model()", "evaluation()", "input"..."""
    for word in error.message.split():
        name = word.rsplit(".", 1)[-1].rstrip(":,.")
        if name.endswith("()"):
            return name
    return ""


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What the user's code may see of an environment."""
    kept = {name: value for name, value in environment.items() if name in KEPT or name == LIMITLESS}
    return {**kept, CLEANED: "1"}


@contextlib.contextmanager
def own_stdout() -> Iterator[IO[str]]:
    """Keeps stdout for the job's lines; file descriptor 1 becomes stderr, for Python and libraries alike."""
    sys.stdout.flush()
    kept = os.dup(1)  # not inherited by children
    os.dup2(2, 1)
    with os.fdopen(kept, "w", encoding="utf-8") as stream:
        yield stream


def set_limits(spec: JobSpec) -> None:
    """Limits of this process and its children: no core files, memory of the machine, CPU time by the budget.

    A limit that is lower already stays.
    """
    from shoal_agent.profile import usable_memory

    hours = 1 + spec.budget.minutes / 60 * 4
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_CPU, int(hours * 3600 * max(spec.threads, 1)))
    _lower(resource.RLIMIT_DATA, max(MIN_MEMORY, usable_memory()))


def _lower(kind: int, value: int) -> None:
    soft, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or value < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value if soft == resource.RLIM_INFINITY else min(soft, value), value))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
