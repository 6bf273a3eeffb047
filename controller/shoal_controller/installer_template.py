"""Installs Shoal's agent on this machine, from its controller and from nowhere else.

The controller rendered this file: PAYLOAD names every file that is fetched with its SHA-256. Only the
standard library is used. Run again after an interruption it goes on where it stopped:

    SHOAL_JOIN_TOKEN=shj_... python3 FILE http://CONTROLLER:8441

Variables: SHOAL_PREFIX (where to install), SHOAL_COMMAND_PREFIX (an emulator's command line).
"""

# Python 3.6 has to be able to read it and be refused: no newer syntax, annotations in quotes.
# ruff: noqa: S310, S606, SIM112, UP035

import base64
import binascii
import contextlib
import fcntl
import fnmatch
import hashlib
import http.client
import json
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zlib
from typing import Any, Iterator
from urllib.parse import quote, urlsplit

PAYLOAD = json.loads(r"""{}""")
OLDEST_PYTHON = (3, 10)
MARKER = ".shoal-set"  # in an environment: which files it was made of
CHUNK = 256 * 1024
TIMEOUT_S = 30
PATIENCE = 6  # attempts in a row that bring nothing
MARGIN = 32 * 1000 * 1000
YEAR_2026 = 1767225600
NEW_LINE = "Make a new line with: shoal token create --join"


class Refused(Exception):
    """`str()` says what is wrong and what to do next."""


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ------------------------------------------------------------------ does this machine fit?


def pythons_here() -> "list[str]":
    """Other Pythons on PATH, newest first."""
    found = []
    for minor in range(20, OLDEST_PYTHON[1] - 1, -1):
        path = shutil.which(f"python3.{minor}")
        if path and (3, minor) != sys.version_info[:2]:
            found.append(path)
    return found


def check_python() -> None:
    """This part runs on any Python 3.6 and newer: it has to be able to refuse."""
    if sys.version_info >= OLDEST_PYTHON and sys.implementation.name == "cpython":
        return
    is_this = "{} {}.{}".format(sys.implementation.name, *sys.version_info[:2])
    others = pythons_here()
    known = sorted({one["python"] for one in PAYLOAD["sets"]}, key=lambda text: int(text[2:]))
    fitting = [path for path in others if path.rpartition("python")[2] in known]
    if fitting:
        hint = "Found {}: run the line again with `{}` in the place of `python3`.".format(
            ", ".join(others), fitting[0]
        )
    else:
        hint = "Found on PATH: {}. Install one of Python {}, then run the line again with it.".format(
            ", ".join(others) or "no other", ", ".join(known)
        )
    raise Refused(f"Shoal's agent needs CPython 3.10 or newer; this is {is_this}. {hint}")


def machine() -> str:
    """The architecture of this Python: a 64-bit kernel may carry a 32-bit system."""
    name = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if struct.calcsize("P") == 4:
        return {"aarch64": "armv7l", "x86_64": "i686"}.get(name, name)
    return name


