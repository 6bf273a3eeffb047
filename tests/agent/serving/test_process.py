"""The server as a process: alone, managed by a supervisor, refused, stopped and killed."""

from __future__ import annotations

import base64
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from geventhttpclient.response import HTTPConnectionClosed

from shoal_agent.private import call
from shoal_agent.serving import main
from shoal_protos.bundle import Bundle, blob_path
from shoal_protos.errors import Denied, InvalidInput, ShoalError
from shoal_protos.v1.desired_pb2 import PlacementSettings, Sampling
from shoal_protos.v1.telemetry_pb2 import TelemetryWindow
from tests.agent import bundles
from tests.agent.serving.conftest import START, ServerProcess

Start = Callable[..., ServerProcess]


def refused(arguments: list[str]) -> str:
    """What a server that must not start says."""
    done = subprocess.run(
        [sys.executable, "-c", START, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def ask(address: str, batch: bundles.Array, name: str = "digits", request_id: str = "") -> bundles.Array:
    with tritonclient.http.InferenceServerClient(address) as client:
        tensor = tritonclient.http.InferInput("image", list(batch.shape), "UINT8")
        tensor.set_data_from_numpy(batch)
        return np.asarray(client.infer(name, [tensor], request_id=request_id).as_numpy("logits"))


class TestAlone:
    def test_it_says_that_nothing_is_signed_and_serves(self, start_server: Start, digits: Bundle) -> None:
        server = start_server([str(digits.path), "--name", "numbers", "--metrics-port", "0"])
        assert "only the digests" in "".join(server.lines)
        batch = bundles.images(2)
        np.testing.assert_allclose(ask(server.http, batch, "numbers"), bundles.expected(batch), atol=1e-4)
        assert server.stop() == 0

    def test_a_tampered_bundle_is_refused(self, tmp_path: Path) -> None:
        bundle = bundles.onnx_bundle(tmp_path)
        data = bytearray(bundle.model_file.read_bytes())
        data[len(data) // 2] ^= 1
        bundle.model_file.write_bytes(bytes(data))
        assert "does not match its digest" in refused([str(tmp_path), "--http-port", "0"])

    def test_what_is_no_bundle_is_refused(self, tmp_path: Path) -> None:
        assert "is not a bundle" in refused([str(tmp_path)])

    def test_a_port_in_use_is_refused(self, start_server: Start, digits: Bundle) -> None:
        server = start_server([str(digits.path), "--metrics-port", "0"])
        http, grpc = str(server.ports["http"]), str(server.ports["grpc"])
        free = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        for option, port in (("--http-port", http), ("--grpc-port", grpc), ("--metrics-port", http)):
            said = refused([str(digits.path), *free, option, port])
            assert f"Port {port} on 127.0.0.1 is in use" in said
            assert "choose another port" in said

    def test_other_machines_need_tls(self, start_server: Start, digits: Bundle, tmp_path: Path) -> None:
        assert "--tls-cert" in refused([str(digits.path), "--host", "0.0.0.0"])
        certificate, key = _certificate(tmp_path)
        tls = ["--tls-cert", certificate, "--tls-key", key]
        server = start_server([str(digits.path), "--host", "0.0.0.0", *tls, "--metrics-port", "0"])
        trusted = ssl.create_default_context(cafile=certificate)
        url = f"https://localhost:{server.ports['http']}/v2/health/ready"
        with urllib.request.urlopen(url, context=trusted) as answer:
            assert answer.status == 200
        import tritonclient.grpc

        with tritonclient.grpc.InferenceServerClient(
            f"localhost:{server.ports['grpc']}", ssl=True, root_certificates=certificate
        ) as client:
            assert client.is_model_ready("digits")
        _, other = _certificate(tmp_path / "other")
        assert "TLS files" in refused([str(digits.path), "--tls-cert", certificate, "--tls-key", other])

    def test_sigterm_answers_what_runs_and_ends(self, start_server: Start, digits: Bundle) -> None:
        server = start_server([str(digits.path), "--metrics-port", "0"])
        failures: list[Exception] = []
        answered = [0]
        stopping = threading.Event()

        def client() -> None:
            batch = bundles.images(1)
            try:
                while not stopping.is_set():
                    ask(server.http, batch)
                    answered[0] += 1
            except (ConnectionError, HTTPConnectionClosed):
                return  # the door closed before the request was read
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        while answered[0] < 10:
            time.sleep(0.01)
        assert server.stop() == 0
        stopping.set()
        for thread in threads:
            thread.join()
        assert not failures


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "Either a bundle or --managed"),
            (["--managed"], "belong together"),
            (["b", "--state", "s"], "belong together"),
            (["b", "--managed", "--state", "s"], "Either a bundle"),
            (["b", "--http-port", "70000"], "not a port"),
            (["b", "--tls-cert", "c"], "belong together"),
        ],
    )
    def test_contradictions_are_refused(self, arguments: list[str], words: str) -> None:
        with pytest.raises(InvalidInput, match=words):
            main.parse_arguments(arguments)

    @pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])
    def test_off_loopback_is_denied_without_tls(self, host: str) -> None:
        with pytest.raises(Denied, match="without TLS"):
            main.parse_arguments(["b", "--host", host])

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
    def test_loopback_is_open(self, host: str) -> None:
        assert main.parse_arguments(["b", "--host", host]).host == host

    def test_the_wait_for_labels_can_come_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(main.WAIT_VARIABLE, "7.5")
        assert main.parse_arguments(["b"]).label_wait_s == 7.5


