"""The bundle: a content-addressed OCI artifact that holds one deployable variant.

On disk it is an OCI image layout (OCI Image Specification 1.1): `oci-layout`, `index.json`
and `blobs/sha256/<hex>`. The artifact is an image manifest whose config blob is `bundle.json`
and whose layers are the model's files, each titled by `org.opencontainers.image.title`. The
bundle's name is the digest of its manifest; nothing inside depends on what measuring finds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, get_args, get_origin, get_type_hints

from shoal_protos.errors import InvalidInput, TamperedData, Unsupported

SCHEMA = 1
ARTIFACT_TYPE = "application/vnd.shoal.bundle.v1"
CONFIG_TYPE = "application/vnd.shoal.bundle.config.v1+json"
LAYER_TYPE = "application/vnd.shoal.bundle.file.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
TITLE = "org.opencontainers.image.title"

MAX_MANIFEST_BYTES = 1 << 20  # a manifest lists files, it does not hold them
MAX_CONFIG_BYTES = 4 << 20
MAX_LAYERS = 64

# Features of the bundle format itself that this version implements: feature -> since version.
KNOWN_FEATURES: Mapping[str, str] = {"bundle.v1": "0.1.0"}

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


# ---------------------------------------------------------------------------- bundle.json


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a signature. `shape` has -1 in the batch dimension."""

    name: str
    datatype: str  # Open Inference Protocol: "UINT8", "FP32", "INT64"...
    shape: tuple[int, ...]
    layout: str = ""  # "NHWC", "NT", "NC"; "" = not declared
    low: float | None = None  # value range, inclusive; None = unbounded
    high: float | None = None


@dataclass(frozen=True)
class BoxRule:
    """How the candidates of an output of kind "boxes" become the answer.

    Such an output is FP32 [-1, candidates, 4 + classes]: x1, y1, x2, y2 as shares of the input
    tensor's width and height, then one score from 0 to 1 per class of `labels` (no background).
    """

    score_threshold: float = 0.25  # candidates below it are dropped first
    iou_threshold: float = 0.5  # of two boxes of one class that overlap more, the better one stays
    max_boxes: int = 100  # an image


