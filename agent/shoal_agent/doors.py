"""Knocks on a controller's doors and says what answered: nobody, this fleet, or somebody else.

Standard library only, with a limit on everything: a name server that never answers must not hold up
the rest.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal_agent.checks import FAILED, OK, UNMEASURED, WARNING, Check
from shoal_protos.tokens import server_name

LIMIT_S = 4.0  # for one door, of which the stages get these shares
CONNECT, HANDSHAKE, PLAIN = 0.45, 0.35, 0.2
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")


@dataclass(frozen=True)
class Door:
    """An address to try. `certificate` and `key` are files, for the agents' door only."""

    name: str  # "enrolment", "agents"
    address: str  # host:port
    fleet: str
    ca_pem: str
    certificate: Path | None = None
    key: Path | None = None


def check(doors: Sequence[Door], limit_s: float = LIMIT_S) -> list[Check]:
    """All doors at the same time; one check for each that says something (see `weigh`)."""
    answers: queue.Queue[tuple[int, Check]] = queue.Queue()

    def ask(number: int, door: Door) -> None:
        try:
            answers.put((number, knock(door, limit_s)))
        except Exception as error:  # a bug here must not look like a door that hangs
            answers.put((number, Check(_title(door), UNMEASURED, f"the check failed: {error!r}")))

    for number, door in enumerate(doors):
        # Daemons: a resolver that hangs must not hold up the end of the process.
        threading.Thread(target=ask, args=(number, door), daemon=True).start()
    found: dict[int, Check] = {}
    end = time.monotonic() + limit_s + 0.3
    with contextlib.suppress(queue.Empty):
        while len(found) < len(doors):
            number, result = answers.get(timeout=max(0.0, end - time.monotonic()))
            found[number] = result
    return weigh(doors, [found.get(number) or _hangs(door, limit_s) for number, door in enumerate(doors)])


def weigh(doors: Sequence[Door], found: Sequence[Check]) -> list[Check]:
    """Addresses are hints: where one of a door answers, another that does not is no failure.

    Loopback is in every token, for an agent on the controller's own machine; on a board nothing is
    there, so it is left out where it fails and other addresses are known.
    """
    told = []
    for door, check in zip(doors, found, strict=True):
        fellows = [
            (other, result)
            for other, result in zip(doors, found, strict=True)
            if other.name == door.name and other is not door
        ]
        if check.state != FAILED or not fellows:
            told.append(check)
        elif _is_loopback(door) and not all(_is_loopback(other) for other, _ in fellows):
            continue
        elif any(result.state in (OK, WARNING) for _, result in fellows):
            told.append(Check(check.name, UNMEASURED, f"{check.found}; another address answers"))
        else:
            told.append(check)
    return told


def _is_loopback(door: Door) -> bool:
    host = door.address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def _title(door: Door) -> str:
    return f"{door.name} door {door.address}"


def _hangs(door: Door, limit_s: float) -> Check:
    host = door.address.rpartition(":")[0]
    return Check(
        _title(door), FAILED, f"the name {host} was not resolved within {limit_s:.0f} s",
        "Check the DNS server (/etc/resolv.conf), or use the controller's IP address.",
    )  # fmt: skip


def knock(door: Door, limit_s: float) -> Check:
    """Name, connection, TLS: the first of them that fails is what is wrong."""
    host, _, port = door.address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Check(
            _title(door), FAILED, f"the name {host} cannot be resolved ({_words(error)})",
            "Check the DNS server (/etc/resolv.conf) and the name; an IP address in the token needs none.",
        )  # fmt: skip
    refusals = []
    for _, _, _, _, target in found[:3]:
        try:
            connection = socket.create_connection(
                (str(target[0]), int(port)), timeout=CONNECT * limit_s / len(found[:3])
            )
        except OSError as error:
            refusals.append((str(target[0]), error))
            continue
        with connection:
            return _greet(door, connection, str(target[0]), limit_s)
    return _unreached(door, refusals)


def _unreached(door: Door, refusals: Sequence[tuple[str, OSError]]) -> Check:
    where = ", ".join(ip for ip, _ in refusals)
    numbers = {error.errno for _, error in refusals}
    if errno.ECONNREFUSED in numbers:
        found = f"{where} refused the connection"
        remedy = (
            "Is the controller running there, and open to the network (shoal up --lan)? Is the port right?"
        )
    elif numbers & {errno.ENETUNREACH, errno.EHOSTUNREACH}:
        found, remedy = f"no route to {where}", "Is this device in the controller's network? See: ip route"
    elif any(isinstance(error, TimeoutError) for _, error in refusals):
        found = f"{where} did not answer"
        remedy = "Has the controller another address now? Does a firewall close the port?"
    else:
        found = "; ".join(f"{ip}: {_words(error)}" for ip, error in refusals) or "its name has no address"
        remedy = "Check this device's network."
    return Check(_title(door), FAILED, found, remedy)


def _greet(door: Door, connection: socket.socket, ip: str, limit_s: float) -> Check:
    connection.settimeout(HANDSHAKE * limit_s)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=door.ca_pem)
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(OSError, ssl.SSLError):  # a damaged identity is another check's
        if door.certificate and door.key:
            context.load_cert_chain(door.certificate, door.key)
    try:
        with context.wrap_socket(connection, server_hostname=server_name(door.fleet)) as channel:
            return _listen(door, channel, ip)
    except ssl.SSLCertVerificationError as error:
        return _stranger(door, ip, error, limit_s)
    except ssl.SSLError as error:
        return _no_tls(door, ip, _words(error), limit_s)
    except OSError as error:  # closed or silent in the middle of the handshake
        return _no_tls(door, ip, _words(error), limit_s)