class Managed:
    """A managed server and its private socket."""

    def __init__(self, start: Start, state: Path) -> None:
        self.state = state
        self.socket = state / "run" / "private.sock"
        self.server = start(["--managed", "--state", str(state)], state / "run" / "ports.json")

    def load(self, bundle: Bundle, role: str = "primary", **settings: Any) -> None:
        parameters = {
            "store": str(bundle.path),
            "bundle": bundle.digest,
            "version": str(bundle.config.lineage.model_version),
            "role": role,
            "settings": base64.b64encode(PlacementSettings(**settings).SerializeToString()).decode(),
        }
        body = json.dumps({"parameters": parameters}).encode()
        call(self.socket, "POST", "/v2/repository/models/digits/load", body)

    def post(self, target: str, value: Any = None) -> bytes:
        return call(self.socket, "POST", target, json.dumps(value or {}).encode())


@pytest.fixture
def managed(start_server: Start, tmp_path: Path) -> Managed:
    return Managed(start_server, tmp_path / "state")


class TestManaged:
    def test_sockets_and_ports(self, managed: Managed) -> None:
        folder = managed.state / "run"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert managed.socket.stat().st_mode & 0o777 == 0o600
        ports = json.loads((folder / "ports.json").read_text())
        assert set(ports) == {"http", "grpc", "metrics", "host"}
        assert ports["http"] > 0
        assert ports["grpc"] > 0
        assert call(folder / "app.sock", "GET", "/v2/health/ready") == b""
        with pytest.raises(ShoalError, match="supervisor only"):
            call(folder / "app.sock", "POST", "/v2/repository/models/digits/unload", b"{}")

    def test_load_swap_measure_and_unload(
        self, managed: Managed, digits: Bundle, other_digits: Bundle
    ) -> None:
        assert json.loads(managed.post("/v2/repository/index")) == []
        batch = bundles.images(2)
        for bundle, seed in ((digits, 0), (other_digits, 7)):
            managed.load(bundle)
            for number in range(3):
                found = ask(managed.server.http, batch, request_id=f"{seed}-{number}")
                np.testing.assert_allclose(found, bundles.expected(batch, seed), atol=1e-3)
        window = TelemetryWindow.FromString(managed.post("/shoal/telemetry"))
        counts = {part.bundle: part.requests for part in window.placements}
        assert counts == {digits.digest: 3, other_digits.digest: 3}
        assert window.boot_id
        assert window.monotonic_end_ns > window.monotonic_start_ns
        (row,) = json.loads(managed.post("/v2/repository/index"))
        assert row == {
            "name": "digits",
            "version": "2",
            "state": "READY",
            "reason": "",
            "bundle": other_digits.digest,
        }
        assert b"shoal_requests_total" in call(managed.socket, "GET", "/metrics")
        managed.post("/v2/repository/models/digits/unload", {"parameters": {"role": "primary"}})
        assert json.loads(managed.post("/v2/repository/index")) == []

    def test_labels_and_samples(self, managed: Managed, digits: Bundle, tmp_path: Path) -> None:
        managed.load(digits, sampling=Sampling(share=1.0, label_wait_seconds=600))
        batch = bundles.images(1)
        ask(managed.server.http, batch, request_id="q")
        right = int(bundles.expected(batch).argmax())
        url = f"http://{managed.server.http}/v2/models/digits/feedback"
        posted = [{"id": "q", "label": f"digit-{right}"}, {"id": "other", "label": 1}]
        with urllib.request.urlopen(url, json.dumps(posted).encode()) as answer:
            assert json.load(answer) == {"matched": 1, "duplicate": 0, "unmatched": 1}
        (written,) = json.loads(managed.post("/shoal/samples", {"directory": str(tmp_path / "out")}))
        assert (written["endpoint"], written["count"], written["labelled"]) == ("digits", 1, 1)
        with np.load(written["path"]) as archive:
            assert archive["label"].tolist() == archive["predicted"].tolist() == [right]

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ({}, "'store' and 'bundle'"),
            ({"parameters": 3}, "no object 'parameters'"),
            ({"parameters": {"store": "/nowhere", "bundle": "sha256:" + "0" * 64}}, "missing"),
            ({"parameters": {"store": "/", "bundle": "x", "settings": "%%"}}, "not a PlacementSettings"),
            ({"parameters": {"store": "/", "bundle": "../../x"}}, "not a digest"),
        ],
    )
    def test_bad_loads_are_refused(self, managed: Managed, body: Any, words: str) -> None:
        with pytest.raises(ShoalError, match=words):
            managed.post("/v2/repository/models/digits/load", body)

    def test_sample_directories_must_be_absolute(self, managed: Managed) -> None:
        with pytest.raises(ShoalError, match="absolute"):
            managed.post("/shoal/samples", {"directory": "here"})

    def test_it_can_be_killed_and_started_again(
        self, managed: Managed, start_server: Start, digits: Bundle
    ) -> None:
        managed.load(digits, sampling=Sampling(share=1.0))
        ask(managed.server.http, bundles.images(1), request_id="a")
        assert managed.server.stop(signal.SIGKILL) == -signal.SIGKILL
        assert managed.socket.exists()  # a dead socket
        managed.socket.unlink()
        again = Managed(start_server, managed.state)
        again.load(digits)
        batch = bundles.images(1)
        np.testing.assert_allclose(ask(again.server.http, batch), bundles.expected(batch), atol=1e-4)

    def test_a_corrupt_blob_never_replaces_what_serves(
        self, managed: Managed, digits: Bundle, tmp_path: Path
    ) -> None:
        managed.load(digits)
        broken = bundles.onnx_bundle(tmp_path / "broken", seed=3)
        path = blob_path(broken.path, broken.manifest.layer("model.onnx").digest)
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ShoalError, match="truncated"):
            managed.load(broken)
        batch = bundles.images(1)
        np.testing.assert_allclose(ask(managed.server.http, batch), bundles.expected(batch), atol=1e-4)


def _certificate(folder: Path) -> tuple[str, str]:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")
