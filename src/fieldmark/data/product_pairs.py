"""Pairs of one product for contrastive training: what one step sees, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fieldmark.data.batches import stable_random
from fieldmark.errors import FieldmarkError

# AFMRL trains for cross-modal and for product retrieval (papers.md 2.9): what the query and the candidate show.
TASKS = ("image-text", "text-image", "product")
_ORDER, _PARTNER, _SAMPLE = range(3)  # random streams that must not share a seed


def sample_products(labels: Sequence[str | None], most: int, *, seed: int) -> list[int]:
    """Items in whole products, drawn by the seed: as many as fit into `most`; an item without a label is its own."""
    items_of: dict[object, list[int]] = {}
    for item, label in enumerate(labels):
        items_of.setdefault(item if label is None else label, []).append(item)
    products = list(items_of.values())
    chosen: list[int] = []
    for place in stable_random(seed, _SAMPLE).permutation(len(products)).tolist():
        if len(chosen) + len(products[place]) <= most:
            chosen += products[place]
    return sorted(chosen)


class ProductPairs:
    """Batch sampler of a whole run: steps take the tasks in turn; each has its own shuffled epochs of queries.

    The candidate of an `image-text` or `text-image` query is the other half of the same item, that of a `product` query
    another item of the same label.

    Args:
        labels: product of each of N items, None where unknown.
        tasks: some of `TASKS`.
        pairs_per_batch: pairs of all processes together.
        seed: shuffles.
        steps: optimizer steps of the run.
        world_size: processes.

    Raises:
        FieldmarkError: an unknown task, fewer queries than pairs, no product of two items, or a batch that the
            processes cannot share.
    """

    def __init__(
        self,
        labels: Sequence[str | None],
        tasks: Sequence[str],
        pairs_per_batch: int,
        *,
        seed: int,
        steps: int,
        world_size: int = 1,
    ) -> None:
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            raise FieldmarkError(f"tasks {list(tasks)} were given; expected one or more of {', '.join(TASKS)}")
        if pairs_per_batch % world_size:
            raise FieldmarkError(
                f"a batch of {pairs_per_batch} pairs cannot be shared by {world_size} processes; give a multiple"
            )
        self.items_of: dict[str, list[int]] = {}
        for item, label in enumerate(labels):
            if label is not None:
                self.items_of.setdefault(label, []).append(item)
        self.labels, self.tasks, self.pairs, self.seed, self.steps = labels, tuple(tasks), pairs_per_batch, seed, steps
        self.batch_size = pairs_per_batch // world_size
        self.drop_last = True
        self.queries = {task: self._queries(task) for task in self.tasks}

    def _queries(self, task: str) -> list[int]:
        if task != "product":
            found = list(range(len(self.labels)))
        else:
            found = sorted(item for items in self.items_of.values() if len(items) > 1 for item in items)
            if not found:
                raise FieldmarkError(
                    "no product has two items to find each other; train for image-text and text-image alone, or name "
                    "the column of products with --label_column"
                )
        if not 1 <= self.pairs <= len(found):
            raise FieldmarkError(
                f"{self.pairs} pairs a batch were asked for; there are {len(found)} queries for the task {task}"
            )
        return found

    def task(self, step: int) -> str:
        """The task of a step."""
        return self.tasks[step % len(self.tasks)]

    def global_batch(self, step: int) -> list[tuple[int, int]]:
        """(query, candidate) items of a step, of all processes."""
        task = self.task(step)
        queries = self.queries[task]
        epoch, place = divmod(step // len(self.tasks), len(queries) // self.pairs)
        order = stable_random(self.seed, epoch, _ORDER, self.tasks.index(task)).permutation(len(queries))
        chosen = [queries[i] for i in order[place * self.pairs : (place + 1) * self.pairs].tolist()]
        return [(query, self._partner(query, step) if task == "product" else query) for query in chosen]

    def _partner(self, query: int, step: int) -> int:
        others = [item for item in self.items_of[self.labels[query] or ""] if item != query]
        return others[int(stable_random(self.seed, step, _PARTNER, query).integers(len(others)))]

    def table(self) -> dict[str, list[int]]:
        """`query`, `candidate` and `step` of every pair of the run; the batches are ranges of these rows."""
        rows = [(*pair, step) for step in range(self.steps) for pair in self.global_batch(step)]
        return {name: [row[place] for row in rows] for place, name in enumerate(("query", "candidate", "step"))}

    def __len__(self) -> int:
        return self.steps * self.pairs // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.steps * self.pairs, self.batch_size):
            yield list(range(start, start + self.batch_size))
