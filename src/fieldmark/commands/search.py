"""`fieldmark search DB QUERY`."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import number, print_json, print_table, quiet_libraries
from fieldmark.commands.enriching import GeneratorOptions, ask_about_query, check_generator, check_takes_both
from fieldmark.commands.labelling import say
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from fieldmark.search.rows import Hit

logger = logging.getLogger(__name__)

URIS = ("aviary://", "tar://")


@dataclass
class SearchOptions(GeneratorOptions):
    """Arguments of `search`.

    Attributes:
        store: folder that `fieldmark index` made; behind it the query: the path of a photo, or a text.
        image: photo to search with: a path or uri.
        text: text to search with; together with a photo, both are one query.
        k: items to find.
        where: condition that items must meet, for example "colour = 'red'": SQL on item_id, title, label and
            attributes.
        hybrid: look for the text's words in titles and attributes too (with a photo, only there), and join both orders.
        model: where the student lies now, if not where it lay when the store was made.
        enrich: query lets --generator name attributes of the photo (and of its text), which then join the text.
        json: print one JSON object.
    """

    store: str
    image: str | None = None
    text: str | None = None
    k: int = 10
    where: str | None = None
    hybrid: bool = False
    model: str | None = None
    enrich: Literal["query", "none"] = "none"
    json: bool = False


SearchOptions.__doc__ = f"{SearchOptions.__doc__}\n{GeneratorOptions.__doc__}"


def run(argv: list[str]) -> None:
    """Prints the items nearest to a query."""
    options = parse(
        SearchOptions,
        _named(argv),
        prog="fieldmark search",
        description="Finds items by a photo, a text or both: `fieldmark search DB QUERY`.",
        positional=("store",),
        switches=("hybrid", "json"),
    )
    positive("k", options.k)
    quiet_libraries()
    from fieldmark.search.embedding import load_stored_student, query_vector
    from fieldmark.search.store import Store

    store = Store.open(options.store)
    _check(options, texts=store.card.model.texts)
    if not store.count():
        raise FieldmarkError(f"The store {options.store} has no items; index a catalogue into it first.")
    student = load_stored_student(store, options.model)
    words = options.text if options.hybrid else None
    # With a photo, words are looked for and not embedded: a student of photos alone can be asked so too.
    embedded = None if words and options.image else options.text
    added = None
    if options.enrich == "query":
        check_takes_both(student, f"the model of {options.store}")
        added = _describe(options, embedded)
        if not store.card.with_titles:
            logger.warning(
                "the items of %s have no titles in their vectors (--with_titles), attributes in queries do not belong "
                "to them",
                options.store,
            )
        embedded = added["text"]
    vector = query_vector(student, image=options.image, text=embedded)
    hits = store.search(vector, options.k, options.where, words)
    if options.json:
        query = {name: getattr(options, name) for name in ("image", "text", "where", "hybrid", "k")}
        results = [{name: value for name, value in asdict(hit).items() if name != "row"} for hit in hits]
        print_json({"query": query, **({"enriched": added} if added else {}), "results": results})
        return
    if added:
        _say_added(options, added)
    _print(options, hits, store.count())


def _named(argv: list[str]) -> list[str]:
    """The arguments with the query behind the store as `--image` or `--text`."""
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        return argv
    store, query, *rest = argv
    name = "--image" if _is_photo(query) else "--text"
    if any(word.partition("=")[0] == name for word in rest):
        raise FieldmarkError(f"The query {query!r} and {name} were given; give one of them.")
    return [store, f"{name}={query}", *rest]


def _is_photo(query: str) -> bool:
    """A file that is there, a uri, or a name that ends like a photo's."""
    from fieldmark.data.readers import PHOTO_SUFFIXES

    is_name = query.lower().endswith(PHOTO_SUFFIXES) and not any(map(str.isspace, query))
    return is_name or query.startswith(URIS) or os.path.isfile(query)


def _check(options: SearchOptions, *, texts: bool) -> None:
    """Refuses what cannot be searched with, before a model is loaded."""
    from fieldmark.data.photos import photo_fault

    if options.image is None and options.text is None:
        raise FieldmarkError("No query was given; give the path of a photo, a text, or both by --image and --text.")
    if options.text is not None and not options.text.strip():
        raise FieldmarkError("An empty text was given; expected words.")
    if options.hybrid and options.text is None:
        raise FieldmarkError("--hybrid was given without a text; give --text with the words to look for.")
    if options.text is not None and not texts and not (options.hybrid and options.image):
        raise FieldmarkError(
            f"A text was given, and the model of {options.store} embeds photos only; search with a photo, or with a "
            "photo and --text WORDS --hybrid."
        )
    check_generator(options)
    if options.enrich == "none" and options.generator is not None:
        raise FieldmarkError("--generator was given without --enrich; add --enrich query, or leave it out.")
    if options.enrich == "query" and (options.generator is None or options.image is None):
        lacking = "--generator" if options.generator is None else "a photo"
        raise FieldmarkError(f"--enrich query was given without {lacking}; give both, or leave it out.")
    fault = None if options.image is None else photo_fault(options.image)
    if fault is not None:
        raise FieldmarkError(f"The photo {options.image} cannot be read: {fault}.")


def _describe(options: SearchOptions, text: str | None) -> dict[str, Any]:
    """What is searched with in place of the text, the attributes in it (or why there are none), and the seconds."""
    from fieldmark.students.enrich import enriched_text

    assert options.image is not None
    answer, seconds = ask_about_query(options, options.image, text)
    joined = enriched_text(text, answer.attributes) or None
    return {"text": joined, "attributes": answer.attributes, "invalid": answer.reason, "seconds": seconds}


def _say_added(options: SearchOptions, added: dict[str, Any]) -> None:
    from fieldmark.students.enrich import enriched_text

    what = enriched_text(None, added["attributes"]) or f"nothing, the answer is not valid: {added['invalid']}"
    say(f"added by {options.generator} in {added['seconds']:.3f} s: {what}")


def _print(options: SearchOptions, hits: list[Hit], count: int) -> None:
    asked = " and ".join(part for part in (options.image, options.text and repr(options.text)) if part)
    where = f" where {options.where}" if options.where else ""
    title = f"{len(hits)} of {count:,} items for {asked}{where}"
    columns = ("item", "score", "margin", "label", "title")
    print_table(title, columns, [
        (hit.item_id, number(hit.score), number(hit.margin), hit.label or "–", hit.title or "–") for hit in hits
    ])  # fmt: skip
