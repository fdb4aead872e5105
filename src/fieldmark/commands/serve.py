"""`fieldmark serve DB`."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import console, quiet_libraries
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from fieldmark.search.limits import ServiceSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeOptions:
    """Arguments of `serve`.

    Attributes:
        store: folder that `fieldmark index` made.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: port to listen at; 0 takes a free one.
        token: what clients must send as `Authorization: Bearer TOKEN`; @FILE reads it from a file, where other users of
            this machine do not see it.
        cors: origins whose pages may call the service, separated by commas.
        allow_urls: fetch photos that a client names by a URL, from public addresses only.
        max_body_mb: size of a request in MB.
        max_pixels: pixels of a photo.
        timeout_s: seconds a request may take.
        concurrency: requests at a time; more are sent away with 429.
        max_batch: photos and texts that the student embeds at once.
        max_wait_ms: milliseconds that the first of a batch waits for others.
        model: where the student lies now, if not where it lay when the store was made.
    """

    store: str
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    cors: list[str] | None = None
    allow_urls: bool = False
    max_body_mb: float = 10.0
    max_pixels: int = 40_000_000
    timeout_s: float = 30.0
    concurrency: int = 128
    max_batch: int = 32
    max_wait_ms: float = 2.0
    model: str | None = None


def run(argv: list[str]) -> None:
    """Serves a store until it is interrupted."""
    options = parse(
        ServeOptions,
        argv,
        prog="fieldmark serve",
        description="Serves a store: a page to search with, and REST.",
        positional=("store",),
        switches=("allow_urls",),
    )
    token = _check(options)
    quiet_libraries()
    import uvicorn

    from fieldmark.search.embedding import load_stored_student
    from fieldmark.search.service import create_app
    from fieldmark.search.store import Store

    store = Store.open(options.store)
    listening = _listen(options.host, options.port)
    app = create_app(store, load_stored_student(store, options.model), _settings(options, token))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
    shown = f"[{options.host}]" if ":" in options.host else options.host
    _say(f"{store.count():,} items of {options.store} at http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)")
    if token is None and options.host not in LOOPBACK:
        _say("no token was given: whoever reaches this address can search")
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def _check(options: ServeOptions) -> str | None:
    """Refuses what cannot be served with, before a model is loaded; returns the token."""
    for name in ("max_pixels", "concurrency", "max_batch"):
        positive(name, getattr(options, name))
    for name in ("max_body_mb", "timeout_s"):
        if not getattr(options, name) > 0:
            raise FieldmarkError(f"--{name} was given {getattr(options, name)}; expected more than 0.")
    if not 0 <= options.max_wait_ms <= 1000:
        raise FieldmarkError(f"--max_wait_ms was given {options.max_wait_ms}; expected 0 to 1000.")
    if not 0 <= options.port <= 65535:
        raise FieldmarkError(f"--port was given {options.port}; expected 0 to 65535.")
    token = options.token
    if token is not None and token.startswith("@"):
        token = Path(token[1:]).read_text(encoding="utf-8").strip()
    if token is not None and (not token or any(map(str.isspace, token))):
        raise FieldmarkError("--token is empty or holds spaces; give one word.")
    return token


def _settings(options: ServeOptions, token: str | None) -> ServiceSettings:
    from fieldmark.search.limits import ServiceSettings

    names = ("allow_urls", "max_body_mb", "max_pixels", "timeout_s", "concurrency", "max_batch", "max_wait_ms")
    private = token is None and options.host in LOOPBACK
    return ServiceSettings(
        token=token,
        cors=tuple(options.cors or ()),
        hosts=LOOPBACK if private else None,
        **{name: getattr(options, name) for name in names},
    )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded: an address that is taken is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise FieldmarkError(
            f"{host} port {port} cannot be listened at: {reason}; give another --host or --port."
        ) from error


def _say(line: str) -> None:
    console().print(line, markup=False, highlight=False, soft_wrap=True)
