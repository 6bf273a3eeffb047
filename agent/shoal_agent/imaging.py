"""From a picture to the tensor that a model takes, and back to the picture's pixels.

The one implementation of decoding and resizing: the client, the evaluation of variants and the
examples call it, so equal pictures give equal tensors, bit for bit. Needs numpy and Pillow.

The rule, in order: decode (a JPEG at a half, a quarter or an eighth of its size where that is still
at least as large as needed), turn upright by its EXIF orientation, lay transparent parts over the
declared `pad`, convert to the declared colours, resize with Pillow's antialiased bilinear filter
(`reducing_gap=2`) as the signature's `resize` says.
"""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shoal_protos.bundle import Signature
from shoal_protos.errors import InvalidInput, MissingExtra, NotFound, Unsupported

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Array = np.ndarray[Any, Any]

MAX_PIXELS = 89_478_485  # as Pillow's own limit: a larger picture is taken for a decompression bomb
MAX_SIDE = 65_535
# Formats that Pillow reads by itself; others would start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")  # JPEG stands for MPO too
RESIZE_RULES = ("stretch", "letterbox", "crop")
COLORS = {"gray": 1, "rgb": 3, "bgr": 3}
_ORIENTATION = 0x0112
_GAP = 2.0
_JPEG_SCALES = (8, 4, 2)
_KEPT_PIXELS = 1 << 20
_kept = threading.local()
_JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
_JPEG_TABLES = frozenset((0xC4, 0xDB, 0xDD, 0xE0, 0xFE))  # Huffman, quantization, restart, JFIF, comment


class Target(NamedTuple):
    """What a signature says about pictures."""

    width: int  # 0 = as the picture
    height: int
    color: str
    resize: str
    pad: int
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Placed:
    """A picture in a model's input.

    tensor: uint8 [height, width, channels]. scale, offset: x, y; a pixel of the picture lies in the
    tensor at `pixel * scale + offset`. size: the upright picture's width and height, pixels.
    """

    tensor: Array
    scale: tuple[float, float]
    offset: tuple[float, float]
    size: tuple[int, int]

    def to_picture(self, boxes: Array) -> Array:
        """Boxes [n, 4] (x1, y1, x2, y2) as shares of the tensor -> in the picture's pixels, cut at
        its borders."""
        height, width = self.tensor.shape[:2]
        sides = np.asarray((width, height, width, height), np.float64)
        pixels = (boxes * sides - np.asarray(self.offset * 2)) / np.asarray(self.scale * 2)
        cut: Array = np.clip(pixels, 0.0, np.asarray(self.size * 2, np.float64))
        return cut

    def to_tensor(self, boxes: Array) -> Array:
        """The inverse: boxes in the picture's pixels -> shares of the tensor, not cut."""
        height, width = self.tensor.shape[:2]
        sides = np.asarray((width, height, width, height), np.float64)
        shares: Array = (boxes * np.asarray(self.scale * 2) + np.asarray(self.offset * 2)) / sides
        return shares


def decode(source: Any, signature: Signature, color: str = "") -> Array:
    """A picture as the model takes it: uint8 [height, width, channels]. As `place`."""
    return place(source, signature, color).tensor


def place(source: Any, signature: Signature, color: str = "") -> Placed:
    """Decodes a picture and fits it into the signature's first input.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array: uint8 or uint16, [h, w] or
            [h, w, 1, 3 or 4] (the fourth channel is transparency).
        color: an array's channel order, "gray", "rgb" or "bgr" (OpenCV); left out, the declared one.

    Raises:
        InvalidInput: not a picture, cut off, too large, or of a form that has no one meaning.
        NotFound: there is no such file.
        Unsupported: the model's input takes no pictures.
        MissingExtra: Pillow is not installed.
    """
    target = target_of(signature)
    if isinstance(source, np.ndarray):
        return _place_array(source, target, color)
    if color:
        raise InvalidInput("Only arrays have a 'color' of their own.", "Leave it out: the file says it.")
    found = _plain_jpeg(source, target) if isinstance(source, bytes) else None
    if found is None:
        found = _open(source, target)
    picture, size = found
    flat = _flatten(picture, target)
    placed = _resized(flat, size, target)
    values = np.asarray(placed[0])
    return _finished(values, target, placed[1], placed[2], size, color=target.color, ranged=True)


