"""From a reference to pixels: the last step of a catalogue, one upright sRGB photo at a time."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageFile, UnidentifiedImageError

from fieldmark.errors import FieldmarkError

MAX_PIXELS = 100_000_000  # 300 MB of RGB; a file that claims more is refused before it is decoded
MIN_SIDE = 2  # a row of single pixels is what is left of a failed crop or a counting pixel, not a photo
# Kinds of photos. Pillow reads more, among them EPS, for which it would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
PhotoRef = str | Path | bytes | Image.Image

_TAR = re.compile(r"tar://(.+)#(\d+),(\d+)", re.DOTALL)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


class _UnreadableError(FieldmarkError):
    """A reason why a photo cannot be read."""


def open_photo(ref: PhotoRef) -> Image.Image:
    """Decode a photo to upright RGB.

    - EXIF (or XMP) rotation is applied; EXIF that is damaged counts as none.
    - Transparency is laid over white. Of an animation the first frame is taken.
    - 16- and 32-bit greys are scaled to 8 bits; of 16-bit colours the upper 8 bits are kept.
    - Colours of an embedded ICC profile other than sRGB (Display P3, Adobe RGB, a press's CMYK) are converted to
      sRGB, relative colorimetric with black point compensation. A profile that is damaged or of another kind of
      colours than the photo's is ignored, as browsers do.
    - CMYK without a profile is multiplied out; a JPEG's CMYK counts as inverted, as Adobe writes it.

    Refused are photos that are missing, not an image of one of `FORMATS`, truncated, of more than `MAX_PIXELS` or with
    a side of less than `MIN_SIDE` pixels. The name's ending does not matter, nor what follows the image in its file.

    Args:
        ref: the path of a file, an `aviary://` uri (drawn), a `tar://PATH#OFFSET,SIZE` uri (those bytes of an
            uncompressed archive), the bytes of an image file, or a Pillow image.

    Raises:
        FieldmarkError: names the photo and the reason.
    """
    if isinstance(ref, str) and ref.startswith("aviary://"):
        from fieldmark.data.aviary import draw_uri

        return draw_uri(ref)
    try:
        return _open(ref)
    except _UnreadableError as error:
        raise _refusal(ref, error) from error.__cause__


def load_square(ref: PhotoRef, resolution: int, *, fast: bool = False) -> Image.Image:
    """The whole photo, bicubically resized to `resolution` x `resolution` pixels without a crop (SAGA section 4.1).

    Args:
        ref: see :func:`open_photo`.
        resolution: side in pixels.
        fast: decode a JPEG whose sides are both at least twice `resolution` at 1/2, 1/4 or 1/8 of its size, the
            smallest that has `resolution` pixels a side. Several times faster for large photos; pixels differ a little.

    Raises:
        FieldmarkError: as :func:`open_photo`; or the resolution is not positive.
    """
    if resolution < 1:
        raise FieldmarkError(f"resolution {resolution} was given; expected a number of pixels of 1 or more")
    if isinstance(ref, str) and ref.startswith("aviary://"):
        return _square(open_photo(ref), resolution)
    try:
        return _open(ref, resolution, fast)
    except _UnreadableError as error:
        raise _refusal(ref, error) from error.__cause__


def photo_fault(ref: PhotoRef) -> str | None:
    """Why `open_photo` refuses a photo, or None: its whole file is read, a JPEG's at an eighth of its size."""
    if isinstance(ref, str) and ref.startswith("aviary://"):
        from fieldmark.data.aviary import species_of_uri

        try:
            species_of_uri(ref)
        except FieldmarkError as error:
            return str(error)
        return None
    try:
        _open(ref, 1, fast=True)
    except _UnreadableError as error:
        return str(error)
    return None


def _refusal(ref: PhotoRef, reason: _UnreadableError) -> FieldmarkError:
    return FieldmarkError(f"cannot read {_name(ref)}: {reason}; replace it, or leave it out by --bad_photos skip")


def _name(ref: PhotoRef) -> str:
    if isinstance(ref, (str, Path)):
        return f"the photo {str(ref) if str(ref).isprintable() else repr(str(ref))}"
    if isinstance(ref, bytes):
        return f"a photo given as {len(ref)} bytes"
    return f"a photo given as {type(ref).__name__}"


def _open(ref: PhotoRef, side: int | None = None, fast: bool = False) -> Image.Image:
    """The photo, or its square of `side` pixels. A given image is not changed, and is nobody else's afterwards."""
    if isinstance(ref, Image.Image):
        photo = _decoded(ref, side, fast=False)
        return photo.copy() if photo is ref else photo
    if not isinstance(ref, (str, Path, bytes)):
        raise _UnreadableError("expected a path, a uri, bytes or a Pillow image")
    with photo_file(ref) as file:
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            known = "JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF, JPEG 2000 or PPM"
            raise _UnreadableError(f"it is not an image, or not whole; expected {known}") from error
        except Exception as error:  # a decoder may raise anything on a damaged file
            raise _UnreadableError(_reason(error)) from error
        with image:
            return _decoded(image, side, fast)


@contextmanager
def photo_file(ref: str | Path | bytes) -> Iterator[IO[bytes]]:
    """The opened file of a photo; of a `tar://` uri its bytes alone.

    Pillow is given this instead of the name, because it maps named files of some kinds into memory.

    Raises:
        FieldmarkError: the reason, without the name: missing, a directory, a pipe, not to be read.
    """
    if isinstance(ref, bytes):
        yield io.BytesIO(ref)
        return
    if isinstance(ref, str) and ref.startswith("tar://"):
        yield io.BytesIO(_archived(ref))
        return
    try:
        kind = os.stat(ref).st_mode
        if stat.S_ISDIR(kind):
            raise _UnreadableError("it is a directory; expected an image file")
        if not stat.S_ISREG(kind):  # to open a pipe would wait for its writer
            raise _UnreadableError("it is a pipe, a socket or a device; expected an image file")
        file = open(ref, "rb")  # noqa: SIM115
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a null byte in the name
        raise _UnreadableError("no such file; paths are relative to the catalogue's own folder") from error
    except OSError as error:
        raise _UnreadableError((error.strerror or str(error)).lower()) from error
    with file:
        yield file


def _archived(uri: str) -> bytes:
    """The bytes that a `tar://PATH#OFFSET,SIZE` uri names."""
    match = _TAR.fullmatch(uri)
    if match is None:
        raise _UnreadableError("expected tar://PATH#OFFSET,SIZE")
    path, offset, size = match[1], int(match[2]), int(match[3])
    with photo_file(path) as archive:
        length = os.fstat(archive.fileno()).st_size
        if offset + size > length:  # asked first, since reading sets the memory aside
            raise _UnreadableError(f"the archive has {length} bytes only; it is truncated or was changed")
        archive.seek(offset)
        return archive.read(size)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, (OSError, SyntaxError, Image.DecompressionBombError)) and text:
        return text
    return f"{type(error).__name__} {text}".strip()


