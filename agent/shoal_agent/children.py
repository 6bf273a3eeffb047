"""How this agent starts processes of its own.

The setting `child_prefix` is put before each such command: an emulator, where the kernel cannot start
this interpreter by itself. It has to become the program that it starts (as `exec` does, and as
qemu-user's emulators are it): signals, priorities and limits go to the process that was started.
"""

from __future__ import annotations

import os
import shlex
import sys

VARIABLE = "SHOAL_AGENT_CHILD_PREFIX"


def interpreter(prefix: str | None = None) -> list[str]:
    """The words before `-m` or `-c` of a child Python.

    Args:
        prefix: the setting `child_prefix`; None = as in the environment, for commands without settings.
    """
    words = os.environ.get(VARIABLE, "") if prefix is None else prefix
    return [*shlex.split(words), sys.executable]