def target_of(signature: Signature) -> Target:
    """Raises Unsupported unless the first input takes pictures: UINT8 [N, height, width, 1 or 3]."""
    spec = signature.inputs[0]
    channels = spec.shape[-1] if len(spec.shape) == 4 else 0
    if signature.input_kind != "image" or spec.datatype != "UINT8" or channels not in (1, 3):
        raise Unsupported(
            f"The input '{spec.name}' takes no pictures: it is {signature.input_kind} {spec.datatype} "
            f"{list(spec.shape)}.",
            "Declare an image input, UINT8 [N, height, width, 1 or 3], and put scaling into the task's "
            "preprocess(); or send a finished array with infer().",
        )
    color = signature.color or ("gray" if channels == 1 else "rgb")
    if COLORS.get(color) != channels:
        raise Unsupported(f"The input '{spec.name}' has {channels} channels, but its color is '{color}'.")
    low = 0.0 if spec.low is None else float(spec.low)
    high = 255.0 if spec.high is None or spec.high <= low else float(spec.high)
    width, height = max(0, spec.shape[2]), max(0, spec.shape[1])
    return Target(width, height, color, signature.resize, signature.pad, low, high)


# ---------------------------------------------------------------------------- files


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("client", "pillow") from error
    return Image


def _open(source: Any, target: Target) -> tuple[Picture, tuple[int, int]]:
    """(the upright picture, perhaps decoded at a smaller scale; its full upright size)."""
    module = _pillow()
    if isinstance(source, module.Image):
        picture, name = source, "The picture"
        if getattr(picture, "filename", ""):
            name = os.path.basename(str(picture.filename))
    elif isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        picture, name = _read(source)
    else:
        raise InvalidInput(
            f"A {type(source).__name__} is no picture.", "Pass a path, bytes, a Pillow image or an array."
        )
    _check_size(picture.size, name)
    turn = _turn(picture)
    sideways = turn in (5, 6, 7, 8)
    size = (picture.size[1], picture.size[0]) if sideways else picture.size
    wanted = _content(size, target)
    if picture is not source and picture.format in ("JPEG", "MPO"):  # the caller's image stays as it is
        if sideways:
            wanted = (wanted[1], wanted[0])
        _draft(picture, wanted, target.color == "gray")
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise InvalidInput(
            f"{name} cannot be decoded: {str(error)[:120]}.", "The file is damaged or cut off: copy it again."
        ) from error
    if turn != 1:
        method = (None, None, 0, 3, 1, 5, 4, 6, 2)[turn]
        picture = picture.transpose(module.Transpose(method))
    return picture, size