def _decoded(image: Image.Image, side: int | None, fast: bool) -> Image.Image:
    """Upright RGB of an image, whole or as a square."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _UnreadableError(
            f"{width} x {height} pixels are more than {MAX_PIXELS} (a decompression bomb?); make it smaller"
        )
    if min(width, height) < MIN_SIDE:
        raise _UnreadableError(f"{width} x {height} pixels; expected at least {MIN_SIDE} a side")
    try:
        shrunk = image.draft(None, (side, side)) if side and fast else None
        image.load()
        photo = _to_rgb(image)
        if side and shrunk:  # its box leaves out what of the last pixels lies beyond the photo's edge
            photo = _square(photo, side, shrunk[1])
        turn = _UPRIGHT.get(_orientation(image))
        photo = photo if turn is None else photo.transpose(turn)
        if side:
            return _square(photo, side)
        return photo.copy() if isinstance(photo, ImageFile.ImageFile) else photo
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise _UnreadableError(_reason(error)) from error


def _square(photo: Image.Image, side: int, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    """A part of the photo (all of it) as a square; a copy where it is one already."""
    return photo.resize((side, side), Image.Resampling.BICUBIC, box)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none; asked after loading, since Pillow turns a TIFF itself."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing of the pixels, which are whole
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I") or image.mode == "F":
        image = _from_deep_grey(image)
    elif image.has_transparency_data:
        grey = image.mode in ("LA", "La")
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if grey else "RGB")
    elif image.mode not in _COLOUR_SPACES:
        image = image.convert("RGB")
    to_srgb = _transform_to_srgb(profile, image.mode) if profile else None
    photo = image.convert("RGB") if image.mode != "RGB" and to_srgb is None else image
    photo = photo if to_srgb is None else to_srgb.apply(photo)
    if alpha is None:
        return photo
    white = Image.new("RGB", photo.size, "white")
    white.paste(photo, mask=alpha)
    return white


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit greys by their type's range; 32-bit integers and floats by the smallest usual range that holds them."""
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    np.clip(values, 0, None, out=values)
    highest = float(values.max())
    if image.mode.startswith("I;16"):
        full = 65535.0
    else:
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = next((limit for limit in usual if highest <= limit), highest)
    values *= 255.0 / full
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


@lru_cache(maxsize=16)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where a profile is to be left aside: it is sRGB, of another kind of colours, or damaged."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.profile.xcolor_space.strip() != _COLOUR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            given,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return None if mode != "CMYK" and _changes_little(transform, mode) else transform


def _changes_little(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a profile is one of the many makers' sRGB: of 16 steps a channel no colour moves by more than 2."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    grid = steps if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    swatches = Image.fromarray(grid[None])
    moved = np.asarray(ImageChops.difference(transform.apply(swatches), swatches.convert("RGB")))
    return int(moved.max()) <= 2
