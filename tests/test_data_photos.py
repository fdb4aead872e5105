"""Every kind of photo becomes upright RGB, every damaged one a sentence."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from fieldmark.data.photos import load_square, open_photo
from fieldmark.errors import FieldmarkError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(ref, place=(0, 0)):
    photo = open_photo(ref)
    assert photo.mode == "RGB"
    return photo.getpixel(place)


def near(found, expected, tolerance=3):
    return all(abs(one - other) <= tolerance for one, other in zip(found, expected))


def quarters():
    """Red, green / blue, white quarters, 40 x 20."""
    values = np.zeros((20, 40, 3), np.uint8)
    values[:10, :20], values[:10, 20:], values[10:, :20], values[10:, 20:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    return Image.fromarray(values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = quarters().transpose(undo[orientation]) if orientation in undo else quarters()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = open_photo(encoded(stored, exif=exif))
    assert photo.size == (40, 20)
    np.testing.assert_array_equal(np.asarray(photo), np.asarray(quarters()))


def test_modes(tmp_path):
    red = Image.new("RGB", (4, 4), (200, 30, 40))
    assert near(pixel(encoded(red.convert("CMYK"), "JPEG", quality=95)), (200, 30, 40), 12)
    assert near(pixel(encoded(red.convert("P", palette=Image.Palette.ADAPTIVE))), (200, 30, 40))
    assert pixel(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert pixel(Image.new("HSV", (2, 2), (0, 0, 128))) == (128, 128, 128)
    path = tmp_path / "red.webp"
    red.save(path, lossless=True)
    assert pixel(path) == pixel(str(path)) == (200, 30, 40)


def test_transparency_is_laid_over_white():
    assert pixel(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))) == (255, 255, 255)
    assert near(pixel(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))), (255, 127, 127))
    assert pixel(encoded(Image.new("LA", (2, 2), (10, 0)))) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    assert pixel(encoded(palette, transparency=0)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled_by_their_range(kind):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    photo = np.asarray(open_photo(encoded(Image.fromarray(values), kind)))
    np.testing.assert_array_equal(photo[0], np.repeat([[0], [1], [128], [255]], 3, axis=1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0, 200]], np.int32), [0, 200]),
        (np.array([[-5, 1000000]], np.int32), [0, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 100.0, 255.0]], np.float32), [0, 100, 255]),
    ],
)
def test_deep_greys(values, expected):
    photo = np.asarray(open_photo(encoded(Image.fromarray(values), "TIFF")))
    assert photo[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixel(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (37, 53), (64, 64)])
def test_load_square_takes_the_whole_photo(size):
    assert load_square(Image.new("RGB", size, "red"), 64).size == (64, 64)
    halves = Image.new("RGB", (100, 20), "red")
    halves.paste("blue", (50, 0, 100, 20))
    square = load_square(halves, 16)
    assert square.getpixel((0, 8)) == (255, 0, 0)
    assert square.getpixel((15, 8)) == (0, 0, 255)
    with pytest.raises(FieldmarkError, match="resolution 0"):
        load_square(halves, 0)


def test_aviary_uri_is_drawn():
    from fieldmark.data.aviary import aviary_rows

    row = aviary_rows("test", 1)[0]
    np.testing.assert_array_equal(np.asarray(open_photo(row["image"])), np.asarray(open_photo(row["image"])))
    assert open_photo(row["image"]).mode == "RGB"
    with pytest.raises(FieldmarkError, match="aviary://test/none/0"):
        open_photo("aviary://test/none/0 ")


def noise_png():
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)))


def bomb(width, height):
    """A PNG of a hundred bytes that claims this size."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (b"<html>404</html>", "not an image"),
        (noise_png()[:2000], "truncated"),
        (encoded(quarters(), "JPEG")[:400], "[Tt]runcated"),
        (noise_png()[:60], "cannot read"),
        (bomb(60000, 60000), "bomb"),
    ],
)
def test_damaged_files_name_file_and_reason(tmp_path, content, reason):
    path = tmp_path / "bad photo.png"
    path.write_bytes(content)
    for ref in (path, str(path)):
        with pytest.raises(FieldmarkError, match=reason) as caught:
            open_photo(ref)
        assert "bad photo.png" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FieldmarkError, match=f"{len(content)} bytes.*{reason}|{reason}.*{len(content)} bytes"):
        open_photo(content)


def test_too_many_pixels_are_refused_before_decoding():
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(FieldmarkError, match=r"12000 x 10000 pixels are more than"),
    ):
        open_photo(bomb(12000, 10000))


def test_random_damage_never_raises_anything_else():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encoded(quarters(), kind)
        for _ in range(60):
            content = bytearray(whole)
            for place in rng.integers(0, len(content), 8):
                content[place] = rng.integers(0, 256)
            try:
                mode = open_photo(bytes(content)).mode
            except FieldmarkError as error:
                mode = "RGB" if "cannot read" in str(error) else str(error)
            assert mode == "RGB"


@pytest.mark.parametrize(
    ("ref", "reason"),
    [("gone.jpg", "no such file"), ("", "directory"), ("a\0b", "no such file"), ("x" * 5000, "too long")],
)
def test_missing_files_and_directories(tmp_path, ref, reason):
    with pytest.raises(FieldmarkError, match=reason):
        open_photo(str(tmp_path / ref))


@pytest.mark.parametrize("ref", [None, 3, np.zeros((4, 4, 3))])
def test_other_types_are_refused(ref):
    with pytest.raises(FieldmarkError, match="expected a path"):
        open_photo(ref)


def test_a_given_image_is_not_changed():
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    open_photo(image)
    assert image.mode == "RGBA"
    rgb = Image.new("RGB", (3, 3))
    open_photo(rgb).putpixel((0, 0), (9, 9, 9))
    assert rgb.getpixel((0, 0)) == (0, 0, 0)