def glibc() -> "tuple[int, ...] | None":
    """(2, 36), or None where the system has another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return numbers(version) if name == "glibc" else None
    except (ValueError, OSError):
        return None


def numbers(version: str) -> "tuple[int, ...]":
    return tuple(int(part) for part in version.split(".")[:2])


def add_command(platform_name: str, python: str, more: str = "") -> str:
    return (
        f"On the controller: shoal controller wheels add --platform {platform_name} --python {python}{more}"
    )


def choose_set() -> "Any":
    """The set of wheels that fits this machine."""
    if sys.platform != "linux":
        raise Refused(f"The installer is for Linux; this is {sys.platform}.")
    python = "{}.{}".format(*sys.version_info[:2])
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise Refused(
            "This Python is a free-threaded build, for which there are no wheels; use an ordinary one."
        )
    here, sets = machine(), PAYLOAD["sets"]
    names = ", ".join("{} with Python {}".format(one["platform"], one["python"]) for one in sets)
    same = [one for one in sets if one["platform"] == here]
    if not same:
        why = f"This machine is {here}; the controller has wheels for {names}. "
        if here in ("armv7l", "armv6l", "i686"):
            raise Refused(why + "32-bit systems cannot run the agent: install a 64-bit system.")
        raise Refused(why + add_command(here, python) + ", then make a new line.")
    fitting = [one for one in same if one["python"] == python]
    if not fitting:
        has = ", ".join(one["python"] for one in same)
        usable = [path for path in pythons_here() if path.rpartition("python")[2] in has.split(", ")]
        raise Refused(
            f"This is Python {python}; for {here} the controller has wheels for Python {has}. "
            + (f"Run the line again with `{usable[0]}` in the place of `python3`, or: " if usable else "")
            + add_command(here, python)
            + ", then make a new line."
        )
    found, libc = fitting[0], glibc()
    if libc is None:
        raise Refused(
            "This system has no glibc (musl?); there are no wheels for it. Use a Debian or Ubuntu system."
        )
    if libc < numbers(found["glibc"]):
        mine = "{}.{}".format(*libc)
        raise Refused(
            "This system has glibc {}; the wheels on the controller need {}. ".format(mine, found["glibc"])
            + add_command(here, python, " --glibc " + mine)
            + ", then make a new line; or use a newer system."
        )
    return found


def check_token() -> "Any":
    """A token that was cut or mistyped is found before anything is fetched."""
    text = "".join(os.environ.get("SHOAL_JOIN_TOKEN", "").split())
    again = " Copy the line again, whole, or make a new one with: shoal token create --join"
    if not text.startswith("shj_"):
        raise Refused("SHOAL_JOIN_TOKEN holds no join token (it starts with shj_)." + again)
    try:
        data = base64.b64decode(text[4:] + "=" * (-len(text[4:]) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) < 5 or zlib.crc32(data[:-4]).to_bytes(4, "big") != data[-4:]:
        raise Refused("The join token is mistyped or cut." + again)
    return json.loads(data[:-4].decode())


def check_clock() -> None:
    if time.time() < YEAR_2026:
        say(
            "Warning: this machine's clock says {}. Joining works all the same: the controller's "
            "certificates do not depend on it. Set it, so that logs make sense.".format(
                time.strftime("%Y-%m-%d")
            )
        )


def prefix_of() -> str:
    given = os.environ.get("SHOAL_PREFIX")
    if given:
        return os.path.abspath(os.path.expanduser(given))
    if os.geteuid() == 0:
        return "/opt/shoal-agent"
    return os.path.join(os.path.expanduser("~"), ".local", "lib", "shoal-agent")


def check_place(prefix: str, chosen: "Any") -> None:
    """Makes the folder, and checks that it can be written and that everything fits."""
    try:
        os.makedirs(os.path.join(prefix, "agent"), exist_ok=True)
        os.makedirs(os.path.join(prefix, "download"), exist_ok=True)
    except OSError as error:
        raise Refused(
            f"{prefix} cannot be written: {error.strerror}. Run the line as root, or choose another place: "
            "put SHOAL_PREFIX=DIR before `python3`."
        ) from error
    if not os.access(os.path.join(prefix, "agent"), os.W_OK | os.X_OK):
        raise Refused(
            f"{prefix} belongs to somebody else. Run the line as that user or root, or choose another place: "
            "put SHOAL_PREFIX=DIR before `python3`."
        )
    folder = os.path.join(prefix, "download")
    here = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    size = sum(one["size"] for one in chosen["files"])
    need, free = size + chosen["installed_bytes"] + MARGIN - here, shutil.disk_usage(prefix).free
    if free < need:
        raise Refused(
            f"There is not enough space: {prefix} has {free / 1e6:.0f} MB free, installing takes "
            f"{need / 1e6:.0f} MB. Make room, or choose another disk: put SHOAL_PREFIX=DIR before `python3`."
        )


@contextlib.contextmanager
def locked(prefix: str) -> "Iterator[None]":
    """One installer at a time. The lock ends with the process, however it ends."""
    folder = os.open(os.path.join(prefix, "agent"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(
                f"Another installer works on {prefix}. Wait for it; if it fails, run the line again."
            ) from None
        yield
    finally:
        os.close(folder)


# ------------------------------------------------------------------ fetching


class Foreign(Exception):
    """Something answered that is not the controller's door."""