def _read(source: Any) -> tuple[Picture, str]:
    module = _pillow()
    if isinstance(source, (bytes, bytearray, memoryview)):
        stream, name = io.BytesIO(source), "The picture"
    else:
        name = os.path.basename(os.fspath(source))[:100]
        try:
            with open(source, "rb") as file:
                stream = io.BytesIO(file.read())
        except FileNotFoundError as error:
            raise NotFound(f"There is no file {os.fspath(source)}.") from error
        except OSError as error:
            raise InvalidInput(f"{name} cannot be read: {error.strerror or error}.") from error
    try:
        return module.open(stream, formats=FORMATS), name
    except (module.DecompressionBombError, module.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except module.UnidentifiedImageError as error:
        known = "JPEG, PNG, WebP, BMP, GIF, TIFF, PPM"
        raise InvalidInput(f"{name} is not a picture.", f"Pictures are {known}.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidInput(f"{name} cannot be decoded: {str(error)[:120]}.") from error


def _too_large(name: str) -> InvalidInput:
    return InvalidInput(f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels.", "Make it smaller.")


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InvalidInput(f"{name} is empty.")
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS:
        raise _too_large(name)


def _turn(picture: Picture) -> int:
    """The EXIF orientation, 1 = upright."""
    if picture.format == "JPEG" and not ("exif" in picture.info or "xmp" in picture.info):
        return 1
    try:
        turn = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF of somebody's camera is no reason to refuse the picture
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _plain_jpeg(data: bytes, target: Target) -> tuple[Picture, tuple[int, int]] | None:
    """As `_open` for a JPEG as cameras stream it, by the same decoder with the same settings, but
    without `Image.open`, which spends a fifth of the time on the header. None = `_open` has to look:
    also at everything damaged, so that errors are told in one place."""
    size = _plain_jpeg_size(data)
    if size is None:
        return None
    scale = _scale(size, _content(size, target))
    mode = "L" if target.color == "gray" else "RGB"
    small = (-(-size[0] // scale), -(-size[1] // scale))
    picture = _canvas(mode, small)
    try:
        picture.frombytes(data, "jpeg", (mode, "", scale, 0))
    except (OSError, SyntaxError, ValueError, TypeError):
        return None
    return picture, size


def _canvas(mode: str, size: tuple[int, int]) -> Picture:
    """Memory to decode into; this thread's last one where it fits, since fresh pages cost more than
    the copy that leaves it. Nobody outside of `place` gets to see it."""
    kept: Picture | None = getattr(_kept, "picture", None)
    if kept is None or kept.mode != mode or kept.size != size:
        kept = _pillow().new(mode, size)
        _kept.picture = kept if size[0] * size[1] <= _KEPT_PIXELS else None
    return kept


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of an 8 bit colour JPEG whose header says nothing that matters besides: no EXIF,
    colour profile, Adobe marker or second picture. None for any other file."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    size = None
    place, end = 2, len(data) - 10
    while place < end and data[place] == 0xFF:
        marker = data[place + 1]
        length = data[place + 2] << 8 | data[place + 3]
        if marker in _JPEG_FRAMES:
            height, width = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
            if size is not None or data[place + 4] != 8 or data[place + 9] != 3:
                return None
            if length != 17 or not width * height or width * height > MAX_PIXELS:
                return None
            size = (width, height)
        elif marker == 0xDA:
            return size
        elif marker not in _JPEG_TABLES or length < 2:
            return None
        place += 2 + length
    return None


def _scale(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    """By how much the JPEG decoder may shrink: detail that resizing would average away."""
    width, height = size
    return next((s for s in _JPEG_SCALES if width // s >= wanted[0] and height // s >= wanted[1]), 1)


def _draft(picture: Picture, wanted: tuple[int, int], gray: bool) -> None:
    width, height = picture.size
    scale = _scale(picture.size, wanted)
    mode = "L" if gray and picture.mode in ("RGB", "L") else None
    picture.draft(mode, (max(1, width // scale), max(1, height // scale)))


def _flatten(picture: Picture, target: Target) -> Picture:
    """The picture in the declared number of channels, 8 bits each; 3 channels are always R, G, B."""
    module = _pillow()
    mode = picture.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        picture = module.fromarray(_eight_bits(np.asarray(picture)))
    elif mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        ground = module.new("RGBA", clear.size, (target.pad,) * 3 + (255,))
        picture = module.alpha_composite(ground, clear)
    wanted = "L" if target.color == "gray" else "RGB"
    try:
        return picture if picture.mode == wanted else picture.convert(wanted)
    except ValueError as error:
        raise InvalidInput(f"A picture of mode {mode} has no meaning here.", "Convert it to RGB.") from error


def _eight_bits(values: Array) -> Array:
    """8 bits of unsigned integers of at most 16 bits."""
    if values.dtype.kind == "f" or int(values.min(initial=0)) < 0 or int(values.max(initial=0)) > 65_535:
        raise InvalidInput(
            "The picture's values are no 8 or 16 bit unsigned integers.", "Scale it to 0..255 first."
        )
    return (values >> 8).astype(np.uint8)


# ---------------------------------------------------------------------------- arrays


def _place_array(source: Array, target: Target, color: str) -> Placed:
    color = color or target.color
    if color not in COLORS:
        raise InvalidInput(f"The color '{color[:40]}' is unknown.", f"Colors are {', '.join(COLORS)}.")
    values = _checked_array(source, color)
    height, width = values.shape[:2]
    _check_size((width, height), "The array")
    if values.shape[2] == 4:
        values = _over_ground(values, target.pad)
    size = (width, height)
    if (not target.width or width == target.width) and (not target.height or height == target.height):
        scaled, scale, offset = values, (1.0, 1.0), (0.0, 0.0)
    else:
        module = _pillow()
        flat = values[..., 0] if values.shape[2] == 1 else values
        picture, scale, offset = _resized(module.fromarray(np.ascontiguousarray(flat)), size, target)
        scaled = np.asarray(picture)
    return _finished(scaled, target, scale, offset, size, color=color, ranged=False)


def _checked_array(source: Array, color: str) -> Array:
    """The array as uint8 [h, w, 1, 3 or 4]."""
    values = source[..., None] if source.ndim == 2 else source
    fits = values.ndim == 3 and values.shape[2] in ((1,) if color == "gray" else (3, 4))
    if not fits:
        first = " The channels come last." if source.ndim == 3 and source.shape[0] in (1, 3, 4) else ""
        raise InvalidInput(
            f"An array of shape {list(source.shape)} is no {color} picture.{first}",
            "Pass [height, width, channels], and say color='gray', 'rgb' or 'bgr'.",
        )
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if values.dtype != np.uint8:
        raise InvalidInput(
            f"A picture's array is uint8 or uint16, not {values.dtype}.", "Scale it to 0..255 first."
        )
    return values


def _over_ground(values: Array, pad: int) -> Array:
    alpha = values[..., 3:].astype(np.uint16)
    mixed = (values[..., :3] * alpha + np.uint16(pad) * (255 - alpha) + 127) // 255
    solid: Array = mixed.astype(np.uint8)
    return solid


# ---------------------------------------------------------------------------- geometry


def _content(size: tuple[int, int], target: Target) -> tuple[int, int]:
    """Width and height that the whole picture gets in the tensor (beyond its borders for "crop").

    Raises:
        InvalidInput: the sizes differ and the signature declares no rule.
    """
    width, height = target.width or size[0], target.height or size[1]
    if size == (width, height) or target.resize == "stretch":
        return width, height
    if target.resize == "letterbox":
        share = min(width / size[0], height / size[1])
    elif target.resize == "crop":
        share = max(width / size[0], height / size[1])
    else:
        raise InvalidInput(
            f"The picture is {size[0]}x{size[1]}, the model takes {width}x{height} "
            "and declares no resize rule.",
            "Resize it, or declare resize = 'stretch', 'letterbox' or 'crop' in the task and push it again.",
        )
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def _resized(
    picture: Picture, size: tuple[int, int], target: Target
) -> tuple[Picture, tuple[float, float], tuple[float, float]]:
    """(the picture at the tensor's size, scale, offset). `size` is the full picture's, before `_draft`."""
    module = _pillow()
    width, height = target.width or size[0], target.height or size[1]
    content = _content(size, target)
    filters = module.Resampling.BILINEAR
    if target.resize == "crop" and content != (width, height):
        share = max(width / size[0], height / size[1])
        # Rounding may leave a hair less than nothing.
        left, top = max(0.0, (size[0] - width / share) / 2), max(0.0, (size[1] - height / share) / 2)
        box_x, box_y = picture.size[0] / size[0], picture.size[1] / size[1]  # less than 1 after `_draft`
        right = min(picture.size[0], (left + width / share) * box_x)
        bottom = min(picture.size[1], (top + height / share) * box_y)
        box = (left * box_x, top * box_y, right, bottom)
        cut = picture.resize((width, height), filters, box, _GAP)
        return cut, (share, share), (-left * share, -top * share)
    scale = (content[0] / size[0], content[1] / size[1])
    scaled = picture if picture.size == content else picture.resize(content, filters, None, _GAP)
    if content == (width, height):
        return scaled, scale, (0.0, 0.0)
    offset = ((width - content[0]) // 2, (height - content[1]) // 2)
    fill: Any = target.pad if scaled.mode == "L" else (target.pad,) * 3
    canvas = module.new(scaled.mode, (width, height), fill)
    canvas.paste(scaled, offset)
    return canvas, scale, (float(offset[0]), float(offset[1]))


def _finished(
    values: Array,
    target: Target,
    scale: tuple[float, float],
    offset: tuple[float, float],
    size: tuple[int, int],
    *,
    color: str,
    ranged: bool,
) -> Placed:
    """The tensor in the declared channel order; a file's 0..255 in the declared range."""
    if values.ndim == 2:
        values = values[..., None]
    declared = target.color
    source = "rgb" if ranged and declared == "bgr" else color
    if declared == "gray" and values.shape[2] == 3:
        values = _gray(values, source)
    elif declared != "gray" and values.shape[2] == 1:
        values = np.repeat(values, 3, axis=2)
    elif declared != "gray" and source != declared:
        values = values[..., ::-1]
    if ranged and (target.low, target.high) != (0.0, 255.0):
        values = _levels(target.low, target.high)[values]
    return Placed(np.ascontiguousarray(values), scale, offset, size)


def _gray(values: Array, color: str) -> Array:
    """Pillow's own weights, so that an array and a file agree."""
    ordered = np.ascontiguousarray(values if color == "rgb" else values[..., ::-1])
    gray: Array = np.asarray(_pillow().fromarray(ordered).convert("L"))
    return gray[..., None]


def _levels(low: float, high: float) -> Array:
    scaled = low + np.arange(256) * (high - low) / 255.0
    levels: Array = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return levels
