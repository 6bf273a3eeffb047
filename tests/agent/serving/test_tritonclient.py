"""A client that we did not write, over HTTP and gRPC, against a real server process."""

from __future__ import annotations

import queue
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.agent import bundles
from tests.agent.serving.conftest import ServerProcess


@pytest.fixture(scope="module", params=["http", "grpc"])
def client(request: pytest.FixtureRequest, digits_server: ServerProcess) -> Iterator[Any]:
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    found = module.InferenceServerClient(getattr(digits_server, request.param))
    found.module = module
    found.is_http = request.param == "http"
    yield found
    found.close()


def tensor(
    client: Any, batch: bundles.Array, name: str = "image", datatype: str = "UINT8", **more: Any
) -> Any:
    made = client.module.InferInput(name, list(batch.shape), datatype)
    made.set_data_from_numpy(batch, **more)
    return made


def as_dict(client: Any, answer: Any) -> Any:
    from google.protobuf import json_format

    if isinstance(answer, dict | list):
        return answer
    return json_format.MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


class TestBoth:
    def test_health(self, client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert client.is_model_ready("digits", "1")
        assert not client.is_model_ready("digits", "9")
        assert not client.is_model_ready("nobody")

    def test_metadata(self, client: Any) -> None:
        server = as_dict(client, client.get_server_metadata())
        assert server["name"] == "shoal"
        assert "binary_tensor_data" in server["extensions"]
        model = as_dict(client, client.get_model_metadata("digits"))
        assert (model["name"], model["versions"], model["platform"]) == ("digits", ["1"], "onnxruntime_onnx")
        (image,), (logits,) = model["inputs"], model["outputs"]
        assert (image["name"], image["datatype"]) == ("image", "UINT8")
        assert [int(size) for size in image["shape"]] == [-1, 8, 8, 1]
        assert (logits["name"], logits["datatype"]) == ("logits", "FP32")

    def test_config(self, client: Any) -> None:
        config = as_dict(client, client.get_model_config("digits"))
        config = config.get("config", config)
        assert config["name"] == "digits"
        assert int(config["max_batch_size"]) > 0
        assert [int(size) for size in config["input"][0]["dims"]] == [8, 8, 1]
        if client.is_http:
            assert config["input"][0]["data_type"] == "TYPE_UINT8"
        else:
            answer = client.get_model_config("digits").config
            assert answer.input[0].data_type == tritonclient.grpc.model_config_pb2.TYPE_UINT8
            assert answer.output[0].data_type == tritonclient.grpc.model_config_pb2.TYPE_FP32

    @pytest.mark.parametrize("count", [1, 5])
    def test_inference(self, client: Any, count: int) -> None:
        batch = bundles.images(count)
        answer = client.infer("digits", [tensor(client, batch)], model_version="1", request_id="my-1")
        np.testing.assert_allclose(answer.as_numpy("logits"), bundles.expected(batch), atol=1e-4)
        response = as_dict(client, answer.get_response())
        assert (response["id"], response["model_name"], response["model_version"]) == ("my-1", "digits", "1")

    def test_outputs_can_be_chosen(self, client: Any) -> None:
        batch = bundles.images(2)
        wanted = client.module.InferRequestedOutput("logits")
        answer = client.infer("digits", [tensor(client, batch)], outputs=[wanted])
        np.testing.assert_allclose(answer.as_numpy("logits"), bundles.expected(batch), atol=1e-4)

    def test_classification(self, client: Any) -> None:
        batch = bundles.images(2)
        wanted = client.module.InferRequestedOutput("logits", class_count=3)
        answer = client.infer("digits", [tensor(client, batch)], outputs=[wanted]).as_numpy("logits")
        assert answer.shape == (2, 3)
        for row, scores in zip(answer, bundles.expected(batch), strict=True):
            best = int(scores.argmax())
            score, index, label = row[0].decode().split(":")
            assert (int(index), label) == (best, f"digit-{best}")
            assert float(score) == pytest.approx(scores[best], abs=1e-3)

    @pytest.mark.parametrize(
        ("name", "shape", "dtype", "datatype"),
        [
            ("picture", (1, 8, 8, 1), np.uint8, "UINT8"),
            ("image", (1, 8, 9, 1), np.uint8, "UINT8"),
            ("image", (8, 8, 1), np.uint8, "UINT8"),
            ("image", (1, 8, 8, 1), np.float32, "FP32"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, client: Any, name: str, shape: tuple[int, ...], dtype: type, datatype: str
    ) -> None:
        batch: bundles.Array = np.zeros(shape, dtype)
        with pytest.raises(InferenceServerException) as caught:
            client.infer("digits", [tensor(client, batch, name, datatype)])
        assert ("400" if client.is_http else "INVALID_ARGUMENT") in str(caught.value.status())
        assert name in caught.value.message()

    def test_unknown_models_and_versions(self, client: Any) -> None:
        for name, version in (("nobody", ""), ("digits", "9")):
            with pytest.raises(InferenceServerException) as caught:
                client.infer(name, [tensor(client, bundles.images(1))], model_version=version)
            assert ("404" if client.is_http else "NOT_FOUND") in str(caught.value.status())

    def test_statistics_count(self, client: Any) -> None:
        def count() -> tuple[int, int]:
            stats = as_dict(client, client.get_inference_statistics("digits"))["model_stats"][0]
            return int(stats["inference_stats"]["success"]["count"]), int(stats["inference_count"])

        before = count()
        client.infer("digits", [tensor(client, bundles.images(3))])
        after = count()
        assert (after[0] - before[0], after[1] - before[1]) == (1, 3)
        assert as_dict(client, client.get_inference_statistics())["model_stats"]

    def test_the_repository_is_listed_and_closed(self, client: Any) -> None:
        index = as_dict(client, client.get_model_repository_index())
        rows = index if isinstance(index, list) else index["models"]
        assert [(row["name"], row["state"]) for row in rows] == [("digits", "READY")]
        for call in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException) as caught:
                call("digits")
            assert ("403" if client.is_http else "PERMISSION_DENIED") in str(caught.value.status())
        assert client.is_model_ready("digits")

    def test_many_requests_at_once(self, client: Any, digits_server: ServerProcess) -> None:
        batches = [bundles.images(1 + n % 3, n) for n in range(60)]
        if client.is_http:
            with tritonclient.http.InferenceServerClient(digits_server.http, concurrency=8) as many:
                pending = [many.async_infer("digits", [tensor(client, batch)]) for batch in batches]
                answers = [answer.get_result() for answer in pending]
        else:
            results: queue.Queue[Any] = queue.Queue()
            for number, batch in enumerate(batches):
                client.async_infer(
                    "digits",
                    [tensor(client, batch)],
                    lambda result, error: results.put((result, error)),
                    request_id=str(number),
                )
            found = [results.get(timeout=30) for _ in batches]
            assert all(error is None for _, error in found)
            by_id = {result.get_response().id: result for result, _ in found}
            answers = [by_id[str(number)] for number in range(60)]
        for batch, answer in zip(batches, answers, strict=True):
            np.testing.assert_allclose(answer.as_numpy("logits"), bundles.expected(batch), atol=1e-4)


class TestHttp:
    @pytest.fixture
    def client(self, digits_server: ServerProcess) -> Iterator[Any]:
        with tritonclient.http.InferenceServerClient(digits_server.http) as found:
            found.module = tritonclient.http
            yield found

    @pytest.mark.parametrize("binary_in", [True, False])
    @pytest.mark.parametrize("binary_out", [True, False])
    def test_json_and_binary_tensors(self, client: Any, binary_in: bool, binary_out: bool) -> None:
        batch = bundles.images(2)
        wanted = tritonclient.http.InferRequestedOutput("logits", binary_data=binary_out)
        answer = client.infer("digits", [tensor(client, batch, binary_data=binary_in)], outputs=[wanted])
        np.testing.assert_allclose(answer.as_numpy("logits"), bundles.expected(batch), atol=1e-4)

    @pytest.mark.parametrize("packing", ["gzip", "deflate"])
    def test_compression(self, client: Any, packing: str) -> None:
        batch = bundles.images(2)
        answer = client.infer(
            "digits",
            [tensor(client, batch)],
            request_compression_algorithm=packing,
            response_compression_algorithm=packing,
        )
        np.testing.assert_allclose(answer.as_numpy("logits"), bundles.expected(batch), atol=1e-4)


class TestGrpc:
    @pytest.fixture
    def client(self, digits_server: ServerProcess) -> Iterator[Any]:
        with tritonclient.grpc.InferenceServerClient(digits_server.grpc) as found:
            found.module = tritonclient.grpc
            yield found

    def test_a_stream_answers_in_order_and_survives_a_bad_request(self, client: Any) -> None:
        results: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: results.put((result, error)))
        good = [bundles.images(1, n) for n in range(6)]
        for number, batch in enumerate(good):
            sent = np.zeros((1, 3), np.uint8) if number == 3 else batch
            client.async_stream_infer("digits", [tensor(client, sent)], request_id=str(number))
        found = [results.get(timeout=30) for _ in good]
        client.stop_stream()
        for number, (result, error) in enumerate(found):
            if number == 3:
                assert "shape" in str(error)
            else:
                assert error is None
                assert result.get_response().id == str(number)
                np.testing.assert_allclose(
                    result.as_numpy("logits"), bundles.expected(good[number]), atol=1e-4
                )

    def test_typed_contents(self, digits_server: ServerProcess) -> None:
        import grpc

        from shoal_protos.oip import service_pb2 as oip

        batch = bundles.images(1)
        with grpc.insecure_channel(digits_server.grpc) as channel:
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=oip.ModelInferRequest.SerializeToString,
                response_deserializer=oip.ModelInferResponse.FromString,
            )
            request = oip.ModelInferRequest(model_name="digits")
            tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 8, 8, 1])
            tensor.contents.uint_contents.extend(batch.ravel().tolist())
            answer = call(request)
            found = np.frombuffer(answer.raw_output_contents[0], np.float32)
            np.testing.assert_allclose(found, bundles.expected(batch)[0], atol=1e-4)
            tensor.contents.uint_contents[0] = 256
            for change, words in ((None, "outside of UINT8"), ("short", "63 values"), ("raw", "raw")):
                if change == "short":
                    tensor.contents.uint_contents[0] = 1
                    del tensor.contents.uint_contents[-1]
                elif change == "raw":
                    request.raw_input_contents.extend([b"1", b"2"])
                with pytest.raises(grpc.RpcError) as caught:
                    call(request)
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert words in caught.value.details()

    def test_bytes_that_are_no_message_are_refused(self, digits_server: ServerProcess) -> None:
        import grpc

        with grpc.insecure_channel(digits_server.grpc) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with pytest.raises(grpc.RpcError):
                call(b"\xff\xff\xff")
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/inference.GRPCInferenceService/CudaSharedMemoryStatus")(b"")
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


class TestMetrics:
    def test_prometheus_accepts_them(self, digits_server: ServerProcess, client: Any) -> None:
        client.infer("digits", [tensor(client, bundles.images(2))])
        url = f"http://127.0.0.1:{digits_server.ports['metrics']}/metrics"
        with urllib.request.urlopen(url) as answer:
            text = answer.read()
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr + checked.stdout
        lines = text.decode().splitlines()
        success = next(line for line in lines if line.startswith("nv_inference_request_success{"))
        assert float(success.split()[-1]) >= 1
        assert any(line.startswith("shoal_request_duration_seconds_bucket") for line in lines)
        with urllib.request.urlopen(url + "?names=triton") as answer:
            assert b"nv_inference_request_duration_us{" in answer.read()
