"""The service's operations: searching, items and their photos, and the service itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, File, Form, Query, UploadFile
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.report_images import heat_uri
from fieldmark.search.answers import (
    AboutAnswer,
    Attention,
    Facet,
    Health,
    ItemAnswer,
    ItemsAnswer,
    Result,
    SearchAnswer,
    Value,
    Words,
)
from fieldmark.search.filters import MAX_LENGTH
from fieldmark.search.limits import ServiceSettings
from fieldmark.search.rows import Hit, Item
from fieldmark.search.store import Store
from fieldmark.search.uploads import fetch
from fieldmark.search.why import explain

if TYPE_CHECKING:
    from fieldmark.search.service import Service

MAX_K, MAX_IDS, MAX_TEXT, MAX_EXAMPLES = 200, 100, 2000, 24
SHOWN_VALUES = 100

K = Annotated[int, Query(ge=1, le=MAX_K, description="Items wanted.")]
Where = Annotated[Words | None, Query(max_length=MAX_LENGTH, description="Condition, such as colour = 'red'.")]


def search_router(service: Service) -> APIRouter:
    """Searching by what is given, and by an item."""
    router = APIRouter(tags=["search"])

    @router.post("/search")
    async def search(
        image: Annotated[UploadFile | None, File(description="A photo.")] = None,
        image_url: Annotated[
            str | None,
            Form(max_length=MAX_TEXT, description="Where a photo is on the web, if the service fetches any."),
        ] = None,
        text: Annotated[
            Words | None, Form(max_length=MAX_TEXT, description="A text; with a photo, both are one query.")
        ] = None,
        k: Annotated[int, Form(ge=1, le=MAX_K, description="Items wanted.")] = 10,
        where: Annotated[
            Words | None, Form(max_length=MAX_LENGTH, description="Condition on items, such as colour = 'red'.")
        ] = None,
        hybrid: Annotated[
            bool,
            Form(
                description="Look for the text's words in titles and attributes too (with a photo, only there), and "
                "join both orders."
            ),
        ] = False,
        attention: Annotated[bool, Form(description="Tell where the student looked in the photo.")] = False,
    ) -> SearchAnswer:
        """Finds the items nearest to a photo, a text or both."""
        photo = await _given_photo(service.settings, image, image_url)
        _check_query(photo, text, hybrid)
        condition = await service.checked_filter(where)
        words = text if hybrid else None
        # With a photo, words are looked for and not embedded: a student of photos alone can be asked so too.
        query = await service.encode(photo, None if words and photo else text)
        hits = await service.in_thread(_found, service.store, query.vector, k, condition, words)
        looked = query.attention if attention else None
        shown = None if looked is None else await service.in_thread(_attention, looked)
        return SearchAnswer(results=_results(hits, text=text), attention=shown)

    @router.get("/similar/{item_id:path}")
    async def similar(item_id: str, k: K = 10, where: Where = None) -> SearchAnswer:
        """Finds the items nearest to an item, itself left out."""
        item = (await service.items([item_id]))[0]
        hits = await service.in_thread(service.store.similar, item_id, k, await service.checked_filter(where))
        return SearchAnswer(results=_results(hits, query=item), attention=None)

    return router


def items_router(service: Service) -> APIRouter:
    """Items, their photos, and where the student looks in them."""
    router = APIRouter(tags=["items"])

    @router.get("/items")
    async def items(ids: Annotated[list[str], Query(min_length=1, max_length=MAX_IDS)]) -> ItemsAnswer:
        """What is known of items."""
        return ItemsAnswer(items=[ItemAnswer(**_facts(item)) for item in await service.items(ids)])

    @router.get("/examples")
    async def examples(k: Annotated[int, Query(ge=1, le=MAX_EXAMPLES)] = 12, where: Where = None) -> ItemsAnswer:
        """Some items to begin with: not all alike, and the same for the same filter."""
        found = await service.in_thread(some_items, service.store, k, await service.checked_filter(where))
        return ItemsAnswer(items=[ItemAnswer(**_facts(item)) for item in found])

    @router.get(
        "/items/{item_id:path}/photo", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}}
    )
    async def photo(item_id: str, side: Annotated[int, Query(ge=16, le=1600, description="Pixels.")] = 512) -> Response:
        """An item's photo, its longer side at most `side` pixels, as JPEG."""
        headers = {"Cache-Control": "private, max-age=300", "X-Content-Type-Options": "nosniff"}
        return Response(await service.jpeg(item_id, side), media_type="image/jpeg", headers=headers)

    @router.get("/items/{item_id:path}/attention")
    async def attention(item_id: str) -> Attention:
        """Where the student looks in an item's photo."""
        await service.items([item_id])
        looked = (await service.encode_item(item_id)).attention if service.encoder.has_attention else None
        if looked is None:
            raise HTTPException(404, "This student has no attention pooler, so it cannot be seen where it looks.")
        return await service.in_thread(_attention, looked)

    @router.get("/items/{item_id:path}")
    async def item(item_id: str) -> ItemAnswer:
        """What is known of an item."""
        return ItemAnswer(**_facts((await service.items([item_id]))[0]))

    return router


