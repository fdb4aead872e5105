"""Photo files that the tests of photos share: encoders written by hand, and files that no one should have to meet."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth colours with a corner of its own on each side."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def png(values: np.ndarray, colour_type: int, *more: bytes) -> bytes:
    """A PNG of values [h, w, channels] of uint8 or uint16; `more` are chunks before its pixels."""
    height, width = values.shape[:2]
    depth = 8 * values.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    rows = values.astype(values.dtype.newbyteorder(">")).reshape(height, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = (png_chunk(b"IHDR", header), *more, png_chunk(b"IDAT", data), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray) -> bytes:
    """An uncompressed TIFF of uint16 colours [h, w, 3]."""
    height, width, channels = values.shape
    data = values.astype("<u2").tobytes()
    bits = 8 + len(data)
    offset = bits + 2 * channels
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 8), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        b"II*\0"
        + struct.pack("<I", offset)
        + data
        + struct.pack(f"<{channels}H", *[16] * channels)
        + (directory + bytes(4))
    )


def icc_profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile (version 2.4) of these tags."""
    body, table, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI", offset + len(body), bytes(4), 0x02400000) + b"mntr" + space + connection
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(colorants: Sequence[Sequence[float]], gamma: float) -> bytes:
    """Primaries as XYZ rows (D50) and one gamma."""
    tags = {name: b"XYZ " + bytes(4) + fixed(*row) for name, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants)}
    tags |= {name: curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return icc_profile(b"RGB ", tags | {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)})


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"0" * 100))


def gif_bomb(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    place = data.index(b"\x2c") + 5
    data[place : place + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def tiff_bomb(width: int, height: int) -> bytes:
    data = bytearray(tiff(np.zeros((4, 4, 3), np.uint16)))
    for tag, value in ((256, width), (257, height)):
        place = data.index(struct.pack("<HHI", tag, 4, 1))
        data[place + 8 : place + 12] = struct.pack("<I", value)
    return bytes(data)


def webp_bomb() -> bytes:
    """16,383 x 16,383 pixels of one colour in a few kilobytes at most, by its header."""
    data = bytearray(encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True))
    size = 16382
    data[21:25] = struct.pack("<I", size | size << 14)
    return bytes(data)


JPEG = encoded(scene(333, 201), "JPEG", quality=90)
PROGRESSIVE = encoded(scene(333, 201), "JPEG", quality=90, progressive=True)
PNG = encoded(scene())

# name -> what is in the file, and the reason that is given; all of them are refused
HOSTILE_BYTES: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "not an image"),
    "text.jpg": (b"hello", "not an image"),
    "page.png": (b"<html>404</html>", "not an image"),
    "zeros.jpg": (bytes(5000), "not an image"),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n", "not an image"),
    "jpeg_less_1.jpg": (JPEG[:-1], "truncated"),
    "jpeg_less_2.jpg": (JPEG[:-2], "truncated"),
    "jpeg_half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg_head.jpg": (JPEG[:20], "[Tt]runcated|not an image"),
    "progressive_less_1.jpg": (PROGRESSIVE[:-1], "truncated"),
    "progressive_half.jpg": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated"),
    "png_half.png": (PNG[: len(PNG) // 2], "[Tt]runcated"),
    "gif_half.gif": (encoded(scene().convert("P"), "GIF")[:-1200], "truncated"),
    "webp_half.webp": (encoded(scene(), "WEBP", lossless=True)[:2000], "not an image|truncated|decode"),
    "tiff_half.tif": (encoded(scene(), "TIFF", compression="tiff_lzw")[:2000], ""),
    "column.png": (encoded(Image.new("RGB", (1, 30))), "1 x 30 pixels; expected at least 2"),
    "row.jpg": (encoded(Image.new("RGB", (300, 1)), "JPEG"), "300 x 1 pixels; expected at least 2"),
    "dot.gif": (encoded(Image.new("P", (1, 1)), "GIF"), "1 x 1 pixels"),
    "bomb.png": (png_bomb(50_000, 50_000), "bomb"),
    "bomb.gif": (gif_bomb(65_000, 65_000), "bomb"),
    "bomb.tif": (tiff_bomb(50_000, 50_000), "bomb"),
    "bomb.webp": (webp_bomb(), "bomb"),
    "large.png": (png_bomb(12_000, 10_000), "12000 x 10000 pixels are more than"),
    "text_bomb.png": (
        png(np.zeros((4, 4, 3), np.uint8), 2, png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(20_000_000), 9))),
        "MAX_TEXT_CHUNK",
    ),
}  # fmt: skip


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


HOSTILE_PATHS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing.jpg": (lambda path: None, "no such file"),
    "directory.jpg": (folder, "directory"),
    "loop.jpg": (loop, "symbolic links"),
    "dangling.jpg": (dangling, "no such file"),
    "pipe.jpg": (lambda path: os.mkfifo(path), "pipe"),
    "below_a_file.jpg/x.jpg": (lambda path: path.parent.write_bytes(PNG), "no such file"),
}


def make_hostile(root: Path) -> dict[str, str]:
    """Writes them all below `root`; path -> pattern of the reason."""
    reasons = {}
    for name, (data, reason) in HOSTILE_BYTES.items():
        (root / name).write_bytes(data)
        reasons[str(root / name)] = reason
    for name, (make, reason) in HOSTILE_PATHS.items():
        make(root / name)
        reasons[str(root / name)] = reason
    return reasons