def _listen(door: Door, channel: ssl.SSLSocket, ip: str) -> Check:
    """TLS 1.3 refuses a client's certificate only after the handshake: see whether it goes on."""
    try:
        if not channel.recv(1):
            return Check(
                _title(door), FAILED, f"{ip} closed the connection after the handshake",
                "Was this device removed? Ask on the controller: shoal device list",
            )  # fmt: skip
    except ssl.SSLError as error:
        return Check(
            _title(door), FAILED, f"{ip} refuses this device's certificate ({_words(error)})",
            "Its date may be past, or the device was removed; join again with a new token.",
        )  # fmt: skip
    except OSError:
        return Check(
            _title(door), WARNING, f"{ip} answers as this fleet, but slowly", "Look at the network's load."
        )
    return Check(_title(door), OK, f"{ip} answers as the fleet '{door.fleet}'")


def _stranger(door: Door, ip: str, error: ssl.SSLCertVerificationError, limit_s: float) -> Check:
    issuer = _issuer(ip, door.address, limit_s)
    by = f" by '{issuer}'" if issuer else ""
    return Check(
        _title(door), FAILED,
        f"{ip} shows a certificate{by} that is not the fleet '{door.fleet}': {_words(error)}",
        "A proxy opens the connection (let it pass the controller's ports untouched), or another controller "
        "has the address.",
    )  # fmt: skip


def _issuer(ip: str, address: str, limit_s: float) -> str:
    """Who signed what answers there, "" if it cannot be told."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = int(address.rpartition(":")[2])
    try:
        with (
            socket.create_connection((ip, port), timeout=PLAIN * limit_s) as plain,
            context.wrap_socket(plain) as channel,
        ):
            der = channel.getpeercert(True) or b""
        from cryptography import x509

        return x509.load_der_x509_certificate(der).issuer.rfc4514_string()[:120]
    except (OSError, ValueError, ImportError):
        return ""


def _no_tls(door: Door, ip: str, problem: str, limit_s: float) -> Check:
    """Whether it is a web server: a captive portal, a proxy, or a wrong port."""
    answer = _plain(ip, door.address, limit_s)
    if not answer.startswith("HTTP/"):
        return Check(
            _title(door), FAILED, f"{ip} speaks no TLS there ({problem})",
            "Is the port right? Does a firewall or proxy cut the connection?",
        )  # fmt: skip
    line = answer.splitlines()[0][:60]
    target = re.search(r"^location:\s*(\S+)", answer, re.IGNORECASE | re.MULTILINE)
    if target:
        return Check(
            _title(door), FAILED, f"{ip} answers in plain HTTP ({line}) and sends to {target.group(1)[:100]}",
            "This network wants a sign-in first (captive portal): sign in, or use another network.",
        )  # fmt: skip
    return Check(
        _title(door), FAILED, f"{ip} answers in plain HTTP ({line}), not as a controller's {door.name} door",
        "Is the port right? The doors are 8442 (enrolment) and 8443 (agents) unless changed.",
    )  # fmt: skip


def _plain(ip: str, address: str, limit_s: float) -> str:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((ip, int(port)), timeout=PLAIN * limit_s) as plain:
            plain.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            return plain.recv(4096).decode(errors="replace")
    except (OSError, ValueError):
        return ""


def _words(error: BaseException) -> str:
    verify = getattr(error, "verify_message", "")
    if verify:
        return str(verify)
    reason = getattr(error, "reason", None)
    if isinstance(error, ssl.SSLError) and reason:
        return str(reason).lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or error)[:120]


# ---------------------------------------------------------------------------- proxies


def check_proxies(addresses: Sequence[str], environ: Mapping[str, str] = os.environ) -> Check:
    """gRPC obeys these variables too."""
    proxy = next((f"{name}={value}" for name, value in _proxies(environ)), "")
    if not proxy:
        return Check("proxy", OK, "no proxy variable is set")
    shown = re.sub(r"//[^@/]*@", "//...@", proxy)  # a password in it is a secret
    if not addresses:
        return Check("proxy", UNMEASURED, f"{shown}; no controller's address is known yet")
    passed = [address for address in addresses if not _excepted(address, environ)]
    if not passed:
        return Check("proxy", OK, f"{shown}, not used for the controller (no_proxy)")
    hosts = ",".join(dict.fromkeys(address.rpartition(":")[0] for address in passed))
    return Check(
        "proxy", WARNING, f"{shown} is used for {hosts}",
        f"A proxy that opens TLS cannot work; let the controller pass: no_proxy={hosts}",
    )  # fmt: skip


def _proxies(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    found = [(name, environ.get(name) or environ.get(name.upper()) or "") for name in _PROXIES]
    return [(name, value) for name, value in found if value]


def _excepted(address: str, environ: Mapping[str, str]) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    names = ("no_grpc_proxy", "no_proxy", "NO_PROXY")  # gRPC takes the first that is set
    rules = next((environ[name] for name in names if environ.get(name)), "")
    return any(_covers(rule.strip().lower(), host.lower()) for rule in rules.split(",") if rule.strip())


def _covers(rule: str, host: str) -> bool:
    if rule == "*" or host == rule.lstrip(".") or host.endswith("." + rule.lstrip(".")):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rule, strict=False)
    except ValueError:
        return False
