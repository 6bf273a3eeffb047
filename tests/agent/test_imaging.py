from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shoal_agent import imaging
from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import InvalidInput, NotFound, ShoalError, Unsupported
from tests.agent.detectors import encoded

Array = np.ndarray[Any, Any]


def signature(
    height: int = 24, width: int = 32, color: str = "rgb", resize: str = "stretch", **more: Any
) -> Signature:
    channels = 1 if color == "gray" else 3
    low, high = more.pop("range", (None, None))
    spec = TensorSpec("image", "UINT8", (-1, height, width, channels), "NHWC", low, high)
    return Signature(
        inputs=(spec,),
        outputs=(TensorSpec("y", "FP32", (-1, 2)),),
        input_kind="image",
        output_kind="logits",
        color=color,
        resize=resize,
        **more,
    )


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Smooth colours: what resizing and JPEG keep."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
    return Image.fromarray(np.clip(values + seed, 0, 255).astype(np.uint8))


class TestSources:
    def test_every_source_gives_the_same(self, tmp_path: Path) -> None:
        image = picture()
        data = encoded(image)
        (tmp_path / "a.png").write_bytes(data)
        truth = imaging.decode(data, signature())
        assert truth.shape == (24, 32, 3) and truth.dtype == np.uint8 and truth.flags.c_contiguous
        array = np.asarray(image)
        for source, color in (
            (tmp_path / "a.png", ""),
            (str(tmp_path / "a.png"), ""),
            (bytearray(data), ""),
            (image, ""),
            (array, ""),
            (array[..., ::-1], "bgr"),
            (array.astype(np.uint16) * 257, "rgb"),
            (np.concatenate([array, np.full((48, 64, 1), 255, np.uint8)], -1), "rgb"),
        ):
            np.testing.assert_array_equal(imaging.decode(source, signature(), color), truth)

    def test_declared_colors(self) -> None:
        image = picture()
        rgb = imaging.decode(image, signature(color="rgb"))
        np.testing.assert_array_equal(imaging.decode(image, signature(color="bgr")), rgb[..., ::-1])
        gray = imaging.decode(image, signature(48, 64, "gray"))
        np.testing.assert_array_equal(gray[..., 0], np.asarray(image.convert("L")))
        for order in ("rgb", "bgr"):
            array = np.asarray(image)[..., :: 1 if order == "rgb" else -1]
            np.testing.assert_array_equal(imaging.decode(array, signature(48, 64, "gray"), order), gray)
        for color in ("rgb", "bgr"):
            from_gray = imaging.decode(np.asarray(image.convert("L")), signature(48, 64, color), "gray")
            np.testing.assert_array_equal(from_gray, np.repeat(gray, 3, axis=2))

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16"])
    @pytest.mark.parametrize("color", ["gray", "rgb", "bgr"])
    def test_modes(self, mode: str, color: str) -> None:
        if mode == "I;16":
            image = Image.fromarray(np.full((30, 40), 200 * 257, np.uint16))
        elif mode == "1":
            image = Image.new("1", (40, 30), 1)
        elif mode == "LA":
            image = Image.new("LA", (40, 30), (200, 255))
        else:
            image = Image.new("RGB", (40, 30), (200, 200, 200)).convert(mode)
        tensor = imaging.decode(image, signature(color=color))
        wanted = 255 if mode == "1" else 200
        np.testing.assert_allclose(tensor.mean(), wanted, atol=5)

    def test_sixteen_bits_and_alpha_from_files(self) -> None:
        deep = Image.fromarray(np.full((30, 40), 100 * 256 + 7, np.uint16))
        assert np.unique(imaging.decode(encoded(deep), signature(color="gray"))).tolist() == [100]
        clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
        assert np.unique(imaging.decode(encoded(clear), signature(pad=7))).tolist() == [7]
        half = np.full((30, 40, 4), 255, np.uint8)
        half[..., 3] = 0
        assert np.unique(imaging.decode(half, signature(pad=9))).tolist() == [9]
        palette = Image.new("P", (40, 30), 0)
        palette.putpalette([9, 9, 9] * 256)
        data = encoded(palette, transparency=0)
        assert np.unique(imaging.decode(data, signature(pad=33))).tolist() == [33]

    def test_a_range_other_than_bytes(self) -> None:
        white = encoded(Image.new("L", (8, 8), 255))
        wanted = signature(8, 8, "gray", range=(0.0, 16.0))
        assert np.unique(imaging.decode(white, wanted)).tolist() == [16]
        array = np.full((8, 8), 16, np.uint8)  # arrays are in the declared range already
        assert np.unique(imaging.decode(array, wanted)).tolist() == [16]

    @pytest.mark.parametrize("turn", range(1, 9))
    def test_upright(self, turn: int) -> None:
        image = picture(40, 30)
        exif = Image.Exif()
        exif[0x0112] = turn
        stored = image
        undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose that EXIF's own turn undoes
        if turn > 1:
            stored = image.transpose(Image.Transpose(undo[turn]))
        for form, tolerance in (("PNG", 0), ("JPEG", 12)):
            data = encoded(stored, form, exif=exif)
            placed = imaging.place(data, signature(30, 40))
            assert placed.size == (40, 30)
            np.testing.assert_allclose(
                placed.tensor.astype(int), np.asarray(image).astype(int), atol=tolerance
            )

    def test_a_large_jpeg_is_decoded_small_and_the_callers_image_is_not(self) -> None:
        data = encoded(picture(640, 480), "JPEG", quality=95)
        mine = Image.open(io.BytesIO(data))
        small = imaging.decode(data, signature(60, 80))
        full = imaging.decode(mine, signature(60, 80))
        assert mine.size == (640, 480)
        np.testing.assert_allclose(small.astype(int), full.astype(int), atol=6)
        np.testing.assert_array_equal(small, imaging.decode(data, signature(60, 80)))


