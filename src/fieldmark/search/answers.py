"""What the service answers: results, items, embeddings, errors. The OpenAPI description is made of these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field
from starlette.responses import JSONResponse

ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 422: "invalid_request_error",
    429: "rate_limit_error", 500: "server_error", 503: "overloaded_error",
}  # fmt: skip


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("expected whole characters, and half of one (a lone surrogate) was given") from error
    return text


# A text that a client gives: JSON, and some encodings of forms, can name what no one can write.
Words = Annotated[str, AfterValidator(_whole)]


class Error(BaseModel):
    """What was wrong."""

    message: str = Field(description="What was given, what was expected, what to do, in one sentence.")
    type: str = Field(description="Kind of the error.", examples=sorted(set(ERROR_TYPES.values())))


class ErrorAnswer(BaseModel):
    """Every answer but those of success."""

    error: Error


class Difference(BaseModel):
    """An attribute in which two items differ."""

    here: str = Field(description="Its value of this item.")
    there: str = Field(description="Its value of the item that this one is compared with.")


class Why(BaseModel):
    """What is known of an item, beside what it is compared with. Attributes that only one of both has are left out."""

    compared_with: str | None = Field(
        description="item_id of the item whose attributes these are compared with: the query if it is an item, else "
        "the first result, since of a photo or a text no attributes are known. Null for the first result itself."
    )
    same: dict[str, str] = Field(description="Attributes with the same value.")
    different: dict[str, Difference] = Field(description="Attributes with another value.")
    words: list[str] = Field(description="Words of the query's text that stand in the item's title or attributes.")


class ItemAnswer(BaseModel):
    """An item of the store."""

    item_id: str
    title: str | None
    label: str | None
    attributes: dict[str, str]
    photo: str = Field(description="Where its photo is, relative to the service.")


class Result(ItemAnswer):
    """An item that was found."""

    score: float = Field(description="Cosine of its vector and the query's.")
    margin: float | None = Field(
        description="Score less that of the next item in order; null for the store's last. Below zero where words put "
        "an item before one with a greater cosine."
    )
    why: Why


class Attention(BaseModel):
    """Where the student's pooler looked in a photo."""

    rows: int
    columns: int
    weights: list[float] = Field(description="Of each part of the photo, row by row; they sum to 1.")
    heat: str = Field(description="The same as a transparent PNG (a data URI) to lay over the whole photo.")


class SearchAnswer(BaseModel):
    """Items by nearness, best first."""

    results: list[Result]
    attention: Attention | None = Field(None, description="Of the query's photo, where it was asked for.")


class ItemsAnswer(BaseModel):
    """Items in the order asked for."""

    items: list[ItemAnswer]


class Value(BaseModel):
    """A value of an attribute."""

    value: str
    count: int = Field(description="Items that have it.")


class Facet(BaseModel):
    """An attribute that items can be filtered by."""

    name: str
    column: str = Field(description="Its name in a filter.")
    values: list[Value] = Field(description="The most frequent first, at most 100.")
    n_values: int = Field(description="Number of all its values.")


class AboutAnswer(BaseModel):
    """What the service holds and takes."""

    model: str = Field(description="Name of the student, as /v1/embeddings takes it.")
    items: int
    dim: int = Field(description="Numbers a vector.")
    texts: bool = Field(description="Whether the student embeds texts as well as photos.")
    attention: bool = Field(description="Whether it can be seen where the student looks.")
    recall_at_10: float | None = Field(
        description="What search without a filter finds of the exact ten nearest items; null where it is exact."
    )
    urls: bool = Field(description="Whether a photo may be given as a URL.")
    max_body_mb: float
    facets: list[Facet]


class Health(BaseModel):
    """The service is up and can read its store."""

    status: Literal["ok"] = "ok"


def error_answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as every client gets it."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


# Errors that any operation may answer; FastAPI's own description of a 422 is another.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": ERROR_TYPES[status]} for status in sorted(ERROR_TYPES)
}
