"""The bundle format: round trip, tampering, unsafe content, versions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal_protos import bundle as b
from shoal_protos.errors import InvalidInput, TamperedData, Unsupported

SIGNATURE = b.Signature(
    inputs=(b.TensorSpec("image", "UINT8", (-1, 8, 8, 1), "NHWC", 0.0, 16.0),),
    outputs=(b.TensorSpec("logits", "FP32", (-1, 10)),),
    input_kind="image",
    output_kind="logits",
    labels=tuple(str(i) for i in range(10)),
)
CONFIG = b.BundleConfig(
    signature=SIGNATURE,
    runtime=b.RuntimeNeed("onnxruntime", "model.onnx"),
    name="digits",
    requires=(b.Requirement("bundle.v1", "0.1.0"),),
    golden=b.GoldenCases("golden.npz"),
    reference=b.Reference(thresholds={"50": {"psi": 0.5}}),
    lineage=b.Lineage(model="digits", model_version=1, recipe=({"technique": "quantization"},)),
)
FILES = {"model.onnx": b"weights" * 100, "golden.npz": b"golden"}


def write(tmp_path: Path, config: b.BundleConfig = CONFIG) -> tuple[Path, str]:
    layout = tmp_path / "layout"
    return layout, b.write_bundle(layout, config, FILES)


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    layout, digest = write(tmp_path)
    opened = b.open_bundle(layout)
    assert opened.digest == digest
    assert opened.config == CONFIG
    assert opened.model_file.read_bytes() == FILES["model.onnx"]


def test_equal_content_has_an_equal_name(tmp_path: Path) -> None:
    assert write(tmp_path / "a")[1] == write(tmp_path / "b")[1]


def test_it_is_an_oci_image_layout(tmp_path: Path) -> None:
    layout, digest = write(tmp_path)
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_text())
    assert index["schemaVersion"] == 2 and index["manifests"][0]["digest"] == digest
    manifest = json.loads(b.blob_path(layout, digest).read_text())
    assert manifest["config"]["mediaType"] == b.CONFIG_TYPE
    assert {layer["annotations"][b.TITLE] for layer in manifest["layers"]} == set(FILES)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    layout, digest = write(tmp_path_factory.mktemp("bundle"))
    blobs = sorted((layout / "blobs" / "sha256").iterdir())
    victim = data.draw(st.sampled_from(blobs))
    content = bytearray(victim.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    victim.write_bytes(bytes(content))
    with pytest.raises(TamperedData):
        b.open_bundle(layout, digest)


@pytest.mark.parametrize("keep", [0, 1, 10])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    layout, digest = write(tmp_path)
    model = b.open_bundle(layout).model_file
    model.write_bytes(model.read_bytes()[:keep])
    with pytest.raises(TamperedData, match=r"model\.onnx"):
        b.open_bundle(layout, digest)


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=4),
    st.text("abcxyz_", min_size=3, max_size=9).map(lambda name: "x_" + name),
)
def test_unknown_fields_are_ignored(value: dict[str, object], name: str) -> None:
    raw = json.loads(b.dump_config(CONFIG))
    raw[name] = value
    raw["signature"][name] = value
    assert b.parse_config(json.dumps(raw).encode()) == CONFIG


def test_an_unknown_required_feature_names_the_version_needed() -> None:
    config = dataclasses.replace(CONFIG, requires=(b.Requirement("bundle.delta", "0.7.0"),))
    with pytest.raises(Unsupported, match=r"bundle\.delta.*0\.7\.0"):
        b.parse_config(b.dump_config(config))


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(Unsupported, match="schema 2"):
        b.parse_config(b.dump_config(dataclasses.replace(CONFIG, schema=2)))


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("runtime", "name"), 7, r"runtime\.name"),
        (("signature", "inputs"), "x", r"signature\.inputs"),
        (("signature", "inputs", 0, "shape", 0), "a", r"inputs\[0\]\.shape"),
        (("golden",), [1], "golden"),
    ],
)
def test_a_wrong_type_names_the_field(path: tuple[str | int, ...], value: object, field: str) -> None:
    raw = json.loads(b.dump_config(CONFIG))
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(InvalidInput, match=field):
        b.parse_config(json.dumps(raw).encode())


@given(st.binary(max_size=200))
def test_garbage_is_refused_with_a_domain_error(data: bytes) -> None:
    with pytest.raises((InvalidInput, Unsupported)):
        b.parse_config(data)
    with pytest.raises(InvalidInput):
        b.parse_manifest(data, b.digest_of(data))


@pytest.mark.parametrize("title", ["../x", "/etc/passwd", "a/b", "..", "", ".", "a\\b", "a\0b"])
def test_unsafe_file_names_are_refused(tmp_path: Path, title: str) -> None:
    with pytest.raises(InvalidInput):
        b.write_bundle(tmp_path, CONFIG, {title: b""})


def test_a_huge_manifest_is_refused() -> None:
    data = b" " * (b.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(InvalidInput, match="more than"):
        b.parse_manifest(data, b.digest_of(data))


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:" + "g" * 64, "sha1:" + "0" * 64, "sha256:../../x"]
)
def test_what_is_not_a_digest_never_becomes_a_path(tmp_path: Path, digest: str) -> None:
    with pytest.raises(InvalidInput):
        b.blob_path(tmp_path, digest)


def test_a_missing_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not a bundle"):
        b.open_bundle(tmp_path)
