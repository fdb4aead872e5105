"""What a client may ask of the service: who may, how much, how long, how many at a time.

`Guard` stands before everything that reads a body or works: a request that is refused costs nothing.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fieldmark.search.answers import error_answer

MB = 1_000_000
OPEN_PATHS = ("/", "/healthz")  # and the page's assets: they show nothing of the store
UNLIMITED_PATHS = ("/healthz", "/metrics")  # to be answered most of all when the service is full
RETRY = {"Retry-After": "1"}


@dataclass(frozen=True)
class ServiceSettings:
    """What the service allows.

    Attributes:
        token: what a client must send as `Authorization: Bearer TOKEN`; None asks for nothing.
        cors: origins whose pages may call the service from a browser.
        hosts: names under which it may be called; None allows any. Keeps foreign pages from reaching a service of this
            machine by a name of theirs that points here (DNS rebinding).
        allow_urls: whether a photo may be given as a URL that the service fetches.
        max_body_mb: size of a request in MB, and of a photo that is fetched.
        max_pixels: of a photo; one that claims more is refused before it is decoded.
        timeout_s: seconds a request may take, its upload included.
        concurrency: requests at a time; more are sent away with 429.
        max_batch: photos and texts that the student embeds at once.
        max_wait_ms: milliseconds that the first of a batch waits for others.
    """

    token: str | None = None
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    allow_urls: bool = False
    max_body_mb: float = 10.0
    max_pixels: int = 40_000_000
    timeout_s: float = 30.0
    concurrency: int = 128
    max_batch: int = 32
    max_wait_ms: float = 2.0

    @property
    def max_body(self) -> int:
        """Bytes of a request."""
        return int(self.max_body_mb * MB)


class Guard:
    """ASGI middleware that applies the settings.

    Args:
        app: what it guards.
        settings: what is allowed.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self.app, self.settings = app, settings
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refusal(scope["path"], Headers(scope=scope))
        if refused is not None:
            await refused(scope, receive, send)
            return
        self.active += 1
        try:
            await self._limited(scope, receive, send)
        finally:
            self.active -= 1

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        """The answer to a request that is not let in, told by its first line and headers alone."""
        settings = self.settings
        if settings.hosts is not None and _host(headers) not in settings.hosts:
            return error_answer(403, f"The service was called by another name than {' or '.join(settings.hosts)}.")
        if settings.token is not None and not _is_open(path) and not _has_token(headers, settings.token):
            return error_answer(
                401, "The token is missing or wrong; send it as `Authorization: Bearer TOKEN`.",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if self.active >= settings.concurrency and path not in UNLIMITED_PATHS:
            return error_answer(429, f"{settings.concurrency} requests are being answered; try again.", RETRY)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > settings.max_body:
            return error_answer(413, self._too_large())
        return None

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request, within the limits of size and time."""
        size, received, answered = 0, False, False

        async def counted() -> Message:
            nonlocal size, received
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                received = not message.get("more_body", False)
                if size > self.settings.max_body:
                    raise HTTPException(413, self._too_large())
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        limit = asyncio.timeout(self.settings.timeout_s)
        try:
            async with limit:
                await self.app(scope, counted, noted)
        except TimeoutError:
            if answered or not limit.expired():
                raise
            status, what = (503, "answered") if received or _has_no_body(scope) else (408, "received")
            message = f"The request was not {what} within {self.settings.timeout_s:g} seconds; try again."
            await error_answer(status, message, RETRY)(scope, receive, send)

    def _too_large(self) -> str:
        return f"The request is larger than {self.settings.max_body_mb:g} MB; send a smaller photo."


def _host(headers: Headers) -> str | None:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/assets/")


def _has_token(headers: Headers, token: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return hmac.compare_digest(given.strip().encode("latin-1"), token.encode()) and scheme.lower() == "bearer"


def _has_no_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
