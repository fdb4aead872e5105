"""Every kind of photo becomes upright sRGB, every damaged one a sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fieldmark.data import photos
from fieldmark.data.photos import load_square, open_photo, photo_fault
from fieldmark.errors import FieldmarkError
from helpers_photos import (
    JPEG,
    PNG,
    PROGRESSIVE,
    curve,
    encoded,
    fixed,
    icc_profile,
    make_hostile,
    png,
    rgb_profile,
    scene,
    tiff,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of damage that we raise for, or overlook on purpose
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (9, 7, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (9, 7, 1), np.uint8)
# XYZ (D50) of red, green and blue: the ICC's own sRGB, Adobe RGB (1998), Display P3
SRGB = [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]]
ADOBE = [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
P3 = [[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]]


def pixels(ref) -> np.ndarray:
    photo = open_photo(ref)
    assert photo.mode == "RGB"
    assert type(photo) is Image.Image, "tied to no file"
    return np.asarray(photo).astype(int)


def assert_near(found, expected, tolerance):
    found, expected = np.broadcast_arrays(found, np.asarray(expected))
    assert np.abs(found - expected).max() <= tolerance


# -- kinds of pixels: references are formulas over the values that were written


def over_white(colours, alpha):
    share = alpha / 255
    return colours * share + 255 * (1 - share)


def from_cmyk(values):
    ink = values.astype(float) / 255
    return 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


def flat_cmyk():
    """Blocks of 16 x 16 pixels, so that JPEG keeps their colours."""
    return np.kron(RNG.integers(0, 256, (4, 4, 4), np.uint8), np.ones((16, 16, 1), np.uint8))


def ycck_jpeg(values):
    """A JPEG of Adobe's YCCK: what is stored is YCbCr of cyan, magenta and yellow as if they were R, G, B (a decoder
    inverts them, and Adobe had them inverted before), and inverted black."""
    inks = values.astype(float)
    r, g, b = (inks[..., channel] for channel in range(3))
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    stored = np.stack([luma, 128 + 0.564 * (b - luma), 128 + 0.713 * (r - luma), 255 - inks[..., 3]], axis=-1)
    stored = 255 - np.rint(stored).clip(0, 255).astype(np.uint8)  # Pillow inverts what it is given as CMYK
    data = encoded(Image.frombytes("CMYK", values.shape[1::-1], stored.tobytes()), "JPEG", quality=100, subsampling=0)
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    return data[:place] + b"\x02" + data[place + 1 :]


DEEP = RNG.integers(0, 65536, (9, 7, 3), np.uint16)
DEEP_ALPHA = RNG.integers(0, 65536, (9, 7, 1), np.uint16)
GREY = COLOURS[..., :1]
CMYK = RNG.integers(0, 256, (9, 7, 4), np.uint8)
FLAT = flat_cmyk()
PALETTE = RNG.integers(0, 256, (16, 3), np.uint8)
INDICES = RNG.integers(0, 16, (9, 7), np.uint8)


def palette_image():
    image = Image.fromarray(INDICES, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def cmyk_image(values):
    return Image.frombytes("CMYK", values.shape[1::-1], values.tobytes())


KINDS = {
    "grey": (encoded(Image.fromarray(GREY[..., 0])), GREY, 0),
    "grey JPEG": (encoded(Image.new("L", (16, 16), 77), "JPEG", quality=95), [77] * 3, 1),
    "one bit": (encoded(Image.fromarray(INDICES < 8)), 255 * (INDICES[..., None] < 8), 0),
    "palette": (encoded(palette_image()), PALETTE[INDICES], 0),
    "palette GIF": (encoded(palette_image(), "GIF"), PALETTE[INDICES], 0),
    "palette, one entry transparent": (
        encoded(palette_image(), transparency=3),
        np.where(INDICES[..., None] == 3, 255, PALETTE[INDICES]),
        0,
    ),
    "palette, alpha per entry": (
        encoded(palette_image(), transparency=bytes(range(0, 256, 16))),
        over_white(PALETTE[INDICES], 16.0 * INDICES[..., None]),
        1,
    ),
    "grey and alpha": (encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")), over_white(GREY, ALPHA), 1),
    "RGBA": (encoded(Image.fromarray(np.dstack([COLOURS, ALPHA]))), over_white(COLOURS, ALPHA), 1),
    "RGBA WebP": (
        encoded(Image.fromarray(np.dstack([COLOURS, ALPHA])), "WEBP", lossless=True, exact=True),
        over_white(COLOURS, ALPHA),
        1,
    ),
    "RGB, one colour transparent": (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)), [255] * 3, 0),
    "16-bit grey PNG": (png(DEEP[..., :1], 0), DEEP[..., :1] / 257, 0.5),
    "16-bit grey TIFF": (encoded(Image.fromarray(DEEP[..., 0]), "TIFF"), DEEP[..., :1] / 257, 0.5),
    "16-bit RGB PNG": (png(DEEP, 2), DEEP / 257, 1),
    "16-bit RGB TIFF": (tiff(DEEP), DEEP / 257, 1),
    "16-bit RGBA PNG": (png(np.dstack([DEEP, DEEP_ALPHA]), 6), over_white(DEEP / 257, DEEP_ALPHA / 257), 2),
    "CMYK TIFF": (encoded(cmyk_image(CMYK), "TIFF"), from_cmyk(CMYK), 1),
    "CMYK JPEG, inverted by Adobe": (
        encoded(cmyk_image(FLAT), "JPEG", quality=100, subsampling=0),
        from_cmyk(FLAT),
        3,
    ),
    "YCCK JPEG": (ycck_jpeg(FLAT), from_cmyk(FLAT), 5),
    "BMP": (encoded(Image.fromarray(COLOURS), "BMP"), COLOURS, 0),
    "PPM": (encoded(Image.fromarray(COLOURS), "PPM"), COLOURS, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pixels(kind):
    data, expected, tolerance = KINDS[kind]
    assert_near(pixels(data), expected, tolerance)
    assert photo_fault(data) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 65535], [0, 255]),
        ([0, 200], [0, 200]),
        ([-5, 1000000], [0, 255]),
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([np.nan, 100.0, 255.0], [0, 100, 255]),
    ],
)
def test_32_bit_greys(values, expected):
    kind = np.float32 if isinstance(values[0], float) else np.int32
    found = pixels(encoded(Image.fromarray(np.array([values] * 2, kind)), "TIFF"))
    assert found[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_first_frame_of_several(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert_near(pixels(data), (255, 0, 0), 1)


def test_colour_modes_of_a_given_image():
    assert pixels(Image.new("HSV", (2, 2), (0, 0, 128)))[0, 0].tolist() == [128] * 3
    assert pixels(Image.new("YCbCr", (2, 2), (90, 128, 128)))[0, 0].tolist() == [90] * 3
    assert pixels(Image.new("RGBa", (2, 2), (0, 0, 0, 0)))[0, 0].tolist() == [255] * 3


# -- EXIF: references are index maps of arrays

EXACT: dict[str, dict[str, object]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
STORED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: seen[::-1, ::-1].swapaxes(0, 1),
    8: lambda seen: np.rot90(seen, -1),
}


def rotated(kind, orientation, seen, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation](seen))), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_undone(orientation, kind):
    seen = np.asarray(scene(40, 24))
    found = pixels(rotated(kind, orientation, seen, **EXACT.get(kind, {})))
    assert found.shape == seen.shape
    assert_near(found, seen, 4 if kind == "JPEG" else 0)


def test_rotation_by_xmp():
    seen = np.asarray(scene(40, 24))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert_near(pixels(encoded(Image.fromarray(STORED[6](seen).copy()), "JPEG", **EXACT["JPEG"], xmp=xmp)), seen, 4)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + b"II*\0\x08\0\0\0\xff" * 9]
)
def test_damaged_exif_is_no_rotation(exif):
    assert_near(
        pixels(encoded(scene(), "JPEG", exif=exif)), np.asarray(Image.open(io.BytesIO(encoded(scene(), "JPEG")))), 0
    )


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_none(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_near(pixels(encoded(scene(), exif=exif)), np.asarray(scene()), 0)


# -- ICC profiles: references are the formulas of the colour spaces


def srgb_curve(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def to_srgb(values, colorants, gamma):
    xyz = (values / 255.0) ** gamma @ np.array(colorants)
    return srgb_curve(xyz @ np.linalg.inv(np.array(SRGB)))


@pytest.mark.parametrize(("colorants", "gamma"), [(ADOBE, 563 / 256), (P3, 2.2), (SRGB, 1.0)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_of_a_profile_become_srgb(kind, colorants, gamma):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(COLOURS), kind, icc_profile=rgb_profile(colorants, gamma), **options)
    assert_near(pixels(data), to_srgb(COLOURS, colorants, gamma), 2)
    assert np.abs(COLOURS - to_srgb(COLOURS, colorants, gamma)).max() > 10, "the profile matters"


def test_a_profile_of_greys_and_one_under_transparency():
    grey = icc_profile(b"GRAY", {b"kTRC": curve(1.5), b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)})
    assert_near(pixels(encoded(Image.fromarray(GREY[..., 0]), icc_profile=grey)), srgb_curve((GREY / 255) ** 1.5), 2)
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    expected = over_white(to_srgb(COLOURS, ADOBE, 2.2), ALPHA)
    assert_near(pixels(encoded(image, icc_profile=rgb_profile(ADOBE, 2.2))), expected, 3)


def test_a_profile_of_inks():
    """Inks of a table of 16 corners: only black darkens, so the colours are greys of that lightness."""
    corners = [(255 if index & 1 == 0 else 64, 128, 128) for index in range(16)]  # the last ink is black; L, a, b
    table = bytes(value for corner in corners for value in corner)
    identity = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + b"".join(
        int(65536 * (row == column)).to_bytes(4, "big") for row in range(3) for column in range(3)
    ) + identity * 4 + table + identity * 3  # fmt: skip
    profile = icc_profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, b"Lab ")
    values = np.zeros((4, 4, 4), np.uint8)
    values[..., 0] = 255
    values[:2, :, 3] = 255
    found = pixels(encoded(cmyk_image(values), "TIFF", icc_profile=profile))
    naive = pixels(encoded(cmyk_image(values), "TIFF"))
    assert naive[3, 0].tolist() == [0, 255, 255]
    assert_near(found[2:], 255, 1)
    assert found[:2].std(axis=-1).max() <= 1
    assert found[:2].max() < 100


@pytest.mark.parametrize(
    "profile",
    [b"x", b"x" * 5000, rgb_profile(P3, 2.2)[:200], icc_profile(b"GRAY", {b"kTRC": curve(1.0)}), b"\0" * 128],
)
def test_profiles_that_cannot_be_used_are_left_aside(profile):
    assert_near(pixels(encoded(Image.fromarray(COLOURS), icc_profile=profile)), COLOURS, 0)


def test_srgb_profiles_of_any_maker_cost_nothing():
    from PIL import ImageCms

    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert photos._transform_to_srgb(own, "RGB") is None
    assert photos._transform_to_srgb(rgb_profile(P3, 2.2), "RGB") is not None
    assert_near(pixels(encoded(Image.fromarray(COLOURS), icc_profile=own)), COLOURS, 0)


# -- where a photo lies


def test_the_ending_and_what_follows_do_not_matter(tmp_path):
    for name, data in (
        ("a.png", JPEG),
        ("b.jpg", PNG),
        ("c", PROGRESSIVE),
        ("d.txt", JPEG + b"PK\x03\x04" + bytes(999)),
    ):
        (tmp_path / name).write_bytes(data)
        expected = np.asarray(Image.open(io.BytesIO(data)))
        for ref in (tmp_path / name, str(tmp_path / name), data):
            assert_near(pixels(ref), expected, 0)


def test_tar_uris_read_exactly_their_bytes(tmp_path):
    archive = tmp_path / "shard #1,2.tar"
    archive.write_bytes(b"x" * 512 + PNG + JPEG + b"y" * 100)
    uri = f"tar://{archive}#{512 + len(PNG)},{len(JPEG)}"
    assert_near(pixels(uri), np.asarray(Image.open(io.BytesIO(JPEG))), 0)
    assert pixels(f"tar://{archive}#512,{len(PNG)}").shape == (40, 60, 3)
    for wrong, reason in (
        (f"tar://{archive}#{512 + len(PNG)},{len(JPEG) - 1}", "truncated"),
        (f"tar://{archive}#513,{len(PNG)}", "not an image"),
        (f"tar://{archive}#512,99999999999999", "the archive has"),
        (f"tar://{archive}#512", "expected tar://"),
        (f"tar://{archive}.gone#0,9", "no such file"),
        (f"tar://{tmp_path}#0,9", "directory"),
    ):
        with pytest.raises(FieldmarkError, match=reason) as caught:
            open_photo(wrong)
        assert wrong in str(caught.value)
        assert photo_fault(wrong) in str(caught.value)


def test_aviary_uri_is_drawn():
    from fieldmark.data.aviary import aviary_rows

    row = aviary_rows("test", 1)[0]
    np.testing.assert_array_equal(pixels(row["image"]), pixels(row["image"]))
    assert photo_fault(row["image"]) is None
    with pytest.raises(FieldmarkError, match="aviary://test/none/0"):
        open_photo("aviary://test/none/0 ")
    assert "aviary://test/none/0" in photo_fault("aviary://test/none/0 ")


def test_hostile_files_name_file_and_reason_and_the_check_agrees(tmp_path):
    reasons = make_hostile(tmp_path)
    for path, reason in reasons.items():
        for ref in (path, Path(path)):
            with pytest.raises(FieldmarkError, match=f"cannot read the photo .*({reason})") as caught:
                open_photo(ref)
            assert Path(path).name in str(caught.value)
            assert "\n" not in str(caught.value)
        assert photo_fault(path) in str(caught.value)


@pytest.mark.parametrize(("ref", "reason"), [("", "directory"), ("a\0b", "no such file"), ("x" * 5000, "too long")])
def test_names_that_no_file_has(tmp_path, ref, reason):
    with pytest.raises(FieldmarkError, match=reason):
        open_photo(str(tmp_path / ref))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(PNG)
    if os.getuid() == 0:  # root may read everything

        def refused(path, mode):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(photos, "open", refused, raising=False)
    else:
        (tmp_path / "secret.png").chmod(0)
    with pytest.raises(FieldmarkError, match=r"secret\.png: permission denied"):
        open_photo(tmp_path / "secret.png")


@pytest.mark.parametrize("ref", [None, 3, np.zeros((4, 4, 3))])
def test_other_types_are_refused(ref):
    with pytest.raises(FieldmarkError, match="expected a path"):
        open_photo(ref)


def test_a_given_image_is_not_changed():
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    open_photo(image)
    assert image.mode == "RGBA"
    rgb = Image.new("RGB", (3, 3))
    for photo in (open_photo(rgb), load_square(rgb, 3)):
        photo.putpixel((0, 0), (9, 9, 9))
    assert rgb.getpixel((0, 0)) == (0, 0, 0)
    opened = Image.open(io.BytesIO(JPEG))
    load_square(opened, 16, fast=True)
    assert opened.size == (333, 201)


# -- the square


@pytest.mark.parametrize("size", [(2, 300), (300, 2), (2, 2), (37, 53), (64, 64)])
def test_load_square_takes_the_whole_photo(size):
    assert load_square(Image.new("RGB", size, "red"), 64).size == (64, 64)
    halves = Image.new("RGB", (100, 20), "red")
    halves.paste("blue", (50, 0, 100, 20))
    square = load_square(halves, 16)
    assert square.getpixel((0, 8)) == (255, 0, 0)
    assert square.getpixel((15, 8)) == (0, 0, 255)
    with pytest.raises(FieldmarkError, match="resolution 0"):
        load_square(halves, 0)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((447, 900), (447, 900)), ((448, 448), (224, 224)), ((895, 1800), (448, 900)), ((896, 1000), (224, 250)),
     ((1797, 1793), (225, 225)), ((4000, 3000), (500, 375))],
)  # fmt: skip
def test_fast_decoding_begins_at_twice_the_side_and_stays_close(size, decoded, monkeypatch):
    seen = []
    whole = photos._to_rgb
    monkeypatch.setattr(photos, "_to_rgb", lambda image: seen.append(image.size) or whole(image))
    data = encoded(scene(*size), "JPEG", quality=95)
    fast, full = load_square(data, 224, fast=True), load_square(data, 224)
    assert seen == [decoded, size]
    assert fast.size == full.size == (224, 224)
    assert_near(np.asarray(fast).astype(int), np.asarray(full), 0 if decoded == size else 6)


@pytest.mark.parametrize("orientation", STORED)
def test_fast_decoding_keeps_photos_upright(orientation):
    seen = np.asarray(scene(333, 201))
    fast = load_square(rotated("JPEG", orientation, seen, quality=95), 48, fast=True)
    assert_near(np.asarray(fast).astype(int), np.asarray(load_square(Image.fromarray(seen), 48)), 12)


def test_fast_decoding_changes_nothing_but_jpegs():
    data = encoded(scene(333, 201))
    np.testing.assert_array_equal(np.asarray(load_square(data, 32, fast=True)), np.asarray(load_square(data, 32)))


# -- attacks


def run_in_memory_of(megabytes: int, code: str) -> str:
    """Runs it with so much more memory than Python, numpy and Pillow take."""
    start = """
    import resource, sys, warnings
    warnings.simplefilter("ignore")
    from fieldmark.data.photos import open_photo, photo_fault
    from fieldmark.errors import FieldmarkError
    from helpers_photos import *
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 1_000_000,) * 2)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code), str(megabytes)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_bombs_take_no_memory():
    out = run_in_memory_of(
        400,
        """
        for name, (data, reason) in HOSTILE_BYTES.items():
            if "bomb" in name or name == "large.png":
                fault = photo_fault(data)
                assert fault and "Memory" not in fault, (name, fault)
        chunks = [png_chunk(b"iCCP", b"x\\0\\0" + zlib.compress(bytes(30_000_000)))]
        chunks += [png_chunk(b"zTXt", b"k\\0\\0" + zlib.compress(bytes(1_000_000)))] * 200
        print(photo_fault(png(np.zeros((4, 4, 3), np.uint8), 2, *chunks[1:])))
        print(photo_fault(png(np.zeros((4, 4, 3), np.uint8), 2, chunks[0])))
        """,
    )
    assert "too large" in out or "MAX_TEXT" in out


