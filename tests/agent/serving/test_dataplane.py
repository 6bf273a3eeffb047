from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.feedback import Feedback
from shoal_agent.serving.http import Listener
from shoal_agent.serving.loading import Loaded
from shoal_agent.serving.observer import ALWAYS_SKETCHED, Observer
from shoal_agent.telemetry import histograms
from shoal_protos.bundle import Bundle
from shoal_protos.errors import InvalidInput, NotFound, ShoalError, Unsupported
from shoal_protos.v1.desired_pb2 import ROLE_PRIMARY, PlacementSettings, Sampling
from shoal_protos.v1.telemetry_pb2 import PlacementWindow
from tests.agent import bundles
from tests.agent.serving.raw import connect, infer_body, outputs, request


async def load(plane: DataPlane, bundle: Bundle, name: str = "digits", **more: Any) -> Loaded:
    def blocking() -> Loaded:
        return plane.load(name, bundle.path, bundle.digest, **more)

    return await asyncio.get_running_loop().run_in_executor(None, blocking)


async def ask(plane: DataPlane, batch: bundles.Array, request_id: str = "", name: str = "digits") -> Any:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    plane.submit(plane.find(name), {"image": batch}, len(batch), request_id, 0, future.set_result)
    return (await future)["logits"]


def window(plane: DataPlane, role: int = ROLE_PRIMARY, name: str = "digits") -> PlacementWindow:
    found = [p for p in plane.telemetry().placements if p.endpoint == name and p.role == role]
    assert len(found) == 1
    return found[0]


class TestRegistry:
    async def test_unknown_names_and_versions(self, plane: DataPlane, digits: Bundle) -> None:
        with pytest.raises(NotFound, match="Loaded are: none"):
            plane.find("digits")
        await load(plane, digits, version="3")
        assert plane.find("digits", "3").version == "3"
        with pytest.raises(NotFound, match="It serves 3"):
            plane.find("digits", "4")

    async def test_a_failed_load_keeps_what_serves(
        self, plane: DataPlane, digits: Bundle, tmp_path: Path
    ) -> None:
        await load(plane, digits)
        broken = bundles.onnx_bundle(tmp_path, seed=3)
        broken.model_file.write_bytes(b"x" * broken.model_file.stat().st_size)
        with pytest.raises(ShoalError, match="does not match its digest"):
            await load(plane, broken)
        assert plane.find("digits").bundle.digest == digits.digest
        assert plane.ready()

    async def test_a_failed_first_load_is_listed_until_unloaded(
        self, plane: DataPlane, digits: Bundle, tmp_path: Path
    ) -> None:
        bundle = bundles.onnx_bundle(tmp_path, version_min="9999")
        with pytest.raises(Unsupported):
            await load(plane, bundle)
        assert not plane.ready()
        assert plane.index()[0]["state"] == "UNAVAILABLE"
        assert "9999" in plane.index()[0]["reason"]
        await load(plane, digits)
        assert plane.ready()
        assert [row["state"] for row in plane.index()] == ["READY"]
        plane.unload("digits")
        plane.unload("digits")
        assert plane.index() == []

    @pytest.mark.parametrize(
        ("name", "role"), [("", "primary"), ("a/b", "primary"), ("a", "boss"), ("x\n", "primary")]
    )
    async def test_bad_names_and_roles(self, plane: DataPlane, digits: Bundle, name: str, role: str) -> None:
        with pytest.raises(InvalidInput):
            await load(plane, digits, name, role=role)

    async def test_loading_the_same_again_changes_settings_only(
        self, plane: DataPlane, digits: Bundle
    ) -> None:
        first = await load(plane, digits)
        settings = PlacementSettings(sampling=Sampling(share=1.0))
        second = await load(plane, digits, settings=settings)
        assert second.instance is first.instance
        await ask(plane, bundles.images(2))
        assert len(second.recorder) == 2


class TestHotSwap:
    async def test_under_load_no_request_is_lost(
        self, plane: DataPlane, listener: Listener, digits: Bundle, other_digits: Bundle
    ) -> None:
        batch = bundles.images(1)
        answers = {0: bundles.expected(batch, 0), 7: bundles.expected(batch, 7)}
        stop = asyncio.Event()
        seen: list[int] = []

        async def client() -> None:
            connection = await connect(listener.port)
            body, size = infer_body(batch)
            while not stop.is_set():
                status, headers, answer, _ = await connection.exchange(request(body, size))
                assert status == 200
                found = outputs(headers, answer)
                which = next(seed for seed, want in answers.items() if np.allclose(found, want, atol=1e-3))
                seen.append(which)

        clients = [asyncio.ensure_future(client()) for _ in range(6)]
        for number in range(6):
            bundle = other_digits if number % 2 == 0 else digits
            await load(plane, bundle, version=str(number + 2))
            await asyncio.sleep(0.02)
        stop.set()
        await asyncio.gather(*clients)
        assert set(seen) == {0, 7}
        placements = plane.telemetry().placements
        assert sum(p.requests for p in placements) == len(seen)
        assert sum(p.errors for p in placements) == 0

    async def test_the_old_instance_goes_with_its_last_request(
        self, plane: DataPlane, digits: Bundle, other_digits: Bundle
    ) -> None:
        old = weakref.ref((await load(plane, digits)).instance)
        held: Loaded | None = plane.find("digits")
        await load(plane, other_digits)
        assert old() is not None
        assert held is not None
        assert held.instance.run({"image": bundles.images(1)})
        held = None
        gc.collect()
        assert old() is None


