"""`POST /v1/embeddings` as OpenAI's clients call it: texts to vectors, and photos as data URLs."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from fieldmark.errors import FieldmarkError
from fieldmark.search.answers import Words
from fieldmark.search.uploads import DATA_URL, from_data_url

if TYPE_CHECKING:
    from fieldmark.search.encoding import Encoded
    from fieldmark.search.service import Service

MAX_INPUTS, MAX_TEXT = 256, 8192


class EmbeddingsRequest(BaseModel):
    """What is to be embedded."""

    input: Words | Annotated[list[Words], Field(min_length=1, max_length=MAX_INPUTS)] = Field(
        description="A text or a list of texts, where the student embeds texts. An input that begins with "
        "`data:image/` is a photo (data:image/jpeg;base64,...), which OpenAI's service does not take."
    )
    model: Words = Field(description="The student's name (see /about).")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32.")
    dimensions: int | None = Field(None, description="Accepted where it is the student's own number.")
    user: str | None = None


class Embedding(BaseModel):
    """The vector of an input, of length one."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that the student read, its prompts included; photos count where the student reads them as tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


def embeddings_router(service: Service) -> APIRouter:
    """The operation over a service's student."""
    router = APIRouter(tags=["embeddings"])

    @router.post("/v1/embeddings")
    async def embeddings(request: EmbeddingsRequest) -> EmbeddingsAnswer:
        """Embeds texts or photos."""
        if request.model != service.model:
            raise HTTPException(404, f"The model {request.model!r} is not served; give {service.model!r}.")
        dim = service.store.card.model.dim
        if request.dimensions not in (None, dim):
            raise FieldmarkError(f"dimensions {request.dimensions} was given; this student gives {dim}.")
        inputs = [request.input] if isinstance(request.input, str) else request.input
        found = await asyncio.gather(*(_embedded(service, one) for one in inputs))
        tokens = sum(one.tokens for one in found)
        data = [
            Embedding(index=index, embedding=_written(one.vector, request.encoding_format))
            for index, one in enumerate(found)
        ]
        return EmbeddingsAnswer(data=data, model=service.model, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))

    return router


async def _embedded(service: Service, given: str) -> Encoded:
    if given.startswith(DATA_URL):
        return await service.encode(from_data_url(given), None)
    if not given.strip():
        raise FieldmarkError("An empty text was given; expected words.")
    if len(given) > MAX_TEXT:
        raise FieldmarkError(
            f"A text of {len(given):,} characters was given; expected at most {MAX_TEXT:,}; shorten it."
        )
    return await service.encode(None, given)


def _written(vector: np.ndarray, form: str) -> list[float] | str:
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
