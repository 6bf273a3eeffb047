"""gRPC: the Open Inference Protocol as `inference.GRPCInferenceService`, on grpcio's threads.

The C core costs more than the model at small sizes; four threads run the runtime themselves, since it
releases the GIL. Waiting calls are bounded: beyond the bound a call is refused at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc

from shoal_agent.serving import describe, peers
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.errors import RETRY_AFTER_S, as_shoal, grpc_code
from shoal_agent.serving.grpc_messages import read_inputs, read_wanted, write_response, write_statistics
from shoal_agent.serving.shared_memory import Span
from shoal_protos.errors import Conflict, Denied, NotFound, Overloaded, ShoalError
from shoal_protos.oip import service_pb2 as oip

log = logging.getLogger("shoal.serving")

SERVICE = "inference.GRPCInferenceService"
THREADS = 4
STREAMS = 16


class _Pool(ThreadPoolExecutor):
    """Counts the calls that wait for a thread."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.waiting = 0
        self._count = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def counted() -> Any:
            with self._count:
                self.waiting -= 1
            return fn(*args, **kwargs)

        with self._count:
            self.waiting += 1
        return super().submit(counted)


class _Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds handlers by method name, and refuses inference when too many calls wait."""

    def __init__(self, plane: DataPlane, pool: _Pool, max_queue: int) -> None:
        self._pool, self._max_queue = pool, max_queue
        self._streams = _Pool(STREAMS, "shoal-stream")
        self._refusals = _Pool(1, "shoal-refusal")
        self._handlers = _handlers(Calls(plane), self._streams)
        self._busy = _refusal(self._refusals)
        self._busy_stream = _stream_refusal(self._refusals)

    def service(self, details: Any) -> Any:
        service, _, method = details.method.lstrip("/").partition("/")
        if service != SERVICE:
            return None
        if method == "ModelInfer" and self._pool.waiting >= self._max_queue:
            return self._busy
        if method == "ModelStreamInfer" and self._streams.waiting:
            return self._busy_stream
        return self._handlers.get(method)

    def close(self) -> None:
        for pool in (self._pool, self._streams, self._refusals):
            pool.shutdown(wait=False)


def _guarded(call: Callable[..., Any], with_peer: bool = False) -> Callable[[Any, Any], Any]:
    """Turns domain errors into gRPC statuses. `with_peer`: the call also takes who asks."""

    def handle(request: Any, context: Any) -> Any:
        try:
            return call(request, _Peer(context)) if with_peer else call(request)
        except Exception as error:
            return _abort(context, error)

    return handle


def _abort(context: Any, error: Exception) -> Any:
    known = as_shoal(error)
    if known is not error:
        log.error("A call failed.", exc_info=error)
    code = grpc_code(known)
    if code == "UNAVAILABLE":
        pushback = str(RETRY_AFTER_S * 1000)
        context.set_trailing_metadata(
            (("retry-after", str(RETRY_AFTER_S)), ("grpc-retry-pushback-ms", pushback))
        )
    context.abort(getattr(grpc.StatusCode, code), str(known))


class _Peer:
    """Who asks, found out when somebody wants to know."""

    __slots__ = ("_context",)

    def __init__(self, context: Any) -> None:
        self._context = context

    def user(self) -> int:
        return peers.of_grpc(self._context.peer()).user()


def _unary(call: Callable[..., Any], request: Any, with_peer: bool = False) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        _guarded(call, with_peer),
        request_deserializer=request.FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )


def _refusal(pool: ThreadPoolExecutor) -> Any:
    def busy(_: Any) -> Any:
        raise Overloaded("Too many requests are waiting already.", "Try again in a second.")

    handle = _guarded(busy)
    handle.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return grpc.unary_unary_rpc_method_handler(handle)


def _stream_refusal(pool: ThreadPoolExecutor) -> Any:
    def busy(_: Any, context: Any) -> Iterator[bytes]:
        _abort(
            context, Overloaded(f"{STREAMS} streams are open already.", "Use unary calls or fewer streams.")
        )
        yield b""

    busy.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return grpc.stream_stream_rpc_method_handler(busy)


def _handlers(calls: Calls, streams: ThreadPoolExecutor) -> dict[str, Any]:
    def stream(requests: Iterator[Any], context: Any) -> Iterator[Any]:
        return calls.stream(requests, _Peer(context))

    stream.experimental_thread_pool = streams  # type: ignore[attr-defined]
    return {
        "ServerLive": _unary(calls.server_live, oip.ServerLiveRequest),
        "ServerReady": _unary(calls.server_ready, oip.ServerReadyRequest),
        "ModelReady": _unary(calls.model_ready, oip.ModelReadyRequest),
        "ServerMetadata": _unary(calls.server_metadata, oip.ServerMetadataRequest),
        "ModelMetadata": _unary(calls.model_metadata, oip.ModelMetadataRequest),
        "ModelConfig": _unary(calls.model_config, oip.ModelConfigRequest),
        "ModelStatistics": _unary(calls.statistics, oip.ModelStatisticsRequest),
        "RepositoryIndex": _unary(calls.index, oip.RepositoryIndexRequest),
        "RepositoryModelLoad": _unary(calls.refuse, oip.RepositoryModelLoadRequest),
        "RepositoryModelUnload": _unary(calls.refuse, oip.RepositoryModelUnloadRequest),
        "ModelInfer": _unary(calls.infer, oip.ModelInferRequest, True),
        "SystemSharedMemoryStatus": _unary(calls.regions, oip.SystemSharedMemoryStatusRequest),
        "SystemSharedMemoryRegister": _unary(calls.register, oip.SystemSharedMemoryRegisterRequest, True),
        "SystemSharedMemoryUnregister": _unary(
            calls.unregister, oip.SystemSharedMemoryUnregisterRequest, True
        ),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            stream,
            request_deserializer=oip.ModelInferRequest.FromString,
            response_serializer=oip.ModelStreamInferResponse.SerializeToString,
        ),
    }


class Calls:
    """The protocol's calls as functions from message to message; they raise domain errors."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def server_live(self, _: Any) -> Any:
        return oip.ServerLiveResponse(live=True)

    def server_ready(self, _: Any) -> Any:
        return oip.ServerReadyResponse(ready=self._plane.ready())

    def model_ready(self, request: Any) -> Any:
        try:
            self._plane.find(request.name, request.version)
        except NotFound:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=True)

    def server_metadata(self, _: Any) -> Any:
        return oip.ServerMetadataResponse(**describe.server_metadata())

    def model_metadata(self, request: Any) -> Any:
        found = describe.model_metadata(self._plane.find(request.name, request.version))

        def described(item: Mapping[str, Any]) -> Any:
            return oip.ModelMetadataResponse.TensorMetadata(
                name=item["name"], datatype=item["datatype"], shape=item["shape"]
            )

        return oip.ModelMetadataResponse(
            name=found["name"],
            versions=found["versions"],
            platform=found["platform"],
            inputs=[described(item) for item in found["inputs"]],
            outputs=[described(item) for item in found["outputs"]],
        )

    def model_config(self, request: Any) -> Any:
        found = describe.model_config(self._plane.find(request.name, request.version))
        number = describe.DATA_TYPES
        return oip.ModelConfigResponse(
            config=oip.ModelConfig(
                name=found["name"],
                platform=found["platform"],
                backend=found["backend"],
                max_batch_size=found["max_batch_size"],
                input=[
                    oip.ModelInput(name=i["name"], data_type=number[i["data_type"][5:]], dims=i["dims"])
                    for i in found["input"]
                ],
                output=[
                    oip.ModelOutput(name=o["name"], data_type=number[o["data_type"][5:]], dims=o["dims"])
                    for o in found["output"]
                ],
                parameters={
                    name: oip.ModelParameter(string_value=value["string_value"])
                    for name, value in found["parameters"].items()
                },
            )
        )

    def statistics(self, request: Any) -> Any:
        if request.name:
            found = [self._plane.find(request.name, request.version)]
        else:
            found = [part for part in self._plane.loaded() if part.role == "primary"]
        return oip.ModelStatisticsResponse(model_stats=[write_statistics(part) for part in found])

    def index(self, request: Any) -> Any:
        row = oip.RepositoryIndexResponse.ModelIndex
        return oip.RepositoryIndexResponse(
            models=[
                row(name=r["name"], version=r["version"], state=r["state"], reason=r["reason"])
                for r in self._plane.index()
                if not request.ready or r["state"] == "READY"
            ]
        )

    def refuse(self, _: Any) -> Any:
        raise Denied(
            "Loading and unloading are open to the device's own supervisor only.",
            "Change what a device serves through its fleet's controller.",
        )

    def regions(self, request: Any) -> Any:
        status = oip.SystemSharedMemoryStatusResponse.RegionStatus
        found = self._plane.regions.status(request.name)
        return oip.SystemSharedMemoryStatusResponse(regions={row["name"]: status(**row) for row in found})

    def register(self, request: Any, peer: _Peer) -> Any:
        self._plane.regions.register(
            request.name, request.key, request.offset, request.byte_size, peer.user()
        )
        return oip.SystemSharedMemoryRegisterResponse()

    def unregister(self, request: Any, peer: _Peer) -> Any:
        self._plane.regions.unregister(request.name, peer.user())
        return oip.SystemSharedMemoryUnregisterResponse()

    def infer(self, request: Any, peer: _Peer) -> Any:
        started = time.perf_counter_ns()
        loaded = self._plane.find(request.model_name, request.model_version)
        regions = self._plane.regions

        def read(span: Span, dtype: Any, shape: tuple[int, ...]) -> Any:
            return regions.read(span, dtype, shape, peer.user())

        try:
            inputs, batch = read_inputs(loaded.codec, request, read)
            wanted = read_wanted(loaded.codec, request)
        except ShoalError:
            loaded.observer.invalid()
            raise
        outputs = self._plane.infer(loaded, inputs, batch, request.id, started)
        return write_response(
            loaded,
            request.id,
            wanted,
            outputs,
            lambda span, array: regions.write(span, array, peer.user()),
        )

    def stream(self, requests: Iterator[Any], peer: _Peer) -> Iterator[Any]:
        """Answers each request of a stream in order; an error ends its request, not the stream."""
        for request in requests:
            yield self._stream_answer(request, peer)

    def _stream_answer(self, request: Any, peer: _Peer) -> Any:
        try:
            return oip.ModelStreamInferResponse(infer_response=self.infer(request, peer))
        except Exception as error:
            # The client finds the failed request by its id.
            failed = oip.ModelInferResponse(model_name=request.model_name, id=request.id)
            return oip.ModelStreamInferResponse(error_message=str(as_shoal(error)), infer_response=failed)


class GrpcServer:
    """The listening server.

    Args:
        tls: (certificate chain, private key), PEM; None = plain text.

    Raises:
        Conflict: the port is in use.
    """

    def __init__(
        self,
        plane: DataPlane,
        host: str,
        port: int,
        *,
        max_message: int,
        max_queue: int = 256,
        tls: tuple[bytes, bytes] | None = None,
    ) -> None:
        pool = _Pool(THREADS, "shoal-grpc")
        self._service = _Service(plane, pool, max_queue)
        self._server = grpc.server(
            pool,
            handlers=(self._service,),
            options=(
                ("grpc.max_receive_message_length", max_message),
                ("grpc.max_send_message_length", max_message),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
            ),
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = int(self._server.add_insecure_port(address))
            else:
                credentials = grpc.ssl_server_credentials([(tls[1], tls[0])])
                self.port = int(self._server.add_secure_port(address, credentials))
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            self._service.close()
            raise Conflict(
                f"Port {port} on {host} is in use or cannot be bound.",
                "Stop the other program or choose another port, 0 for a free one.",
            )

    def start(self) -> None:
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Accepts no more, lets running calls end. Blocking."""
        self._server.stop(grace_s).wait(grace_s + 1)
        self._service.close()