class TestPlainJpeg:
    """A JPEG as cameras stream it skips `Image.open`; nothing else changes."""

    @given(
        st.integers(1, 90),
        st.integers(1, 90),
        st.sampled_from(("rgb", "bgr", "gray")),
        st.sampled_from(imaging.RESIZE_RULES),
        st.integers(0, 2),
        st.booleans(),
    )
    @settings(deadline=None, max_examples=150)
    def test_equal_to_the_long_way(
        self, width: int, height: int, color: str, rule: str, sampling: int, progressive: bool
    ) -> None:
        stream = io.BytesIO()
        picture(width, height).save(stream, "JPEG", quality=80, subsampling=sampling, progressive=progressive)
        wanted = signature(24, 32, color, rule)
        short = imaging.place(stream.getvalue(), wanted)
        longer = imaging.place(bytearray(stream.getvalue()), wanted)
        np.testing.assert_array_equal(short.tensor, longer.tensor)
        assert (short.scale, short.offset, short.size) == (longer.scale, longer.offset, longer.size)

    def test_one_picture_after_the_other(self) -> None:
        """They are decoded into the same memory."""
        data = [encoded(picture(64, 48, seed), "JPEG") for seed in (0, 90)]
        kept = [imaging.decode(part, signature()) for part in data]
        for part, before in zip(data, kept, strict=True):
            np.testing.assert_array_equal(before, imaging.decode(bytearray(part), signature()))

    @given(st.integers(2, 700), st.integers(0, 255))
    @settings(deadline=None, max_examples=150)
    def test_damage_is_told_as_ever(self, place: int, value: int) -> None:
        data = bytearray(encoded(picture(), "JPEG"))
        data[min(place, len(data) - 1)] = value

        def told(source: Any) -> Any:
            try:
                return imaging.decode(source, signature()).tolist()
            except ShoalError as error:
                return str(error)

        assert told(bytes(data)) == told(data)
        assert told(bytes(data[:place])) == told(data[:place])


class TestGeometry:
    @given(
        st.sampled_from(imaging.RESIZE_RULES),
        st.integers(1, 90),
        st.integers(1, 90),
        st.integers(1, 60),
        st.integers(1, 60),
        st.booleans(),
    )
    @settings(deadline=None, max_examples=150)
    def test_boxes_come_back(
        self, rule: str, width: int, height: int, wide: int, high: int, jpeg: bool
    ) -> None:
        source: Any = picture(width, height)
        if jpeg:
            source = encoded(source, "JPEG")
        placed = imaging.place(source, signature(high, wide, "rgb", rule))
        assert placed.tensor.shape == (high, wide, 3) and placed.size == (width, height)
        box = np.asarray([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]])
        np.testing.assert_allclose(placed.to_picture(placed.to_tensor(box)), box, atol=1e-6)
        whole = placed.to_picture(np.asarray([[-1e4, -1e4, 1e4, 1e4]]))
        np.testing.assert_allclose(whole, [[0, 0, width, height]])  # cut at the borders

    def test_a_square_is_found_where_it_was(self) -> None:
        image = Image.new("RGB", (200, 100))
        image.paste((255, 255, 255), (100, 20, 140, 60))
        for rule in imaging.RESIZE_RULES:
            placed = imaging.place(image, signature(80, 80, "rgb", rule, pad=0))
            y, x = np.nonzero(placed.tensor[..., 0] > 127)
            shares = np.asarray([[x.min() / 80, y.min() / 80, (x.max() + 1) / 80, (y.max() + 1) / 80]])
            np.testing.assert_allclose(placed.to_picture(shares), [[100, 20, 140, 60]], atol=2.6)

    def test_bars_have_the_declared_value(self) -> None:
        tensor = imaging.decode(Image.new("RGB", (64, 16)), signature(32, 32, "rgb", "letterbox", pad=77))
        assert np.unique(tensor[:11]).tolist() == [77] and np.unique(tensor[13:19]).tolist() == [0]

    def test_an_open_size_keeps_the_pictures(self) -> None:
        assert imaging.decode(picture(50, 40), signature(-1, -1, resize="")).shape == (40, 50, 3)