class TestTelemetry:
    async def test_a_window_says_what_happened(self, plane: DataPlane, digits: Bundle) -> None:
        await load(plane, digits)
        for number in range(5):
            await ask(plane, bundles.images(2, number))
        found = window(plane)
        assert (found.requests, found.errors, found.bundle) == (5, 0, digits.digest)
        assert found.latency.count == found.inference.count == 5
        assert histograms.quantile(found.inference, 0.5) > 0
        assert found.inputs.kind == "image"
        assert found.inputs.count == found.outputs.count == 10
        assert {"class_share", "confidence"} <= {part.name for part in found.outputs.sketches}
        again = window(plane)
        assert (again.requests, again.inputs.count) == (0, 0)

    async def test_errors_of_the_model_count_and_those_of_clients_do_not(
        self, plane: DataPlane, listener: Listener
    ) -> None:
        connection = await connect(listener.port)
        body, size = infer_body(bundles.images(1)[:, :5])
        await connection.exchange(request(body, size))
        loaded = plane.find("digits")
        loaded.observer.failure(ShoalError("x"), 5)
        found = window(plane)
        assert (found.requests, found.errors) == (1, 1)
        assert dict(found.errors_by_reason) == {"error": 1}
        assert loaded.observer.totals.invalid == 1

    def test_sketching_is_bounded_under_load(self) -> None:
        observer = Observer("e", "b", ROLE_PRIMARY, bundles.IMAGE)
        batch, answer = bundles.images(1), np.zeros((1, 10), np.float32)
        observer._sketch_ns = 10**15  # as if sketches were very slow
        for _ in range(3 * ALWAYS_SKETCHED):
            if observer.success(1, 1000, 0, 500, 1.0, {"image": batch}, {"logits": answer}):
                observer.sketch()
        found = observer.take()
        assert found.requests == 3 * ALWAYS_SKETCHED
        assert ALWAYS_SKETCHED <= found.inputs.count < ALWAYS_SKETCHED + 32

    def test_a_kind_that_does_not_fit_ends_sketching_only(self) -> None:
        signature = dataclasses.replace(bundles.VECTOR, input_kind="image")
        observer = Observer("e", "b", ROLE_PRIMARY, signature)
        values = {"x": np.zeros((1, 64), np.float32)}
        observer.success(1, 1000, 0, 500, 1.0, values, {"y": np.zeros((1, 10), np.float32)})
        found = observer.take()
        assert found.requests == 1
        assert found.inputs.count == 0
        assert found.outputs.count == 1


class TestShadow:
    async def test_it_answers_after_the_primary_and_is_compared(
        self, plane: DataPlane, digits: Bundle, other_digits: Bundle
    ) -> None:
        await load(plane, digits)
        await load(plane, other_digits, role="shadow", version="2")
        agreed = 0
        for number in range(20):
            batch = bundles.images(2, number)
            answer = await ask(plane, batch, f"r-{number}")
            np.testing.assert_allclose(answer, bundles.expected(batch, 0), atol=1e-3)
            agreed += int(
                (bundles.expected(batch, 0).argmax(1) == bundles.expected(batch, 7).argmax(1)).sum()
            )
            plane.label("digits", f"r-{number}", bundles.expected(batch, 7).argmax(1).tolist())
        shadow = plane._served["digits"].shadow
        assert shadow is not None
        while shadow.loaded.observer.totals.compared < 40:
            await asyncio.sleep(0.001)
        mirrored, primary = PlacementWindow(), PlacementWindow()
        for part in plane.telemetry().placements:
            (primary if part.role == ROLE_PRIMARY else mirrored).CopyFrom(part)
        assert (mirrored.requests, mirrored.compared, mirrored.agreed) == (20, 40, agreed)
        assert mirrored.bundle == other_digits.digest
        # A label judges both, whoever answered first.
        assert (mirrored.labelled, mirrored.correct) == (40, 40)
        assert (primary.labelled, primary.correct) == (40, agreed)

    async def test_the_share_is_respected(
        self, plane: DataPlane, digits: Bundle, other_digits: Bundle
    ) -> None:
        random.seed(3)
        await load(plane, digits)
        await load(plane, other_digits, role="shadow", settings=PlacementSettings(shadow_share=0.3))
        for number in range(200):
            await ask(plane, bundles.images(1, number))
        shadow = plane._served["digits"].shadow
        assert shadow is not None
        while shadow._running:
            await asyncio.sleep(0.001)
        assert 30 <= shadow.loaded.observer.totals.success + shadow.dropped <= 90

    async def test_unloading_leaves_the_primary(
        self, plane: DataPlane, digits: Bundle, other_digits: Bundle
    ) -> None:
        await load(plane, other_digits, role="shadow")
        with pytest.raises(NotFound):
            plane.find("digits")
        await load(plane, digits)
        assert len(plane.index()) == 2
        plane.unload("digits", "shadow")
        assert [row["bundle"] for row in plane.index()] == [digits.digest]


