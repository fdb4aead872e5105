"""Photos that clients give, and photos that they are given: bytes in, bytes out, never a path."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
from typing import IO
from urllib.parse import urlsplit

import httpx2
from PIL import Image

from fieldmark.data.photos import FORMATS, PhotoRef, load_square, open_photo, photo_fault
from fieldmark.errors import FieldmarkError

DATA_URL = "data:image/"
FETCH_S = 10.0
JPEG_QUALITY = 85
_UNICAST_V6 = ipaddress.ip_network("2000::/3")  # what is outside of it carries addresses of other networks


def read_square(photo: bytes | IO[bytes], side: int, max_pixels: int) -> Image.Image:
    """A client's photo as the student sees it.

    Args:
        photo: bytes of an image file, or the file; it is read only here, so that few are in memory at a time.
        side: of the square.
        max_pixels: of the photo; its header is asked before it is decoded.

    Raises:
        FieldmarkError: it cannot be read, or is too large.
    """
    content = photo if isinstance(photo, bytes) else photo.read()
    size = _claimed_size(content)
    if size is not None and size[0] * size[1] > max_pixels:
        raise FieldmarkError(
            f"The photo has {size[0]} x {size[1]} pixels; expected at most {max_pixels:,}; make it smaller."
        )
    try:
        return load_square(content, side)
    except FieldmarkError as error:
        raise FieldmarkError(f"The photo cannot be read: {photo_fault(content) or error}.") from error


def _claimed_size(content: bytes) -> tuple[int, int] | None:
    """Width and height by a photo's header; None where it has none to be read."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.size
    except Exception:  # a decoder may raise anything; `load_square` says what is wrong
        return None


def as_jpeg(photo: PhotoRef, side: int) -> bytes:
    """A photo of the store for a client: upright, its longer side at most `side` pixels, its pixels alone.

    Encoded anew, so that neither the place and camera in its EXIF nor what else lies in the file leaves the house.

    Raises:
        FieldmarkError: it cannot be read.
    """
    image = open_photo(photo)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def from_data_url(url: str) -> bytes:
    """The bytes of a photo written as `data:image/TYPE;base64,...`.

    Raises:
        FieldmarkError: it is not written so.
    """
    head, comma, data = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FieldmarkError(
            "A photo was given as a data URL without base64; expected data:image/jpeg;base64,..."
        ) from error


async def fetch(url: str, max_bytes: int) -> bytes:
    """A photo from the web.

    The name is looked up once, all its addresses must be public, and one of these is called: a name that points
    elsewhere a moment later changes nothing. Redirects are not followed, proxies not asked, nothing is decompressed.

    Raises:
        FieldmarkError: not http(s), an address that is not public, not answered within 10 seconds by 200 and at most
            `max_bytes`.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not host or parts.username is not None:
            raise ValueError
        target = httpx2.URL(url)
    except (ValueError, KeyError, httpx2.InvalidURL) as error:
        raise FieldmarkError("An image_url was given that is not http://HOST/... or https://HOST/...") from error
    try:
        async with asyncio.timeout(FETCH_S):
            address = await _public_address(host, port)
            return await _get(target, host, address, max_bytes)
    except (httpx2.HTTPError, TimeoutError) as error:
        raise FieldmarkError(
            f"The image_url was not answered: {type(error).__name__}; check it, or send the photo."
        ) from error


async def _public_address(host: str, port: int) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FieldmarkError(f"The host {host} of the image_url is not known.") from error
    addresses = [str(one[4][0]) for one in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise FieldmarkError(f"The host {host} of the image_url is not on the public internet; send the photo itself.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and no other address in disguise."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        return ip in _UNICAST_V6 and ip.is_global and ip.sixtofour is None and ip.teredo is None
    return ip.is_global and not ip.is_multicast


async def _get(url: httpx2.URL, host: str, address: str, max_bytes: int) -> bytes:
    """Calls an address in a host's name."""
    name = url.netloc.decode("ascii")
    headers = {"Host": name, "Accept": "image/*", "Accept-Encoding": "identity"}
    async with (
        httpx2.AsyncClient(trust_env=False, timeout=FETCH_S) as client,
        client.stream("GET", url.copy_with(host=address), headers=headers, extensions={"sni_hostname": host}) as answer,
    ):
        if answer.status_code != 200:
            raise FieldmarkError(f"The image_url answered {answer.status_code}; expected 200 and a photo, no redirect.")
        content = bytearray()
        async for part in answer.aiter_raw():
            content += part
            if len(content) > max_bytes:
                raise FieldmarkError(f"The image_url holds more than {max_bytes / 1e6:g} MB; send a smaller photo.")
        return bytes(content)