def test_large_metadata_is_no_trouble():
    """An EXIF block and a profile of the greatest size a JPEG can hold."""
    profile = rgb_profile(P3, 2.2) + bytes(5_000_000)
    profile = len(profile).to_bytes(4, "big") + profile[4:]
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(65_000)
    data = encoded(scene(), "JPEG", **EXACT["JPEG"], exif=exif, icc_profile=profile)
    assert len(data) > 5_000_000
    assert_near(pixels(data), to_srgb(np.asarray(scene()), P3, 2.2), 14)


def test_random_damage_never_raises_anything_else():
    """Byte flips, cuts and splices of all kinds: an upright RGB photo or one sentence, within memory, and the same
    verdict by the check."""
    out = run_in_memory_of(
        2000,  # a flipped bit of a header may claim MAX_PIXELS
        """
        rng = np.random.default_rng(0)
        photo, small = scene(48, 32), scene(33, 47, 1)
        animation = {"save_all": True, "append_images": [small.resize((48, 32))]}
        whole = [
            encoded(photo, "JPEG"), encoded(photo, "JPEG", progressive=True), encoded(photo.convert("CMYK"), "JPEG"),
            encoded(photo, "MPO", **animation),
            encoded(photo), encoded(photo.convert("P"), transparency=3), encoded(photo, **animation),
            png(np.asarray(photo).astype(np.uint16) * 257, 2), encoded(photo.convert("LA")),
            encoded(photo.convert("P"), "GIF"), encoded(photo.convert("P"), "GIF", **animation),
            encoded(photo, "WEBP"), encoded(photo, "WEBP", lossless=True), encoded(photo, "WEBP", **animation),
            *(encoded(photo, "TIFF", compression=how)
              for how in ("raw", "tiff_lzw", "jpeg", "packbits", "tiff_deflate")),
            tiff(np.asarray(photo).astype(np.uint16)), encoded(photo, "BMP"), encoded(photo, "PPM"),
            encoded(photo, "JPEG2000"), encoded(photo, "AVIF"),
        ]
        read = refused = 0
        for number in range(960):
            data = bytearray(whole[number % len(whole)])
            way = number // len(whole) % 4
            if way == 0:
                for place in rng.integers(0, len(data), int(rng.integers(1, 12))):
                    data[place] = rng.integers(0, 256)
            elif way == 1:
                for place in rng.integers(0, min(len(data), 64), 3):
                    data[place] ^= 1 << int(rng.integers(0, 8))
            elif way == 2:
                data = data[: int(rng.integers(0, len(data)))]
            else:
                other = whole[int(rng.integers(len(whole)))]
                data = data[: int(rng.integers(0, len(data)))] + other[int(rng.integers(0, len(other))) :]
            fault = photo_fault(bytes(data))
            try:
                found = open_photo(bytes(data))
                assert found.mode == "RGB" and fault is None, (number, fault)
                read += 1
            except FieldmarkError as error:
                assert str(error).startswith("cannot read") and "\\n" not in str(error), error
                assert fault is not None, (number, str(error))
                refused += 1
        print(read, refused)
        """,
    )
    read, refused = map(int, out.split())
    assert read > 100
    assert refused > 300
