"""From a reference to pixels: the last step of a catalogue, one upright RGB photo at a time."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fieldmark.errors import FieldmarkError

MAX_PIXELS = 100_000_000  # 300 MB of RGB; a file that claims more is refused before it is decoded
PhotoRef = str | Path | bytes | Image.Image

# what Pillow's decoders raise on damaged files
_DECODE_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def open_photo(ref: PhotoRef) -> Image.Image:
    """Decode a photo to upright RGB.

    EXIF rotation is applied, transparency is laid over white, 16- and 32-bit greys are scaled to 8 bits, of an
    animation the first frame is taken.

    Args:
        ref: the path of a file, an `aviary://` uri (drawn), the bytes of an image file, or a Pillow image.

    Raises:
        FieldmarkError: names the photo and the reason (missing, a directory, not an image, truncated, too large, ...).
    """
    if isinstance(ref, str) and ref.startswith("aviary://"):
        from fieldmark.data.aviary import draw_uri

        return draw_uri(ref)
    name = _name(ref)
    if isinstance(ref, (str, Path)):
        _check_file(Path(ref), name)
    try:
        if isinstance(ref, Image.Image):
            return _upright_rgb(ref, name)
        with Image.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref) as image:
            return _upright_rgb(image, name)
    except UnidentifiedImageError as error:
        raise FieldmarkError(f"cannot read {name}: it is not an image file that Pillow knows") from error
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FieldmarkError(
            f"cannot read {name}: {reason}; replace the file or take it out of the catalogue"
        ) from error


def load_square(ref: PhotoRef, resolution: int) -> Image.Image:
    """The whole photo, bicubically resized to `resolution` x `resolution` pixels without a crop (SAGA section 4.1)."""
    if resolution < 1:
        raise FieldmarkError(f"resolution {resolution} was given; expected a number of pixels of 1 or more")
    photo = open_photo(ref)
    size = (resolution, resolution)
    return photo if photo.size == size else photo.resize(size, Image.Resampling.BICUBIC)


def _name(ref: PhotoRef) -> str:
    if isinstance(ref, (str, Path)):
        return f"the photo {ref}"
    if isinstance(ref, bytes):
        return f"a photo given as {len(ref)} bytes"
    if isinstance(ref, Image.Image):
        return f"a photo given as {type(ref).__name__} of mode {ref.mode}"
    raise FieldmarkError(f"a photo was given as {type(ref).__name__}; expected a path, a uri, bytes or a Pillow image")


def _check_file(path: Path, name: str) -> None:
    try:
        if path.is_dir():
            raise FieldmarkError(f"cannot read {name}: it is a directory; expected an image file")
        if not path.exists():
            raise FieldmarkError(f"cannot read {name}: no such file; paths are relative to the catalogue's own folder")
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise FieldmarkError(f"cannot read {name!r}: {error}") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise FieldmarkError(
            f"cannot read {name}: {width} x {height} pixels are more than {MAX_PIXELS} (a decompression bomb?); "
            "make it smaller"
        )
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit greys by their type's range; 32-bit integers and floats by the smallest usual range that holds them."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    highest = float(values.max())
    if image.mode.startswith("I;16"):
        full = 65535.0
    else:
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = next((limit for limit in usual if highest <= limit), highest)
    return Image.fromarray(np.rint(values * (255.0 / full)).astype(np.uint8)).convert("RGB")
