"""Requests made from a service's own description: right, wrong and hostile, by a seed."""

from __future__ import annotations

import json
import random
from typing import Any
from urllib.parse import quote

from helpers_photos import png_bomb
from helpers_service import GONE, jpeg, png

NAMES = ["../../../etc/passwd", "x" * 4000 + ".jpg", "a\\b.jpg", "\u202egpj.exe", "con", ".jpg", "%00.jpg", "a;b.jpg"]


def operations(description: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, one) for path, methods in description["paths"].items() for method, one in methods.items()]


class Fuzz:
    """Requests from the description, right, wrong and hostile, by a seed."""

    TEXTS = (
        "", " ", "red bird", "item-03", "shelf/1", "..", "../../etc/passwd", "\0", "a\0b", "é鳥", "\u202e", "x" * 3000,
        "'", "' OR 1=1 --", "main_colour = 'red'", "`order` = 'small'", "label = repeat('a', 99999999)", "((((",
        "%s%n", "${x}", "<script>", "{{7*7}}", "-1", "0", "5", "1e9", "NaN", "true", "null", "[]", "base64", "float",
        "data:image/png;base64,", "data:image/png;base64,iVBORw0KGgo=", "http://127.0.0.1/", "student-photos",
        "student-texts", "<|image_pad|>", "\u0301" * 200, "\ufeff", "NOT " * 90, "12345678901234567890",
    )  # fmt: skip
    FILES = (
        b"",
        b"x",
        png(1),
        jpeg(2),
        jpeg(2)[:200],
        png(1)[:-20],
        bytes(2000),
        png_bomb(30_000, 30_000),
        b"GIF89a" + bytes(9),
    )

    def __init__(self, description: dict[str, Any], seed: int) -> None:
        self.random, self.operations = random.Random(seed), operations(description)
        self.schemas = description["components"]["schemas"]

    def value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """Mostly of the schema's type, at times of any."""
        roll = self.random.random()
        if roll < 0.1:
            return self.random.choice([None, True, -1, 3.5, 10**30, [], {}, "", [[]], {"a": 1}, *self.TEXTS[:8]])
        if "$ref" in schema:
            return self.value(self.schemas[schema["$ref"].rpartition("/")[2]], depth)
        if "anyOf" in schema:
            return self.value(self.random.choice(schema["anyOf"]), depth)
        if "enum" in schema or "const" in schema:
            return self.random.choice([*schema.get("enum", [schema.get("const")]), "other"])
        kind = schema.get("type")
        if kind == "object":
            return {
                name: self.value(one, depth + 1)
                for name, one in schema.get("properties", {}).items()
                if self.random.random() < 0.8
            }
        if kind == "array":
            return [self.value(schema["items"], depth + 1) for _ in range(self.random.choice([0, 1, 2, 5]))]
        if kind in ("integer", "number"):
            return self.random.choice([-1, 0, 1, 3, 10, 64, 200, 201, 2**31, 2**63, 2**70])
        if kind == "boolean":
            return self.random.choice([True, False])
        return self.random.choice(self.TEXTS) + self.random.choice(["", "", "", self.random.choice(self.TEXTS)])

    def request(self) -> tuple[str, str, dict[str, Any]]:
        """Method, path and what httpx is given."""
        path, method, one = self.random.choice(self.operations)
        given: dict[str, Any] = {"params": {}}
        for parameter in one.get("parameters", []):
            value = self.value(parameter["schema"])
            if parameter["in"] == "path":
                text = self.random.choice(["item-03", "shelf/1", GONE, str(value)])
                path = path.replace(f"{{{parameter['name']}}}", quote(text, safe=self.random.choice(["", "/"])))
            elif self.random.random() < 0.8:
                given["params"][parameter["name"]] = (
                    [str(part) for part in value] if isinstance(value, list) else str(value)
                )
        for kind, content in one.get("requestBody", {}).get("content", {}).items():
            body = self.value(content["schema"])
            if kind == "application/json":
                given["content"] = json.dumps(body).encode()[: self.random.choice([None, None, None, 7])]
                given["headers"] = {"Content-Type": kind}
            elif isinstance(body, dict):
                body.pop("image", None)
                given["data"] = {name: str(value) for name, value in body.items()}
                if self.random.random() < 0.7:
                    given["files"] = {"image": (self.random.choice(NAMES), self.random.choice(self.FILES))}
        if self.random.random() < 0.05:
            method = self.random.choice(["get", "post", "put", "delete", "patch", "options"])
        return method.upper(), path, given