def state_router(service: Service) -> APIRouter:
    """What the service is, whether it is well, what it counted."""
    router = APIRouter(tags=["service"])

    @router.get("/about")
    async def about() -> AboutAnswer:
        """What the service holds and takes."""
        return await service.in_thread(_about, service)

    @router.get("/healthz")
    async def healthz() -> Health:
        """Whether the service is up and can read its store."""
        try:
            await service.in_thread(service.store.count)
        except Exception as error:
            logging.getLogger(__name__).exception("the store cannot be read")
            raise HTTPException(503, "The store cannot be read.") from error
        return Health()

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """What the service counted, for Prometheus."""
        return Response(
            await service.in_thread(generate_latest, service.metrics.registry), media_type=CONTENT_TYPE_LATEST
        )

    return router


def facets(store: Store) -> list[Facet]:
    """Attributes to filter by, in the order in which the store came to know them."""
    counts = store.facets()
    return [
        Facet(
            name=name,
            column=column,
            values=[Value(value=value, count=count) for value, count in list(counts[column].items())[:SHOWN_VALUES]],
            n_values=len(counts[column]),
        )
        for name, column in store.columns().items()
        if counts.get(column)
    ]


def some_items(store: Store, k: int, where: str | None) -> list[Item]:
    """Items nearest to random directions, each direction's nearest that there is not yet."""
    if not store.count():
        return []
    found: dict[str, Item] = {}
    for direction in np.random.default_rng(0).standard_normal((k, store.card.model.dim)):
        near = store.search(direction, k, where)
        found |= {hit.item_id: hit for hit in [hit for hit in near if hit.item_id not in found][:1]}
    return list(found.values())


def _about(service: Service) -> AboutAnswer:
    """What there is to be known before the first search."""
    card = service.store.card
    return AboutAnswer(
        model=service.model,
        items=service.store.count(),
        dim=card.model.dim,
        texts=service.encoder.texts,
        attention=service.encoder.has_attention,
        recall_at_10=None if card.index is None else card.index.recall_at_10,
        urls=service.settings.allow_urls,
        max_body_mb=service.settings.max_body_mb,
        facets=facets(service.store),
    )


async def _given_photo(
    settings: ServiceSettings, image: UploadFile | None, image_url: str | None
) -> bytes | IO[bytes] | None:
    """The photo that was sent, or the one that a URL names."""
    if image_url is None:
        return None if image is None else image.file
    if image is not None:
        raise FieldmarkError("A photo and an image_url were given; give one of them.")
    if not settings.allow_urls:
        raise FieldmarkError("An image_url was given, and this service fetches none; send the photo itself as image.")
    return await fetch(image_url, settings.max_body)


def _check_query(photo: bytes | IO[bytes] | None, text: str | None, hybrid: bool) -> None:
    if text is not None and not text.strip():
        raise FieldmarkError("An empty text was given; expected words.")
    if photo is None and text is None:
        raise FieldmarkError("There is nothing to search with; give a photo as image, a text, or both.")
    if hybrid and text is None:
        raise FieldmarkError("hybrid was given without a text; give the words to look for as text.")


def _found(store: Store, vector: np.ndarray, k: int, where: str | None, words: str | None) -> list[Hit]:
    return store.search(vector, k, where, words) if store.count() else []


def _results(hits: Sequence[Hit], query: Item | None = None, text: str | None = None) -> list[Result]:
    whys = explain(hits, query, text)
    return [Result(**_facts(hit), score=hit.score, margin=hit.margin, why=why) for hit, why in zip(hits, whys)]


def _facts(item: Item) -> dict[str, Any]:
    """What a client may know of an item: not where its photo lies."""
    return {
        "item_id": item.item_id,
        "title": item.title,
        "label": item.label,
        "attributes": item.attributes,
        "photo": f"items/{quote(item.item_id, safe='')}/photo",
    }


def _attention(weights: np.ndarray) -> Attention:
    side = math.isqrt(len(weights))
    return Attention(rows=side, columns=side, weights=weights.tolist(), heat=heat_uri(weights))
