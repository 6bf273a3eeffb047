"""A `systemctl` for machines without systemd: enough of it to start, stop and enable one unit.

It starts the unit's ExecStart with a notification socket and waits for READY=1, as Type=notify does.
State lies in $FAKE_SYSTEMD: `enabled`, `pid`, and `calls`, one line a call.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_SYSTEMD"])


def main(arguments: list[str]) -> int:
    with (HOME / "calls").open("a") as stream:
        stream.write(" ".join(arguments) + "\n")
    words = [word for word in arguments if word != "--user"]
    action = words[0]
    if action == "is-system-running":
        print("running")
    elif action in ("enable", "disable"):
        (HOME / "enabled").write_text(action)
    elif action == "is-enabled":
        print((HOME / "enabled").read_text() + "d" if (HOME / "enabled").exists() else "disabled")
    elif action == "is-active":
        print("active" if alive() else "inactive")
    elif action == "stop":
        stop()
    elif action == "restart":
        stop()
        return start()
    return 0


def unit() -> Path:
    return Path(os.environ["HOME"]) / ".config/systemd/user/shoal-agent.service"


def start() -> int:
    line = next(line for line in unit().read_text().splitlines() if line.startswith("ExecStart="))
    words = shlex.split(line.partition("=")[2].replace("%%", "%").replace("$$", "$"))
    address = str(HOME / "notify")
    Path(address).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(30)
        environ = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "600000"}
        process = subprocess.Popen(
            words, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        (HOME / "pid").write_text(str(process.pid))
        seen = ""
        while "READY=1" not in seen or "WATCHDOG=1" not in seen:
            seen += listener.recv(1024).decode() + " "
    return 0


def alive() -> int:
    try:
        pid = int((HOME / "pid").read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return 0 if state == "Z" else pid
    except (OSError, ValueError):
        return 0


def stop() -> None:
    pid = alive()
    if pid:
        os.kill(pid, signal.SIGTERM)
    while alive():
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