@dataclass(frozen=True)
class Signature:
    """What applications send and get: the same for every variant of an endpoint."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_kind: str = "tensor"  # "image", "audio", "series", "tensor"
    output_kind: str = "values"  # "logits", "boxes", "values"
    labels: tuple[str, ...] = ()
    color: str = ""  # "gray", "rgb", "bgr"; images only
    resize: str = ""  # "stretch", "letterbox", "crop"; images only, bilinear with antialiasing
    units: str = ""  # of values ("cycles", "degC")
    pad: int = 114  # value of the bars that "letterbox" adds, 0..255
    sample_rate: int = 0  # Hz; audio and series, 0 = not declared
    boxes: BoxRule | None = None  # output_kind "boxes" only


@dataclass(frozen=True)
class RuntimeNeed:
    """Which runtime loads the model file, and what the device must have."""

    name: str  # "onnxruntime", "openvino", ...
    model_file: str  # title of the layer to load
    version_min: str = ""  # inclusive
    version_max: str = ""  # exclusive
    isa: tuple[str, ...] = ()  # every one must be in the profile, e.g. ("avx512_vnni",)
    precision: str = "fp32"  # "fp32", "int8"


@dataclass(frozen=True)
class GoldenCases:
    """Inputs with expected outputs, in one `.npz` layer.

    Arrays are named `input:<name>` and `output:<name>`, batch first. Outputs must agree within
    `atol + rtol * |expected|`, or, for logits, at least `min_agreement` of the arg-max answers
    must be equal (another CPU may round int8 differently).
    """

    file: str
    rtol: float = 1e-2
    atol: float = 1e-2
    min_agreement: float = 0.95


@dataclass(frozen=True)
class Reference:
    """What inputs and outputs looked like when the variant was made, for drift tests.

    `inputs` and `outputs` are titles of layers holding serialized `shoal.v1.SketchSet`s.
    `thresholds` maps a window size (number of items, as text) to the largest statistic that
    held-out clean windows of that size reached: {"50": {"psi": 0.61, "ks": 0.24}}.
    """

    inputs: str = ""
    outputs: str = ""
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Lineage:
    """How the variant came to be, enough to make it again where the tools allow."""

    model: str = ""
    model_version: int = 0
    recipe: tuple[Mapping[str, Any], ...] = ()  # technique steps with parameters, in order
    target: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    data_digest: str = ""
    weights_digest: str = ""
    tools: Mapping[str, str] = field(default_factory=dict)  # package -> version
    parent: str = ""  # bundle or version this was adapted from


@dataclass(frozen=True)
class Requirement:
    feature: str
    since_version: str


@dataclass(frozen=True)
class BundleConfig:
    """The content of `bundle.json`. Unknown fields are ignored when read and survive, since the
    bytes are kept as carried; an unknown required feature is refused."""

    signature: Signature
    runtime: RuntimeNeed
    schema: int = SCHEMA
    name: str = ""  # for people: "digits v1 int8 onnxruntime"
    requires: tuple[Requirement, ...] = ()
    golden: GoldenCases | None = None
    reference: Reference = field(default_factory=Reference)
    lineage: Lineage = field(default_factory=Lineage)


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Builds `kind` (dataclass, tuple, mapping or scalar) from parsed JSON, naming the field on error."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InvalidInput(f"bundle.json: {where} must be an object.")
        hints = get_type_hints(kind)
        kwargs = {}
        for spec in dataclasses.fields(kind):
            if spec.name in value:
                kwargs[spec.name] = _decode(hints[spec.name], value[spec.name], f"{where}.{spec.name}")
            elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise InvalidInput(f"bundle.json: {where}.{spec.name} is missing.")
        return kind(**kwargs)  # type: ignore[operator]
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise InvalidInput(f"bundle.json: {where} must be a list.")
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if args and type(None) in args:
        if value is None:
            return None
        return _decode(next(a for a in args if a is not type(None)), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (str, int, float, bool) and (type(value) is not kind):
        raise InvalidInput(f"bundle.json: {where} must be {kind.__name__}, not {type(value).__name__}.")
    if origin is not None and issubclass(origin, Mapping) and not isinstance(value, Mapping):
        raise InvalidInput(f"bundle.json: {where} must be an object.")
    return value


def parse_config(data: bytes) -> BundleConfig:
    """Reads `bundle.json`.

    Raises:
        InvalidInput: not JSON, a field is missing or of the wrong type, or the schema is newer.
        Unsupported: a required feature that this version does not know.
    """
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise InvalidInput(f"bundle.json is not JSON: {error}.") from error
    config = _decode(BundleConfig, raw, "bundle")
    assert isinstance(config, BundleConfig)
    if config.schema > SCHEMA:
        raise Unsupported(
            f"The bundle has schema {config.schema}, this version reads up to {SCHEMA}.",
            "Update Shoal on this machine.",
        )
    for need in config.requires:
        if need.feature not in KNOWN_FEATURES:
            raise Unsupported(
                f"The bundle needs the feature '{need.feature}'.",
                f"Update Shoal on this machine to {need.since_version} or newer.",
            )
    return config


def dump_config(config: BundleConfig) -> bytes:
    """Canonical JSON of a config: sorted keys, no spaces, UTF-8."""
    return canonical_json(dataclasses.asdict(config))


def canonical_json(value: Any) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


# ---------------------------------------------------------------------------- OCI layout


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return "sha256:" + state.hexdigest()


def check_digest(digest: str) -> str:
    """Returns the digest unchanged. Raises InvalidInput unless it is `sha256:` + 64 hex digits."""
    if not _DIGEST.match(digest):
        raise InvalidInput(f"'{digest[:80]}' is not a digest.", "A digest is sha256: and 64 hex digits.")
    return digest


def blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs" / "sha256" / check_digest(digest).removeprefix("sha256:")


@dataclass(frozen=True)
class Layer:
    title: str
    digest: str
    size: int  # bytes


@dataclass(frozen=True)
class Manifest:
    """A parsed image manifest: config first, then the files."""

    digest: str
    config: Layer
    layers: tuple[Layer, ...]

    def layer(self, title: str) -> Layer:
        for layer in self.layers:
            if layer.title == title:
                return layer
        raise InvalidInput(f"The bundle {self.digest[:19]} has no file '{title}'.")

    @property
    def size(self) -> int:
        """Bytes of everything that a device fetches besides the manifest."""
        return self.config.size + sum(layer.size for layer in self.layers)


def parse_manifest(data: bytes, digest: str) -> Manifest:
    """Reads manifest bytes that must hash to `digest`.

    Raises:
        TamperedData: the bytes do not match the digest.
        InvalidInput: not a Shoal bundle manifest, unsafe titles, or too large.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidInput(f"The manifest is {len(data)} bytes, more than {MAX_MANIFEST_BYTES}.")
    if digest_of(data) != check_digest(digest):
        raise TamperedData(f"The manifest does not match its digest {digest[:19]}.")
    try:
        raw = json.loads(data)
        if raw.get("artifactType") != ARTIFACT_TYPE:
            raise InvalidInput(f"Not a Shoal bundle: artifactType is {raw.get('artifactType')!r}.")
        config = Layer("bundle.json", check_digest(raw["config"]["digest"]), _size(raw["config"]["size"]))
        layers = tuple(
            Layer(_safe_title(item["annotations"][TITLE]), check_digest(item["digest"]), _size(item["size"]))
            for item in raw["layers"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"The manifest {digest[:19]} is malformed: {error}.") from error
    if len(layers) > MAX_LAYERS or config.size > MAX_CONFIG_BYTES:
        raise InvalidInput(f"The manifest {digest[:19]} lists too much.")
    if len({layer.title for layer in layers}) != len(layers):
        raise InvalidInput(f"The manifest {digest[:19]} names a file twice.")
    return Manifest(digest, config, layers)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput(f"{value!r} is not a size.")
    return value


def _safe_title(title: Any) -> str:
    path = PurePosixPath(title)
    if (
        path.is_absolute()
        or len(path.parts) != 1
        or path.parts[0] in ("..", ".")
        or "\\" in title
        or "\0" in title
    ):
        raise InvalidInput(f"Unsafe file name {title!r} in a bundle.")
    return str(path)


def write_bundle(layout: Path, config: BundleConfig, files: Mapping[str, bytes | Path]) -> str:
    """Writes an OCI image layout at `layout` and returns the bundle's digest.

    Args:
        files: title -> content, or a path to copy from. Written in sorted order, so equal
            content gives an equal digest.
    """
    layers = []
    for title in sorted(files):
        content = files[title]
        data = content.read_bytes() if isinstance(content, Path) else content
        digest = _write_blob(layout, data)
        layers.append(
            {
                "annotations": {TITLE: _safe_title(title)},
                "digest": digest,
                "mediaType": LAYER_TYPE,
                "size": len(data),
            }
        )
    config_data = dump_config(config)
    manifest = canonical_json(
        {
            "artifactType": ARTIFACT_TYPE,
            "config": {
                "digest": _write_blob(layout, config_data),
                "mediaType": CONFIG_TYPE,
                "size": len(config_data),
            },
            "layers": layers,
            "mediaType": MANIFEST_TYPE,
            "schemaVersion": 2,
        }
    )
    digest = _write_blob(layout, manifest)
    write_index(layout, [(digest, len(manifest))])
    return digest


def write_index(layout: Path, manifests: Iterable[tuple[str, int]]) -> None:
    """Writes `oci-layout` and an `index.json` that lists the given (digest, size) manifests."""
    layout.mkdir(parents=True, exist_ok=True)
    (layout / "oci-layout").write_bytes(canonical_json({"imageLayoutVersion": "1.0.0"}))
    entries = [
        {"artifactType": ARTIFACT_TYPE, "digest": digest, "mediaType": MANIFEST_TYPE, "size": size}
        for digest, size in manifests
    ]
    (layout / "index.json").write_bytes(
        canonical_json({"manifests": entries, "mediaType": INDEX_TYPE, "schemaVersion": 2})
    )


def _write_blob(layout: Path, data: bytes) -> str:
    digest = digest_of(data)
    path = blob_path(layout, digest)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)
    return digest


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `path` is its layout, which may hold other bundles too."""

    path: Path
    digest: str
    manifest: Manifest
    config: BundleConfig

    def file(self, title: str) -> Path:
        """Path of a file's blob. Raises InvalidInput if the bundle has no such file."""
        return blob_path(self.path, self.manifest.layer(title).digest)

    @property
    def model_file(self) -> Path:
        return self.file(self.config.runtime.model_file)