class TestRefusals:
    def test_without_a_rule_another_size_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="64x48, the model takes 32x24 and declares no resize rule"):
            imaging.decode(picture(), signature(resize=""))
        imaging.decode(picture(32, 24), signature(resize=""))

    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
    def test_truncated_files(self, form: str, tmp_path: Path) -> None:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8))
        data = encoded(noise, form)
        path = tmp_path / "half.img"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(InvalidInput, match=r"half\.img") as caught:
            imaging.decode(path, signature())
        assert str(tmp_path) not in str(caught.value)

    def test_no_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_text("hello")
        with pytest.raises(InvalidInput, match=r"a\.jpg is not a picture"):
            imaging.decode(tmp_path / "a.jpg", signature())
        with pytest.raises(InvalidInput, match="not a picture"):
            imaging.decode(b"", signature())
        with pytest.raises(InvalidInput, match="not a picture"):  # would start Ghostscript
            imaging.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", signature())
        with pytest.raises(NotFound, match=r"none\.jpg"):
            imaging.decode("none.jpg", signature())
        with pytest.raises(InvalidInput, match="cannot be read"):
            imaging.decode(tmp_path, signature())
        with pytest.raises(InvalidInput, match="int is no picture"):
            imaging.decode(5, signature())

    def test_a_decompression_bomb(self) -> None:
        def chunk(kind: bytes, body: bytes) -> bytes:
            crc = zlib.crc32(kind + body).to_bytes(4, "big")
            return len(body).to_bytes(4, "big") + kind + body + crc

        for side in (9_600, 20_000, 60_000):
            size = side.to_bytes(4, "big") * 2
            head = chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0]))
            bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000)))
            with pytest.raises(InvalidInput, match="million pixels"):
                imaging.decode(bomb, signature())

    @pytest.mark.parametrize(
        ("array", "color", "words"),
        [
            (np.zeros((3, 24, 32), np.uint8), "", "channels come last"),
            (np.zeros((24, 32, 3), np.float32), "", "float32"),
            (np.zeros((24, 32), np.uint8), "", "no rgb picture"),
            (np.zeros((24, 32, 3), np.uint8), "gray", "no gray picture"),
            (np.zeros((24, 32, 3), np.uint8), "yuv", "unknown"),
            (np.zeros((0, 32, 3), np.uint8), "", "empty"),
            (np.zeros((2, 24, 32, 3), np.uint8), "", "no rgb picture"),
        ],
    )
    def test_arrays(self, array: Array, color: str, words: str) -> None:
        with pytest.raises(InvalidInput, match=words):
            imaging.decode(array, signature(), color)

    def test_files_have_no_color_to_declare(self) -> None:
        with pytest.raises(InvalidInput, match="Only arrays"):
            imaging.decode(encoded(picture()), signature(), "bgr")

    def test_deep_values_that_are_not_sixteen_bits(self) -> None:
        with pytest.raises(InvalidInput, match="16 bit"):
            imaging.decode(Image.fromarray(np.full((24, 32), 0.5, np.float32)), signature())

    def test_models_that_take_no_pictures(self) -> None:
        floats = TensorSpec("x", "FP32", (-1, 24, 32, 3))
        vector = TensorSpec("x", "UINT8", (-1, 64))
        out = (TensorSpec("y", "FP32", (-1, 2)),)
        for spec, kind in ((floats, "image"), (vector, "image"), (floats, "tensor")):
            with pytest.raises(Unsupported, match="takes no pictures") as caught:
                imaging.decode(picture(), Signature((spec,), out, kind, "logits"))
            assert "UINT8" in caught.value.remedy

    @given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "GIF"]), st.integers(0, 400))
    @settings(deadline=None, max_examples=120)
    def test_damaged_bytes_never_raise_anything_else(self, noise: bytes, form: str, place: int) -> None:
        data = bytearray(encoded(picture(24, 16), form))
        data[place : place + len(noise)] = noise
        try:
            tensor = imaging.decode(bytes(data), signature())
        except ShoalError:
            return
        assert tensor.shape == (24, 32, 3)

    def test_without_pillow(self) -> None:
        code = (
            "import sys; sys.modules['PIL'] = None\n"
            "from shoal_agent import imaging\n"
            "from shoal_protos.bundle import Signature, TensorSpec\n"
            "s = Signature((TensorSpec('x', 'UINT8', (-1, 8, 8, 3)),), (), 'image')\n"
            "try: imaging.decode(b'', s)\n"
            "except Exception as error: print(type(error).__name__, error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "MissingExtra" in done.stdout and "pip install 'shoal[client]'" in done.stdout