# A proxy named in the environment is not for the controller, which is on this network.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def receive(url: str, part: str, size: int) -> None:
    """Appends to `part` what is missing of `size` bytes."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "shoal-installer", "Range": f"bytes={have}-"} if have else {}
    with OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
        if "X-Shoal-Installer" not in answer.headers:
            raise Foreign(described(answer.status, answer.headers))
        resumed = answer.status == 206
        with open(part, "ab" if resumed else "wb") as stream:
            while stream.tell() <= size:
                data = answer.read(CHUNK)
                if not data:
                    break
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def described(status: int, headers: "Any") -> str:
    return "status {}, server {}".format(status, headers.get("Server") or headers.get("Via") or "unnamed")


def stranger(base: str, answer: str) -> str:
    return f"{base} answered, but it is not the controller ({answer}): a proxy in between?"


def digest(path: str) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        for data in iter(lambda: stream.read(CHUNK), b""):
            found.update(data)
    return found.hexdigest()


def fetch(base: str, one: "Any", folder: str) -> None:
    """One wheel: resumed at the byte, checked against the digest that this file names."""
    path, url = (
        os.path.join(folder, one["name"]),
        base + "/wheels/" + one["sha256"] + "/" + quote(one["name"]),
    )
    if os.path.exists(path) and digest(path) == one["sha256"]:
        return
    part, wrong, idle, why = path + ".part", 0, 0, "nothing"
    while idle < PATIENCE and wrong < 2:
        before = os.path.getsize(part) if os.path.exists(part) else 0
        if before < one["size"]:
            try:
                receive(url, part, one["size"])
            except (OSError, http.client.HTTPException, Foreign) as error:
                why = reason(error, base)
                now = os.path.getsize(part) if os.path.exists(part) else 0
                idle = 0 if now > before else idle + 1
                time.sleep(min(16, 2**idle) / 2)
                continue
        if os.path.getsize(part) < one["size"]:  # the answer ended early
            idle += 1
        elif digest(part) == one["sha256"]:
            os.replace(part, path)
            return
        else:
            wrong += 1
            os.remove(part)
    if wrong:
        raise Refused(
            f"What {url} sent is not the file that this installer names (SHA-256 differs, twice): something "
            "in between changes it, or the wheels were changed. " + NEW_LINE
        )
    raise Refused(
        f"{url} could not be fetched: {why}. What arrived is kept; run the line again when the network is "
        "better."
    )


def reason(error: Exception, base: str) -> str:
    """What was tried and what answered."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code == 404 and "X-Shoal-Installer" in error.headers:
            raise Refused(f"The controller at {base} has these wheels no more. {NEW_LINE}") from error
        if "X-Shoal-Installer" not in error.headers:
            return stranger(base, described(error.code, error.headers))
        return f"{base} answered {error.code} {error.reason}"
    if isinstance(error, Foreign):
        return stranger(base, str(error))
    return "no answer from {} ({})".format(
        base, getattr(error, "reason", None) or error or type(error).__name__
    )


def fetch_all(base: str, chosen: "Any", folder: str) -> None:
    total, done = sum(one["size"] for one in chosen["files"]), 0
    say("Fetching {} files, {:.0f} MB, from {}".format(len(chosen["files"]), total / 1e6, base))
    for one in chosen["files"]:
        fetch(base, one, folder)
        done += one["size"]
        say("  {:3.0f} %  {}".format(100 * done / total, " ".join(one["name"].split("-")[:2])))


# ------------------------------------------------------------------ installing


def command(arguments: "list[str]") -> "list[str]":
    """A command of the new environment, behind the emulator if there is one."""
    return shlex.split(os.environ.get("SHOAL_COMMAND_PREFIX", "")) + arguments


