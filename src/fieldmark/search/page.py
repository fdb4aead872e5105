"""The page at `/`: one HTML file, one script, one style sheet, which ask the service as any client would.

It is not made with Gradio, whose page brings some fifty requests and a second interface of its own under
`/gradio_api`: tried with 6.31, that interface answered malformed requests with 500, and copied a file whose path a
client named. Here nothing but the service can be asked, no path can be given, and the page may load nothing else.
"""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

ASSETS = {"page.css": "text/css", "page.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def page_router() -> APIRouter:
    """The page and its assets."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("fieldmark.search") / "assets"
    html = (folder / "page.html").read_bytes()
    assets = {name: (folder / name).read_bytes() for name in ASSETS}

    @router.get("/")
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=HEADERS | {"Content-Security-Policy": POLICY})

    @router.get("/assets/{name}")
    async def asset(name: str) -> Response:
        if name not in assets:
            raise HTTPException(404, f"There is no {name!r}.")
        return Response(assets[name], media_type=ASSETS[name], headers=HEADERS)

    return router
