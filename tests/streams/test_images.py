"""Every image a user brings is read as uint8 RGB or refused in one clear line."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evolora.errors import DataError
from evolora.streams.images import random_resized_crop, read_image, resize_center_crop


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth large shapes plus noise, like a photo: not white noise, not flat."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + rng.integers(-12, 13, smooth.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def pixel(image: torch.Tensor, row: int = 0, column: int = 0) -> list[int]:
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return [int(value) for value in image[:, row, column]]


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    array = photo(6, 9)
    expected = torch.from_numpy(array).permute(2, 0, 1)
    path = tmp_path / "photo.png"
    Image.fromarray(array).save(path)
    data = path.read_bytes()
    sources = (
        *(path, str(path), data, bytearray(data), memoryview(data)),
        *(Image.open(path), Image.fromarray(array), array, expected, expected.numpy().copy()),
    )
    for source in sources[:-1]:
        assert torch.equal(read_image(source), expected), type(source)
    with pytest.raises(DataError, match=r"channels seem to come first: transpose"):
        read_image(sources[-1])


def test_palette_grey_and_one_bit_images_become_rgb() -> None:
    palette = Image.new("RGB", (4, 4), (200, 10, 60)).quantize(4)
    assert pixel(read_image(encode(palette))) == [200, 10, 60]
    assert pixel(read_image(encode(Image.new("L", (4, 4), 77)))) == [77, 77, 77]
    assert pixel(read_image(encode(Image.new("1", (4, 4), 1)))) == [255, 255, 255]


def test_cmyk_is_converted() -> None:
    image = read_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = pixel(image, 8, 8)
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = read_image(encode(Image.fromarray(values), kind))
    assert image[:, 0].tolist() == [[0, 1, 128, 255]] * 3


def test_thirty_two_bit_integers_outside_sixteen_bits_are_refused() -> None:
    values = Image.fromarray(np.array([[0, 70000]], dtype=np.int32))
    with pytest.raises(DataError, match="0 to 70000 do not fit 16 bits"):
        read_image(encode(values, "TIFF"))


def test_transparency_is_composited_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    image = read_image(encode(half))
    assert pixel(image, 0, 0) == [255, 0, 0]
    assert pixel(image, 0, 1) == [255, 255, 255]
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.info["transparency"] = 0
    assert pixel(read_image(encode(palette, transparency=0))) == [255, 255, 255]
    premultiplied = Image.new("LA", (2, 2), (100, 255)).convert("La")
    assert pixel(read_image(premultiplied)) == [100, 100, 100]
    grey = Image.new("LA", (2, 2), (0, 0))
    assert pixel(read_image(encode(grey))) == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    corner = np.zeros((16, 24, 3), dtype=np.uint8)
    corner[:8, :8] = 255  # top left is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = read_image(encode(Image.fromarray(corner), "PNG", exif=exif.tobytes()))
    rotated = orientation >= 5
    assert tuple(upright.shape) == ((3, 24, 16) if rotated else (3, 16, 24))
    at = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    bright = {
        (row, column): pixel(upright, -row, -column)[0] for row in (0, 1) for column in (0, 1)
    }
    assert bright == {place: 255 * (place == at[orientation]) for place in bright}


def test_unreadable_exif_is_ignored() -> None:
    data = encode(Image.new("RGB", (8, 8), (50, 60, 70)), "JPEG", exif=b"Exif\0\0garbage!!")
    assert tuple(read_image(data).shape) == (3, 8, 8)


def test_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (5, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(read_image(data)) == [255, 0, 0]


def test_one_pixel_image() -> None:
    assert read_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1]], [[2]], [[3]]]


def test_hundred_megapixels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (10_000, 10_000), (90, 120, 30)).save(path, quality=50)
    image = read_image(path)
    assert image.shape[1] == image.shape[2] == 1250  # decoded at one eighth
    assert abs(pixel(image)[1] - 120) <= 3
    png = tmp_path / "large.png"
    Image.new("L", (10_000, 10_000), 55).save(png, compress_level=1)
    full = read_image(png)
    assert tuple(full.shape) == (3, 10_000, 10_000)
    assert pixel(resize_center_crop(full, 32), 7, 9) == [55, 55, 55]


def test_long_narrow_jpeg_keeps_its_short_side() -> None:
    data = encode(Image.new("RGB", (30_000, 600), (90, 120, 30)), "JPEG")
    assert tuple(read_image(data).shape) == (3, 600, 30_000)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def refused(source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_image(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_that_are_not_there_or_not_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    assert refused(missing) == f"cannot read image {str(missing)!r}: no such file"
    assert "it is a folder" in refused(tmp_path)
    empty = tmp_path / "empty.png"
    empty.touch()
    assert refused(empty) == f"cannot read image {str(empty)!r}: it is empty"
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert "not a regular file" in refused(pipe)
    assert "not fetched" in refused("https://example.org/cat.png")
    assert "null" in refused("nul\0.png")
    assert "too long" in refused("x" * 5000).lower()
    assert "folder" in refused("")


def test_files_that_are_not_images(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("hello, I am text", encoding="utf-8")
    message = refused(text)
    assert str(text) in message and "not an image in a known format" in message
    assert "not an image" in refused(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert "not an image" in refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "it is empty" in refused(b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_refused_at_every_length(kind: str, tmp_path: Path) -> None:
    data = encode(Image.fromarray(photo(40, 40)), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    for cut in (4, 12, 30, len(data) // 3, len(data) // 2):
        path.write_bytes(data[:cut])
        assert str(path) in refused(path)


def test_permission_denied_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(Image.new("RGB", (2, 2))))
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything: stand in for the system's refusal

        def deny(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_bytes", deny)
    assert refused(path) == f"cannot read image {str(path)!r}: permission denied"


@pytest.mark.parametrize("size", [(15_000, 15_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_before_decoding(size: tuple[int, int]) -> None:
    message = refused(png_header(*size))
    assert "more than the limit of 178,956,970 pixels" in message


def test_pil_image_of_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(encode(Image.fromarray(photo(40, 40)))[:600])
    with Image.open(path) as lazy:
        assert str(path) in refused(lazy)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "NoneType: expected a file name"),
        (7, "from int"),
        ([], "one at a time"),
        (["a.png"], "one at a time"),
        (np.zeros((4, 4, 3)), "in [0, 1], multiply by 255"),
        (np.zeros((4, 4, 3), dtype=np.int64), "expected uint8 values 0 to 255"),
        (np.zeros((4, 4, 3), dtype=bool), "expected uint8"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "at least 1 x 1"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "1 | 3 | 4"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "looks like a batch"),
        (np.zeros(4, dtype=np.uint8), "expected (height, width)"),
        (torch.rand(3, 4, 4), "in [0, 1], multiply by 255"),
        (torch.zeros(5, 4, 3, dtype=torch.uint8), "channels seem to come last"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "looks like a batch"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), "at least 1 x 1"),
    ],
)
def test_wrong_types_shapes_and_dtypes(source: Any, says: str) -> None:
    assert says in refused(source)


def test_float_image_files_are_refused() -> None:
    image = Image.fromarray(np.zeros((2, 2), dtype=np.float32))
    assert "no agreed range" in refused(encode(image, "TIFF"))


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (97, 301), (480, 333), (30, 41), (224, 90)]
)
@pytest.mark.parametrize("size", [64, 224])
def test_center_crop_is_within_one_grey_level_of_clips_processor(
    height: int, width: int, size: int
) -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    array = photo(height, width, seed=height)
    expected = processor(
        Image.fromarray(array), do_rescale=False, do_normalize=False, return_tensors="pt"
    )["pixel_values"][0]
    ours = resize_center_crop(torch.from_numpy(array).permute(2, 0, 1), size)
    off = (ours.int() - expected.int()).abs()
    by_pil = size >= min(height, width) or height > 2 * width
    assert off.max() <= (0 if by_pil else 1)
    assert (off > 0).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5001, 1), (3, 4000), (2, 2), (1, 9)])
def test_center_crop_of_extreme_shapes_stays_centered(shape: tuple[int, int]) -> None:
    height, width = shape
    ramp = torch.linspace(0, 255, max(shape)).round().to(torch.uint8)
    image = (ramp[None] if width >= height else ramp[:, None]).expand(3, height, width)
    crop = resize_center_crop(image, 32)
    assert tuple(crop.shape) == (3, 32, 32)
    if max(shape) > 1000:
        middle = float(crop[:, 15:17, 15:17].float().mean())
        assert abs(middle - 127.5) < 2


def test_shrinking_is_off_by_two_grey_levels_in_millionths_only() -> None:
    """Waves and ramps, whose rounding errors line up, are the worst case for 16-bit weights."""
    rows, columns = np.mgrid[:700, :700]
    total = two = 0
    for size in (350, 411, 500, 699):
        for slope in (0.3, 0.77, 1.9):
            wave = 127.5 + 127.5 * np.sin(slope * columns + 0.2 * rows)
            ramp = (slope * columns + 0.4 * rows) % 256
            array = np.stack([wave, ramp, photo(700, 700)[:, :, 0]], axis=-1).astype(np.uint8)
            pil = Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC)
            ours = resize_center_crop(torch.from_numpy(array).permute(2, 0, 1), size)
            off = (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(pil)).int()).abs()
            assert off.max() <= 2
            total, two = total + off.numel(), two + int((off > 1).sum())
    assert two < 2e-5 * total


def test_an_rgb_tensor_of_the_right_size_is_neither_copied_nor_resized() -> None:
    image = torch.from_numpy(photo(64, 64)).permute(2, 0, 1).contiguous()
    assert read_image(image).data_ptr() == image.data_ptr()
    assert resize_center_crop(read_image(image), 64).data_ptr() == image.data_ptr()


def test_memory_layout_does_not_change_a_crop() -> None:
    interleaved = torch.from_numpy(photo(90, 120)).permute(2, 0, 1)
    planar = interleaved.contiguous()
    assert interleaved.stride() != planar.stride()
    assert torch.equal(resize_center_crop(interleaved, 48), resize_center_crop(planar, 48))
    crops = [
        random_resized_crop(image, 48, torch.Generator().manual_seed(2))
        for image in (interleaved, planar)
    ]
    assert torch.equal(*crops)
    assert all(crop.is_contiguous() for crop in crops)


def test_bilinear_differs_from_bicubic() -> None:
    image = torch.from_numpy(photo(50, 70)).permute(2, 0, 1)
    bicubic, bilinear = resize_center_crop(image, 24), resize_center_crop(image, 24, "bilinear")
    assert not torch.equal(bicubic, bilinear)
    assert int((bicubic.int() - bilinear.int()).abs().max()) < 40


def test_crops_refuse_other_tensors() -> None:
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(DataError, match="expected a uint8 image"):
            resize_center_crop(wrong, 4)
        with pytest.raises(DataError, match="expected a uint8 image"):
            random_resized_crop(wrong, 4, torch.Generator())


def test_random_crop_repeats_with_its_generator_and_varies_without() -> None:
    image = torch.from_numpy(photo(60, 80)).permute(2, 0, 1)

    def crops(seed: int) -> list[torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return [random_resized_crop(image, 16, rng, scale=(0.3, 0.8)) for _ in range(3)]

    first, again, other = crops(1), crops(1), crops(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_random_boxes_keep_to_scale_and_ratio() -> None:
    from evolora.streams.images import _random_box

    rng = torch.Generator().manual_seed(0)
    shares, aspects = [], []
    for _ in range(500):
        top, left, height, width = _random_box(torch.Size((300, 400)), rng, (0.2, 0.5), (0.5, 2.0))
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        shares.append(height * width / 120_000)
        aspects.append(width / height)
    assert 0.19 < min(shares) < 0.23 and 0.47 < max(shares) < 0.51
    assert 0.49 < min(aspects) < 0.56 and 1.8 < max(aspects) < 2.02
    # Ten draws at 90 % of the area cannot fit this one: the centered fall-back.
    assert _random_box(torch.Size((10, 100)), rng, (0.9, 1.0), (3 / 4, 4 / 3)) == (0, 43, 10, 13)


def test_random_crop_of_one_pixel() -> None:
    image = torch.full((3, 1, 1), 9, dtype=torch.uint8)
    crop = random_resized_crop(image, 8, torch.Generator().manual_seed(3))
    assert crop.unique().tolist() == [9] and tuple(crop.shape) == (3, 8, 8)
