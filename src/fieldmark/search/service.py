"""The REST service over a store: `create_app` makes the application that `fieldmark serve` runs.

A client gives photos as bytes, texts and item_ids, never a path; it gets photos by item_id, encoded anew. Photos are
read and the store is asked by threads, the student runs in one of its own (`batching`). What was given wrongly is
answered by 4xx and one sentence of JSON; a 5xx is a fault of ours, or the service is overloaded (503).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from sentence_transformers import SentenceTransformer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from fieldmark.errors import FieldmarkError
from fieldmark.machine import usable_cores
from fieldmark.search.answers import ERRORS, error_answer
from fieldmark.search.batching import Batcher
from fieldmark.search.embeddings_api import embeddings_router
from fieldmark.search.encoding import Encoded, Encoder, Query
from fieldmark.search.filters import check_filter
from fieldmark.search.limits import Guard, ServiceSettings
from fieldmark.search.metrics import Counting, Metrics
from fieldmark.search.operations import items_router, search_router, state_router
from fieldmark.search.page import page_router
from fieldmark.search.rows import FILTERS, Item
from fieldmark.search.store import Store
from fieldmark.search.uploads import as_jpeg, read_square

T = TypeVar("T")


class Service:
    """What the operations share.

    Args:
        store: the items.
        student: the student that made the store, in eval mode.
        settings: what is allowed.
    """

    def __init__(self, store: Store, student: SentenceTransformer, settings: ServiceSettings) -> None:
        self.store, self.settings = store, settings
        self.encoder = Encoder(student)
        self.metrics = Metrics(store.count)
        folder = Path(store.card.model.source)
        self.model = folder.parent.name if folder.name == "model" else folder.name

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """The threads, as long as the application runs."""
        self._batcher = Batcher(
            self.encoder,
            max_batch=self.settings.max_batch,
            max_wait_ms=self.settings.max_wait_ms,
            on_batch=self.metrics.batches.observe,
        )
        student = asyncio.create_task(self._batcher.run())
        with ThreadPoolExecutor(usable_cores() + 2, thread_name_prefix="service") as self._threads:
            try:
                yield
            finally:
                student.cancel()
                with suppress(asyncio.CancelledError):
                    await student

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """The result of something that would keep other requests waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def encode(self, photo: bytes | IO[bytes] | None, text: str | None) -> Encoded:
        """The vector of a photo, of a text, or of both.

        Raises:
            FieldmarkError: they cannot be read, or the student does not take them.
        """
        self.encoder.check(text)
        square = None
        if photo is not None:
            square = await self.in_thread(read_square, photo, self.encoder.reader.side, self.settings.max_pixels)
        return await self._batcher.submit(Query(square, text))

    async def encode_item(self, item_id: str) -> Encoded:
        """What the student makes of an item's photo now.

        Raises:
            HTTPException: 404, the item or its photo is not there.
        """
        square = await self._photo(item_id, self.encoder.reader.square)
        return await self._batcher.submit(Query(square))

    async def jpeg(self, item_id: str, side: int) -> bytes:
        """An item's photo for a client.

        Raises:
            HTTPException: 404, the item or its photo is not there.
        """
        return await self._photo(item_id, lambda photo: as_jpeg(photo, side))

    async def _photo(self, item_id: str, read: Callable[[Any], T]) -> T:
        await self.items([item_id])
        photo = await self.in_thread(self.store.photo, item_id)
        try:
            return await self.in_thread(read, photo)
        except FieldmarkError as error:
            logging.getLogger(__name__).warning("%s", error)  # names the path, which is not the client's to know
            raise HTTPException(404, f"The photo of the item {item_id!r} is not there or cannot be read.") from error

    async def items(self, ids: Sequence[str]) -> list[Item]:
        """Items in the order given.

        Raises:
            HTTPException: 404, there is no such item.
        """
        try:
            return await self.in_thread(self.store.items, ids)
        except FieldmarkError as error:
            raise HTTPException(404, str(error)) from error

    async def checked_filter(self, where: str | None) -> str | None:
        """The filter, if a client may ask it.

        Raises:
            FieldmarkError: it is more than a condition on the store's columns.
        """
        if where is None:
            return None
        columns = await self.in_thread(self.store.columns)
        return check_filter(where, [*FILTERS, *columns.values()])


def create_app(store: Store, student: SentenceTransformer, settings: ServiceSettings | None = None) -> FastAPI:
    """The application: REST under the paths of its `/openapi.json`, the page at `/`.

    Args:
        store: the items.
        student: the student that made the store, in eval mode.
        settings: what is allowed; None for the defaults.
    """
    settings = settings or ServiceSettings()
    service = Service(store, student, settings)
    app = FastAPI(
        title="Fieldmark search",
        description="Items of a catalogue by a photo, a text or both.",
        version=metadata.version("fieldmark"),
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=service.running,
        responses=ERRORS,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.token else [],
    )
    app.include_router(search_router(service))
    app.include_router(items_router(service))
    app.include_router(embeddings_router(service))
    app.include_router(state_router(service))
    app.include_router(page_router())
    _answer_errors(app)
    app.add_middleware(Guard, settings=settings)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(Counting, metrics=service.metrics)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Every error is one sentence of JSON."""

    @app.exception_handler(FieldmarkError)
    async def mistake(request: Request, error: FieldmarkError) -> Response:
        return error_answer(400, " ".join(str(error).split()))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # loc: where it was (query, body, ...), its name, what of it
        return error_answer(422, f"{(first['loc'][1:] or first['loc'])[0]}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return error_answer(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return error_answer(500, "The service failed; its log says why.")
