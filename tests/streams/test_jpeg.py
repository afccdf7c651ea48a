"""JPEGs give the same pixels, and the same refusals, whichever library decodes them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.streams.test_images import encode, photo
from torch import Tensor

from evolora.doctor import examine
from evolora.errors import DataError
from evolora.streams import decoding
from evolora.streams.images import read_image, resize_center_crop

needs_library = pytest.mark.skipif(
    decoding.jpeg_library() is None, reason="simplejpeg is not installed"
)


def read_by_pil(source: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "jpeg_library", lambda: None)
        return read_image(source)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the files that simplejpeg has decoded."""
    lengths: list[int] = []
    original = decoding._fast_jpeg

    def spy(image: Image.Image, encoded: bytes) -> Any:
        pixels = original(image, encoded)
        if pixels is not None:
            lengths.append(len(encoded))
        return pixels

    monkeypatch.setattr(decoding, "_fast_jpeg", spy)
    return lengths


def jpeg(mode: str = "RGB", size: tuple[int, int] = (61, 83), **options: Any) -> bytes:
    return encode(Image.fromarray(photo(*size)).convert(mode), "JPEG", **options)


def multi_picture() -> bytes:
    frames = [Image.fromarray(photo(40, 56, seed)) for seed in (1, 2)]
    return encode(frames[0], "MPO", save_all=True, append_images=frames[1:])


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(exif=exif.tobytes())


def real_photos() -> list[Path]:
    import matplotlib

    found = [Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]
    try:
        import sklearn.datasets
    except ImportError:
        return found
    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [*found, folder / "china.jpg", folder / "flower.jpg"]


PLAIN = {
    "baseline": lambda: jpeg(),
    "progressive": lambda: jpeg(progressive=True),
    "grey": lambda: jpeg("L"),
    "quality-5": lambda: jpeg(quality=5),
    "4:4:4": lambda: jpeg(subsampling=0),
    "4:2:2": lambda: jpeg(subsampling=1),
    "restart-markers": lambda: jpeg(restart_marker_blocks=2),
    "stored-as-rgb": lambda: jpeg(keep_rgb=True),
    "one-pixel": lambda: jpeg(size=(1, 1)),
    "several-pictures": multi_picture,
    **{f"orientation-{value}": lambda value=value: oriented(value) for value in range(10)},
}


@needs_library
@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_plain_jpegs_are_decoded_fast_to_the_pixels_of_pil(
    make: Callable[[], bytes], decoded: list[int]
) -> None:
    data = make()
    fast = read_image(data)
    assert decoded == [len(data)]
    assert torch.equal(fast, read_by_pil(data))


@needs_library
@pytest.mark.parametrize("path", real_photos(), ids=lambda path: path.name)
def test_real_photos_are_decoded_to_the_pixels_of_pil(path: Path, decoded: list[int]) -> None:
    assert torch.equal(read_image(path), read_by_pil(path))
    assert len(decoded) == 1


@pytest.mark.parametrize("mode", ["CMYK", "YCCK"])
def test_four_channels_are_left_to_pil(mode: str, decoded: list[int]) -> None:
    data = bytearray(jpeg("CMYK"))
    if mode == "YCCK":
        marker = data.index(b"Adobe")  # its last byte names the transform: 0 none, 2 YCCK
        data[marker + 11] = 2
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(read_image(bytes(data)).permute(1, 2, 0).numpy(), expected)
    assert not decoded


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_jpeg_is_refused_in_the_same_words(share: float) -> None:
    data = jpeg()
    cut = data[: int(share * len(data))]
    messages = []
    for read in (read_image, read_by_pil):
        with pytest.raises(DataError) as caught:
            read(cut)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_damage_makes_no_difference_between_the_libraries() -> None:
    """Random bytes changed: both read the same pixels or both give the same reason."""

    def outcome(read: Callable[[Any], Tensor], data: bytes) -> Tensor | str:
        try:
            return read(data)
        except DataError as error:
            return str(error)

    rng = np.random.default_rng(0)
    data, refused = jpeg(), 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[int(rng.integers(2, len(data)))] = int(rng.integers(256))
        fast, slow = (outcome(read, bytes(damaged)) for read in (read_image, read_by_pil))
        if isinstance(fast, str) or isinstance(slow, str):
            assert fast == slow
            refused += 1
        else:
            assert torch.equal(fast, slow)
    assert 0 < refused < 150


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("path", real_photos(), ids=lambda path: path.name)
def test_a_real_photo_ends_within_one_grey_level_of_clips_processor(path: Path, size: int) -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    with Image.open(path) as image:
        expected = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    ours = resize_center_crop(read_image(path), size).int()
    off = (ours - expected["pixel_values"][0].int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.01


def test_doctor_names_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> dict[str, Any]:
        return next(found for found in examine() if found["name"] == "image loading")

    assert finding()["ok"] is (decoding.jpeg_library() is not None)
    monkeypatch.setattr(decoding, "jpeg_library", lambda: None)
    assert finding()["optional"] and "evolora[fast-images]" in finding()["detail"]