def make_environment(folder: str) -> None:
    try:
        import venv
    except ImportError:
        raise Refused(
            "This Python lacks the module venv. Install libpython3-stdlib, then run the line again."
        ) from None
    shutil.rmtree(folder, ignore_errors=True)
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)


def install_wheels(folder: str, wheels: "list[str]") -> None:
    """pip, straight from its wheel, with these files and nothing else."""
    say("Installing into {}".format(folder[: -len(".new")]))
    pip = next(path for path in wheels if os.path.basename(path).startswith("pip-"))
    others = [path for path in wheels if path != pip]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "SHOAL_JOIN"))}
    env.pop("PYTHONPATH", None)
    env.update(PIP_CONFIG_FILE=os.devnull, PYTHONNOUSERSITE="1", PYTHONDONTWRITEBYTECODE="1")
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--quiet", "--no-input"]
    options += ["--disable-pip-version-check", "--no-warn-script-location", "--root-user-action=ignore"]
    done = subprocess.run(
        command(
            [os.path.join(folder, "bin", "python"), os.path.join(pip, "pip"), "install", *options, *others]
        ),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise Refused(
            "pip failed ({}):\n{}".format(done.returncode, done.stdout.decode("utf-8", "replace")[-3000:])
        )


def leave_out(folder: str) -> None:
    """Removes what no agent opens (tests, a second copy of a library): less on the disk."""
    site = os.path.join(folder, "lib", "python{}.{}".format(*sys.version_info[:2]), "site-packages")
    for root, folders, files in os.walk(site):
        inside = os.path.relpath(root, site)
        for name in list(folders):
            if any(fnmatch.fnmatch(inside + "/" + name, rule) for rule in PAYLOAD["left_out"]):
                shutil.rmtree(os.path.join(root, name))
                folders.remove(name)
        for name in files:
            if any(fnmatch.fnmatch(inside + "/" + name, rule) for rule in PAYLOAD["left_out"]):
                os.remove(os.path.join(root, name))


def finish_environment(folder: str, mark: str) -> None:
    """Scripts name the interpreter by its path, which the renaming is about to change."""
    old, new = os.fsencode(folder), os.fsencode(folder[: -len(".new")])
    scripts = os.path.join(folder, "bin")
    for name in [os.path.join(scripts, name) for name in os.listdir(scripts)] + [
        os.path.join(folder, "pyvenv.cfg")
    ]:
        if os.path.islink(name) or not os.path.isfile(name):
            continue
        with open(name, "rb") as stream:
            data = stream.read()
        if old in data:
            with open(name, "wb") as stream:
                stream.write(data.replace(old, new))
    with open(os.path.join(folder, MARKER), "w") as stream:
        stream.write(mark)
    os.sync()  # whole on the disk before it gets its name


def marked(folder: str, mark: str) -> bool:
    try:
        with open(os.path.join(folder, MARKER)) as stream:
            return stream.read() == mark
    except OSError:
        return False


def adopt(fresh: str, final: str) -> None:
    """Gives the new environment its name; an older one of the same version makes way."""
    old = final + ".old"
    if os.path.isdir(final):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(fresh, final)
    shutil.rmtree(old, ignore_errors=True)


def switch(prefix: str, version: str) -> None:
    link = os.path.join(prefix, "agent", "current")
    with contextlib.suppress(FileNotFoundError):
        os.remove(link + ".new")
    os.symlink(version, link + ".new")
    os.replace(link + ".new", link)


def command_folder(prefix: str) -> str:
    """Where people find `shoal-agent`: a folder of their PATH, or beside an installation of its own place."""
    if os.environ.get("SHOAL_PREFIX"):
        return os.path.join(prefix, "bin")
    return "/usr/local/bin" if os.geteuid() == 0 else os.path.expanduser("~/.local/bin")


def link_command(prefix: str) -> str:
    """Links `shoal-agent` and returns the link, "" where somebody else's program has the name."""
    link = os.path.join(command_folder(prefix), "shoal-agent")
    if os.path.lexists(link) and not os.path.islink(link):
        say(f"{link} is another program and stays; this agent's is {prefix}/agent/current/bin/shoal-agent")
        return ""
    os.makedirs(os.path.dirname(link), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(link + ".new")
    os.symlink(os.path.join(prefix, "agent", "current", "bin", "shoal-agent"), link + ".new")
    os.replace(link + ".new", link)
    if os.path.dirname(link) not in os.environ.get("PATH", "").split(os.pathsep):
        say(f"The command is {link} (not on this shell's PATH).")
    return link


def write_facts(prefix: str, chosen: "Any", base: str) -> None:
    """install.json; what `join` has noted about the service stays."""
    path = os.path.join(prefix, "install.json")
    facts = {"service": "none", "unit": ""}
    with contextlib.suppress(OSError, ValueError), open(path) as stream:
        facts.update(json.load(stream))
    facts.update(
        version=PAYLOAD["version"], extras=chosen["extras"], source=base, command=link_command(prefix)
    )
    with open(path + ".new", "w") as stream:
        json.dump(facts, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(path + ".new", path)
    os.sync()


def install(base: str, prefix: str, chosen: "Any") -> None:
    """Every step is whole or not there, so that the next run goes on from the one that failed."""
    final = os.path.join(prefix, "agent", PAYLOAD["version"])
    fresh, folder = final + ".new", os.path.join(prefix, "download")
    mark = hashlib.sha256(json.dumps(chosen["files"], sort_keys=True).encode()).hexdigest()
    if not marked(final, mark):
        if not marked(fresh, mark):
            fetch_all(base, chosen, folder)
            make_environment(fresh)
            install_wheels(fresh, [os.path.join(folder, one["name"]) for one in chosen["files"]])
            leave_out(fresh)
            finish_environment(fresh, mark)
        adopt(fresh, final)
    switch(prefix, PAYLOAD["version"])
    write_facts(prefix, chosen, base)
    shutil.rmtree(folder, ignore_errors=True)


def hand_over(prefix: str, token: "dict[str, Any]") -> None:
    """The agent takes over: it enrols, installs its service and waits for the first heartbeat."""
    agent = os.path.join(prefix, "agent", "current", "bin", "shoal-agent")
    first = [agent]
    if os.environ.get("SHOAL_COMMAND_PREFIX"):  # an emulator starts programs, not scripts
        first = command([os.path.join(os.path.dirname(agent), "python"), agent])
        os.environ["SHOAL_AGENT_CHILD_PREFIX"] = os.environ["SHOAL_COMMAND_PREFIX"]
    hosts = [address.rpartition(":")[0] for address in token.get("enrol", []) + token.get("agents", [])]
    beside = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_grpc_proxy"] = ",".join(dict.fromkeys([*hosts, *filter(None, beside.split(","))]))
    arguments = [*first, "join", "--service", "auto", "--wait", "60", "--prefix", prefix]
    os.execvp(arguments[0], arguments)


def main(arguments: "list[str]") -> None:
    check_python()
    if len(arguments) != 1 or urlsplit(arguments[0]).scheme != "http" or not urlsplit(arguments[0]).hostname:
        raise Refused("Give the controller's address: python3 FILE http://CONTROLLER:8441")
    base = arguments[0].rstrip("/")
    token, chosen, prefix = check_token(), choose_set(), prefix_of()
    check_clock()
    mentioned = [
        name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)
    ]
    if mentioned:
        say(f"The proxy in {mentioned[0]} is not used for {base}.")
    check_place(prefix, chosen)
    with locked(prefix):
        install(base, prefix, chosen)
    hand_over(prefix, token)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as refusal:
        say(f"shoal installer: {refusal}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("Interrupted. Run the line again: it goes on from here.")
        sys.exit(130)
    except OSError as problem:
        say(f"shoal installer: {problem}. Run the line again: it goes on from here.")
        sys.exit(1)
