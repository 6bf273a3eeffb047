"""What a device should have: the pure merge, and the publishing around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from shoal_controller import desired, desired_publish
from shoal_controller.desired import (
    AssignmentFacts,
    DeviceInputs,
    EndpointFacts,
    EnvelopeFacts,
    OptionFacts,
    RequestFacts,
    RolloutFacts,
    TrialFacts,
    VariantFacts,
    merge,
)
from shoal_controller.desired_inputs import PublishedSettings
from shoal_controller.identity import Keys
from shoal_controller.signing import content_hash
from shoal_controller.store.repositories import Store, record
from shoal_controller.store.tables import (
    Assignment,
    Desired,
    Device,
    Endpoint,
    Measurement,
    Model,
    Release,
    Rollout,
    RolloutDevice,
    Trial,
    Variant,
    Version,
)
from shoal_protos import signing
from shoal_protos.v1 import desired_pb2

from .conftest import FakeClock, profile_of

CLASS = "x86_64.avx2.2c+onnxruntime"


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


OLD = VariantFacts("k-1", digest("1"), "onnxruntime", "digits", 1, promised_int8_share={CLASS: 0.9})
NEW = VariantFacts(
    "k-2", digest("2"), "onnxruntime", "digits", 2, envelopes={CLASS: EnvelopeFacts(5.0, 10 << 20, 0.98)}
)


def inputs(endpoint: EndpointFacts | None = None, **changes: Any) -> DeviceInputs:
    base = DeviceInputs(
        fleet="test",
        device="d-1",
        profile_class=CLASS,
        isa=frozenset({"avx2"}),
        runtimes={"onnxruntime": "1.20.0"},
        endpoints=[endpoint or EndpointFacts("digits", "default", "a-1")],
        assignments={
            "a-1": AssignmentFacts("a-1", {CLASS: "k-1"}),
            "a-2": AssignmentFacts("a-2", {CLASS: "k-2"}),
        },
        variants={"k-1": OLD, "k-2": NEW},
    )
    return replace(base, **changes)


def during(state: str, device_state: str, **changes: Any) -> EndpointFacts:
    rollout = RolloutFacts(state, "a-1", "a-2", attempt=3, device_state=device_state)
    return EndpointFacts("digits", "default", "a-1", rollout=replace(rollout, **changes))


def test_without_a_rollout_a_device_has_the_current_assignment() -> None:
    state = merge(inputs())
    (placement,) = state.placements
    assert (placement.bundle, placement.attempt, placement.role) == (OLD.bundle, 1, desired_pb2.ROLE_PRIMARY)
    assert placement.settings.promised_int8_share == 0.9
    assert not placement.settings.HasField("envelope") and not placement.settings.fallback
    assert list(state.keep) == []
    assert [need.feature for need in state.requires] == ["placements.v1"]


@pytest.mark.parametrize(
    ("rollout", "device", "bundle", "attempt"),
    [
        ("running", "waiting", OLD, 1),
        ("running", "", OLD, 1),  # joined meanwhile
        ("running", "updating", NEW, 3),
        ("running", "settling", NEW, 3),
        ("running", "switched", NEW, 3),
        ("running", "failed", OLD, 1),
        ("running", "rolled_back", OLD, 1),
        ("running", "silent", OLD, 1),
        ("paused", "switched", NEW, 3),
        ("paused", "waiting", OLD, 1),
        ("stopping", "switched", OLD, 1),
        ("rolled_back", "switched", OLD, 1),
        ("promoted", "waiting", OLD, 1),  # then the endpoint's own assignment decides
    ],
)
def test_a_rollout_moves_a_device_in_its_wave_only(
    rollout: Any, device: Any, bundle: Any, attempt: Any
) -> None:
    (placement,) = merge(inputs(during(rollout, device))).placements
    assert (placement.bundle, placement.attempt) == (bundle.bundle, attempt)


def test_both_sides_stay_on_disk_until_the_rollout_ends() -> None:
    assert list(merge(inputs(during("running", "switched"))).keep) == sorted([OLD.bundle, NEW.bundle])
    assert list(merge(inputs(during("promoted", "switched"))).keep) == []


def test_the_first_rollout_begins_with_nothing() -> None:
    endpoint = EndpointFacts(
        "digits", "default", "", rollout=RolloutFacts("running", "", "a-2", device_state="waiting")
    )
    assert not merge(inputs(endpoint)).placements


def test_promotion_changes_nothing_on_a_device_that_switched() -> None:
    before = merge(inputs(during("running", "switched")))
    after = merge(inputs(EndpointFacts("digits", "default", "a-2", attempt=3)))
    assert before.placements == after.placements


def test_the_envelope_allows_for_a_busy_machine() -> None:
    envelope = merge(inputs(during("running", "switched"))).placements[0].settings.envelope
    assert envelope.latency_p95_ms == 5.0 and envelope.latency_tolerance == desired.LATENCY_TOLERANCE
    fast = replace(NEW, envelopes={CLASS: EnvelopeFacts(0.05)})
    state = merge(inputs(during("running", "switched"), variants={"k-1": OLD, "k-2": fast}))
    envelope = state.placements[0].settings.envelope
    assert envelope.latency_p95_ms * envelope.latency_tolerance == pytest.approx(2.05)
    assert envelope.memory_bytes == 0


def test_another_class_gets_the_nearest_compatible_variant_as_fallback() -> None:
    near = VariantFacts(
        "k-3", digest("3"), "onnxruntime", isa=frozenset({"avx2"}), promised_int8_share={CLASS: 1}
    )
    far = VariantFacts("k-4", digest("4"), "onnxruntime", isa=frozenset({"avx2", "avx512f"}))
    other = VariantFacts("k-5", digest("5"), "openvino")
    choice = {
        "x86_64.avx2.4c+onnxruntime": "k-3",
        "x86_64.avx512.2c+onnxruntime": "k-4",
        "x86_64.avx2.2c+openvino": "k-5",
    }
    facts = inputs(
        assignments={"a-1": AssignmentFacts("a-1", choice)}, variants={v.id: v for v in (near, far, other)}
    )
    (placement,) = merge(facts).placements
    assert placement.bundle == near.bundle and placement.settings.fallback
    assert placement.settings.promised_int8_share == 0 and not placement.settings.HasField("envelope")


def test_a_variant_assigned_to_a_class_without_a_front_is_a_fallback() -> None:
    assignment = AssignmentFacts("a-1", {CLASS: "k-1"}, frozenset({"x86_64.avx2.8c+onnxruntime"}))
    (placement,) = merge(inputs(assignments={"a-1": assignment})).placements
    assert placement.bundle == OLD.bundle and placement.settings.fallback


@pytest.mark.parametrize(
    "changes",
    [
        {"isa": frozenset({"avx2", "avx512_vnni"})},
        {"runtime": "openvino"},
        {"version_min": "1.21"},
        {"version_max": "1.20"},
    ],
)
def test_what_a_device_lacks_is_never_sent_to_it(changes: Any) -> None:
    variant = replace(OLD, **changes)
    facts = inputs(
        assignments={"a-1": AssignmentFacts("a-1", {"x86_64.avx2.4c+onnxruntime": "k-1"})},
        variants={"k-1": variant},
    )
    assert not merge(facts).placements


def test_another_architecture_is_no_fallback() -> None:
    facts = inputs(assignments={"a-1": AssignmentFacts("a-1", {"aarch64.neon.4c+onnxruntime": "k-1"})})
    assert not merge(facts).placements


def test_trials_and_requests_are_carried_with_what_they_need() -> None:
    state = merge(
        inputs(
            trials=[TrialFacts("t-2", digest("7"), "timing", incumbent=digest("1"), not_after_ms=5)],
            requests=[RequestFacts("q-1", "logs", 9)],
        )
    )
    assert state.trials[0].kind == desired_pb2.TRIAL_KIND_TIMING and state.requests[0].not_after_ms == 9
    assert digest("1") in state.keep
    assert [need.feature for need in state.requires] == ["placements.v1", "requests.v1", "trials.v1"]


def test_sampling_is_off_unless_the_endpoint_says_so() -> None:
    settings = merge(inputs()).placements[0].settings
    assert settings.sampling == desired_pb2.Sampling()
    on = EndpointFacts("digits", "default", "a-1", sampling_share=0.1)
    state = merge(inputs(on))
    assert state.placements[0].settings.sampling.max_samples_per_window == 64
    assert "samples.v1" in [need.feature for need in state.requires]


@given(st.permutations(["alpha", "beta", "gamma", "delta"]), st.permutations(["t-1", "t-2", "t-3"]))
def test_order_of_the_facts_does_not_matter(names: Any, trials: Any) -> None:
    def of(names: list[str], trials: list[str]) -> bytes:
        endpoints = [EndpointFacts(name, "default", "a-1") for name in names]
        wanted = [TrialFacts(trial, digest("7"), "timing") for trial in trials]
        return merge(inputs(endpoints=endpoints, trials=wanted)).SerializeToString(deterministic=True)

    assert of(names, trials) == of(sorted(names), sorted(trials))


def test_the_content_hash_ignores_generation_and_dates() -> None:
    state = merge(inputs())
    dated = desired_pb2.DesiredState()
    dated.CopyFrom(state)
    dated.generation, dated.epoch, dated.issued_at_ms, dated.not_after_ms = 7, 2, 3, 4
    assert content_hash(state) == content_hash(dated)
    dated.placements[0].attempt = 9
    assert content_hash(state) != content_hash(dated)


# ---------------------------------------------------------------------------- publishing


@pytest.fixture
def fleet(store: Store, keys: Keys, clock: FakeClock, add_device: Any) -> Any:
    """Two devices of one class, one endpoint with an assignment."""
    ids = [add_device("one"), add_device("two", site="lab")]
    with store.write() as session:
        session.add(Model(id="m-1", name="digits", created_ms=0))
        session.flush()
        session.add(Version(id="v-1", model="m-1", number=1, state="ready", source_blob="", created_ms=0))
        session.flush()
        for number in (1, 2):
            session.add(
                Variant(
                    id=f"k-{number}",
                    version="v-1",
                    bundle=digest(str(number)),
                    name=f"variant{number}",
                    target="onnxruntime",
                    precision="fp32",
                    recipe=[],
                    size_bytes=1,
                    wire_bytes=1,
                    created_ms=0,
                )
            )
        session.add(Release(id="l-1", version="v-1", number=1, fronts={CLASS: ["k-1", "k-2"]}, created_ms=0))
        session.add(Endpoint(id="e-1", name="digits", model="m-1", objective="", assignment="", created_ms=0))
        session.flush()
        for number in (1, 2):
            session.add(
                Assignment(
                    id=f"a-{number}",
                    endpoint="e-1",
                    release="l-1",
                    choice={CLASS: f"k-{number}"},
                    created_ms=clock(),
                )
            )
        session.get_one(Endpoint, "e-1").assignment = "a-1"
    return ids


def read(store: Store, keys: Keys, device: str) -> desired_pb2.DesiredState:
    with store.read() as session:
        row = session.get_one(Desired, device)
        payload = signing.verify(desired_pb2.Signed.FromString(row.signed), [keys.desired_public])
    return desired_pb2.DesiredState.FromString(payload)


def test_publishing_signs_stores_and_is_quiet_when_nothing_changed(
    store: Store, keys: Keys, clock: FakeClock, fleet: Any
) -> None:
    assert desired_publish.publish(store, keys, None, clock=clock) == sorted(fleet)
    state = read(store, keys, fleet[0])
    assert (state.epoch, state.generation, state.device) == (1, 1, fleet[0])
    assert state.placements[0].bundle == digest("1")
    assert state.placements[0].settings.model == "digits"
    assert state.not_after_ms > state.issued_at_ms == clock()
    assert desired_publish.publish(store, keys, None, clock=clock) == []


def test_dates_are_renewed_without_a_new_generation(
    store: Store, keys: Keys, clock: FakeClock, fleet: Any
) -> None:
    desired_publish.publish(store, keys, None, clock=clock)
    before = read(store, keys, fleet[0])
    clock.advance(8 * 86400)
    assert desired_publish.publish(store, keys, None, clock=clock) == sorted(fleet)
    after = read(store, keys, fleet[0])
    assert after.generation == before.generation and after.not_after_ms > before.not_after_ms


def test_a_rollout_reaches_only_the_devices_of_its_wave(
    store: Store, keys: Keys, clock: FakeClock, fleet: Any
) -> None:
    desired_publish.publish(store, keys, None, clock=clock)
    first, second = fleet
    with store.write() as session:
        session.add(
            Rollout(
                id="r-1",
                endpoint="e-1",
                from_assignment="a-1",
                to_assignment="a-2",
                state="running",
                waves=[],
                gates={},
                actor="person:test",
                attempt=2,
                created_ms=clock(),
            )
        )
        session.flush()
        session.add(RolloutDevice(rollout="r-1", device=first, wave=0, state="updating", logs=None))
        session.add(RolloutDevice(rollout="r-1", device=second, wave=1, state="waiting", logs=None))
    desired_publish.publish(store, keys, None, clock=clock)
    moved, waiting = read(store, keys, first), read(store, keys, second)
    assert (moved.placements[0].bundle, moved.placements[0].attempt) == (digest("2"), 2)
    assert waiting.placements[0].bundle == digest("1")
    with store.write() as session:
        session.get_one(Rollout, "r-1").state = "promoted"
        session.get_one(Endpoint, "e-1").assignment = "a-2"
    desired_publish.publish(store, keys, None, clock=clock)
    promoted = read(store, keys, first)
    assert promoted.placements == moved.placements
    assert read(store, keys, second).placements[0].bundle == digest("2")


def test_filters_decide_who_has_an_endpoint(store: Store, keys: Keys, clock: FakeClock, fleet: Any) -> None:
    with store.write() as session:
        session.get_one(Endpoint, "e-1").filter = "label.site:lab"
    desired_publish.publish(store, keys, None, clock=clock)
    assert not read(store, keys, fleet[0]).placements
    assert read(store, keys, fleet[1]).placements


def test_later_measurements_do_not_stir_devices_that_serve_already(
    store: Store, keys: Keys, clock: FakeClock, fleet: Any
) -> None:
    desired_publish.publish(store, keys, None, clock=clock)
    clock.advance(60)
    with store.write() as session:
        session.add(
            Measurement(
                id="x-1",
                variant="k-1",
                profile_class=CLASS,
                kind="latency",
                source="trial",
                figures={"p95_ms": 4.0},
                time_ms=clock(),
            )
        )
    assert desired_publish.publish(store, keys, None, clock=clock) == []


def test_trials_of_the_device_are_published_until_their_time(
    store: Store, keys: Keys, clock: FakeClock, fleet: Any
) -> None:
    from shoal_controller.store.tables import Optimization

    with store.write() as session:
        session.add(Optimization(id="o-1", kind="optimize", version="v-1", state="waiting", created_ms=0))
        session.flush()
        session.add(
            Trial(
                id="t-1",
                optimization="o-1",
                bundle=digest("2"),
                profile_class=CLASS,
                kind="timing",
                incumbent=digest("1"),
                device=fleet[0],
                state="published",
                result=None,
                created_ms=0,
                not_after_ms=clock() + 60_000,
            )
        )
    desired_publish.publish(store, keys, None, clock=clock)
    assert [trial.id for trial in read(store, keys, fleet[0]).trials] == ["t-1"]
    assert not read(store, keys, fleet[1]).trials
    clock.advance(61)
    desired_publish.publish(store, keys, None, [fleet[0]], clock=clock)
    assert not read(store, keys, fleet[0]).trials


def test_revoked_devices_get_nothing_new(store: Store, keys: Keys, clock: FakeClock, fleet: Any) -> None:
    from shoal_controller import devices

    with store.write() as session:
        devices.revoke(session, session.get_one(Device, fleet[0]), actor="person:test")
    assert desired_publish.publish(store, keys, None, clock=clock) == [fleet[1]]


def test_outranking_begins_a_new_epoch(store: Store, keys: Keys, clock: FakeClock, fleet: Any) -> None:
    desired_publish.publish(store, keys, None, clock=clock)
    with store.write() as session:
        assert not desired_publish.outrank(session, fleet[0], 1, 1)
        assert not desired_publish.outrank(session, fleet[0], 0, 0)
        assert desired_publish.outrank(session, fleet[0], 1, 40)
    assert desired_publish.publish(store, keys, None, clock=clock) == [fleet[0]]
    assert read(store, keys, fleet[0]).epoch == 2
    assert read(store, keys, fleet[1]).epoch == 1


def test_agents_are_told_where_the_controller_is(
    store: Store, keys: Keys, clock: FakeClock, fleet: Any
) -> None:
    with store.write() as session:
        PublishedSettings(("10.0.0.1:8443",), 5, 6).save(session)
        record(session, actor="a", verb="v", kind="k", object="o")
    desired_publish.publish(store, keys, None, clock=clock)
    told = read(store, keys, fleet[0]).agent_settings
    assert (told.controllers[0].address, told.telemetry_seconds, told.heartbeat_seconds) == (
        "10.0.0.1:8443",
        5,
        6,
    )
    with store.read() as session:
        assert len(session.scalars(select(Desired)).all()) == 2


def test_a_fleet_of_profiles_is_judged_by_what_it_has() -> None:
    assert profile_of("openvino").runtimes[0].name == "openvino"


def test_measured_options_reach_the_device_unless_a_person_or_a_fallback_says_otherwise() -> None:
    chosen = OptionFacts(4, {"provider": "CUDAExecutionProvider"})
    variant = replace(OLD, options={CLASS: chosen})
    endpoint = EndpointFacts("digits", "default", "a-1")
    facts = inputs(endpoint, variants={"k-1": variant})
    (placement,) = merge(facts).placements
    assert placement.settings.options.threads == 4
    assert dict(placement.settings.options.extra) == {"provider": "CUDAExecutionProvider"}
    (placement,) = merge(inputs(replace(endpoint, threads=2), variants={"k-1": variant})).placements
    assert placement.settings.options.threads == 2  # a person's word counts more
    other = replace(OLD, options={"another+onnxruntime": chosen})
    (placement,) = merge(inputs(endpoint, variants={"k-1": other})).placements
    assert placement.settings.options.threads == 0  # measured elsewhere: says nothing here


def test_a_trials_options_reach_the_device() -> None:
    trial = TrialFacts("t-1", digest("1"), "timing", threads=2, extra={"provider": "GPU"})
    (published,) = merge(inputs(trials=[trial])).trials
    assert published.options.threads == 2 and dict(published.options.extra) == {"provider": "GPU"}