def open_bundle(layout: Path, digest: str = "", *, verify: bool = True) -> Bundle:
    """Opens the bundle named `digest`, or the only one that `index.json` lists.

    Raises:
        InvalidInput: no bundle there, or it is malformed.
        TamperedData: a blob is missing, truncated or altered (`verify=True` hashes every blob).
        Unsupported: the bundle needs a newer Shoal.
    """
    if not digest:
        try:
            entries = json.loads((layout / "index.json").read_bytes())["manifests"]
        except (OSError, ValueError, KeyError) as error:
            raise InvalidInput(f"{layout} is not a bundle: {error}.") from error
        if len(entries) != 1:
            raise InvalidInput(f"{layout} holds {len(entries)} bundles.", "Name one by its digest.")
        digest = entries[0]["digest"]
    manifest = parse_manifest(_read_blob(layout, digest, MAX_MANIFEST_BYTES), digest)
    config_data = _read_blob(layout, manifest.config.digest, MAX_CONFIG_BYTES)
    if digest_of(config_data) != manifest.config.digest:
        raise TamperedData(f"bundle.json of {digest[:19]} does not match its digest.")
    for layer in manifest.layers:
        path = blob_path(layout, layer.digest)
        if not path.is_file() or path.stat().st_size != layer.size:
            raise TamperedData(f"The file '{layer.title}' of bundle {digest[:19]} is missing or truncated.")
        if verify and digest_of_file(path) != layer.digest:
            raise TamperedData(f"The file '{layer.title}' of bundle {digest[:19]} does not match its digest.")
    return Bundle(layout, digest, manifest, parse_config(config_data))


def _read_blob(layout: Path, digest: str, limit: int) -> bytes:
    path = blob_path(layout, digest)
    try:
        with path.open("rb") as stream:
            return stream.read(limit + 1)
    except OSError as error:
        raise TamperedData(f"The blob {digest[:19]} is missing from {layout}.") from error