class TestFeedback:
    async def test_labels_are_matched_by_id(self, plane: DataPlane, digits: Bundle) -> None:
        await load(plane, digits)
        batch = bundles.images(3)
        truth = bundles.expected(batch).argmax(1).tolist()
        await ask(plane, batch, "three")
        await ask(plane, batch[:1], "one")
        assert plane.label("digits", "three", [truth[0], (truth[1] + 1) % 10, truth[2]]) == "matched"
        assert plane.label("digits", "three", [0, 0, 0]) == "duplicate"
        assert plane.label("digits", "one", f"digit-{truth[0]}") == "matched"
        assert plane.label("digits", "never", 1) == "unmatched"
        found = window(plane)
        assert (found.labelled, found.correct, found.label_unmatched) == (4, 3, 1)

    @pytest.mark.parametrize(
        ("label", "words"),
        [
            ("digit-77", "no class"),
            (10, "Use 0 to 9"),
            (-1, "class index"),
            (True, "class index"),
            ([], "empty"),
            ([1, 2], "1 items"),
        ],
    )
    async def test_labels_that_fit_nothing_are_refused(
        self, plane: DataPlane, digits: Bundle, label: object, words: str
    ) -> None:
        await load(plane, digits)
        await ask(plane, bundles.images(1), "a")
        with pytest.raises(InvalidInput, match=words):
            plane.label("digits", "a", label)

    def test_memory_and_time_are_bounded(self) -> None:
        feedback = Feedback(keep_s=10, capacity=50)
        observer = Observer("e", "b", ROLE_PRIMARY, bundles.IMAGE)
        for number in range(200):
            feedback.remember("e", f"id-{number}", observer, np.zeros(1), now=0.0)
        assert len(feedback) == 50
        assert feedback.label("e", "id-10", [0], 1.0) == "unmatched"
        assert feedback.label("e", "id-199", [0], 11.0) == "unmatched"
        feedback.remember("e", "x" * 1000, observer, np.zeros(1), now=11.0)
        assert len(feedback) == 0

    def test_an_id_used_again_means_the_newer_request(self) -> None:
        feedback = Feedback()
        observer = Observer("e", "b", ROLE_PRIMARY, bundles.IMAGE)
        feedback.remember("e", "1", observer, np.asarray([4]), 0.0)
        feedback.remember("e", "1", observer, np.asarray([5]), 0.0)
        assert feedback.label("e", "1", [5], 0.0) == "matched"
        assert observer.totals.correct == 1

    async def test_labels_count_for_a_bundle_that_was_replaced_meanwhile(
        self, plane: DataPlane, digits: Bundle, other_digits: Bundle
    ) -> None:
        await load(plane, digits)
        await ask(plane, bundles.images(1), "late")
        plane.telemetry()
        await load(plane, other_digits)
        plane.label("digits", "late", 1)
        found = [p for p in plane.telemetry().placements if p.labelled]
        assert [p.bundle for p in found] == [digits.digest]


class TestSamples:
    async def test_sampled_inputs_become_a_file(
        self, plane: DataPlane, digits: Bundle, tmp_path: Path
    ) -> None:
        settings = PlacementSettings(
            sampling=Sampling(share=1.0, max_samples_per_window=5, label_wait_seconds=600)
        )
        await load(plane, digits, settings=settings)
        for number in range(12):
            await ask(plane, bundles.images(1, number), f"s-{number}")
        assert plane.write_samples(tmp_path) == []  # they wait for their labels
        for number in range(3):
            plane.label("digits", f"s-{number}", number)
        (found,) = plane.write_samples(tmp_path)
        assert (found["count"], found["labelled"], found["bundle"]) == (3, 3, digits.digest)
        path = Path(found["path"])
        assert path.stat().st_size == found["size"]
        with np.load(path) as archive:
            assert set(archive.files) == {"image", "label", "predicted", "confidence"}
            assert archive["image"].dtype == np.uint8
            order = archive["label"].tolist()
            assert sorted(order) == [0, 1, 2]
            for place, number in enumerate(order):
                batch = bundles.images(1, number)
                np.testing.assert_array_equal(archive["image"][place], batch[0])
                assert archive["predicted"][place] == bundles.expected(batch).argmax()
            assert archive["confidence"].dtype == np.float32
        assert [path.name for path in tmp_path.iterdir()] == [path.name]  # no temporary file is left

    async def test_off_unless_the_policy_says_so(
        self, plane: DataPlane, digits: Bundle, tmp_path: Path
    ) -> None:
        await load(plane, digits)
        await ask(plane, bundles.images(4), "a")
        plane.label("digits", "a", [1, 2, 3, 4])
        assert plane.write_samples(tmp_path) == []
        assert len(plane.find("digits").recorder) == 0
