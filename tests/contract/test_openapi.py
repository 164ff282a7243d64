"""The OpenAPI document is a promise: it changes only on purpose, and it tells of errors as they are.

After a change on purpose: `python tests/contract/test_openapi.py` writes the snapshot anew; read its difference.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.main import create_app
from app.problem import MEDIA_TYPE
from app.settings import Settings

SNAPSHOT = Path(__file__).with_name("openapi.json")
_METHODS = {"get", "post", "put", "patch", "delete", "head"}


def document() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        found: dict[str, Any] = create_app(Settings(home=Path(home))).openapi()
    found["info"].pop("version")
    return found


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    return document()


def operations(openapi: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in openapi["paths"].items():
        for method, operation in item.items():
            if method in _METHODS:
                yield f"{method.upper()} {path}", operation


def test_the_document_is_the_one_that_was_promised(openapi: dict[str, Any]) -> None:
    promised = json.loads(SNAPSHOT.read_text())
    assert sorted(openapi["paths"]) == sorted(promised["paths"])
    for path, item in openapi["paths"].items():
        assert item == promised["paths"][path], (
            f"{path} changed; on purpose? python tests/contract/test_openapi.py"
        )
    assert openapi == promised


def test_every_error_is_documented_as_a_problem(openapi: dict[str, Any]) -> None:
    reference = {"$ref": "#/components/schemas/Problem"}
    for name, operation in operations(openapi):
        errors = {
            status: answer
            for status, answer in operation["responses"].items()
            if status == "default" or int(status) >= 400
        }
        assert "default" in errors, name
        for status, answer in errors.items():
            if (name, status) != ("GET /readyz", "503"):  # what is missing is its answer
                assert answer["content"] == {MEDIA_TYPE: {"schema": reference}}, (name, status)


def test_every_route_but_health_asks_for_a_key(openapi: dict[str, Any]) -> None:
    without = {name for name, operation in operations(openapi) if not operation.get("security")}
    assert without == {"GET /healthz", "GET /readyz", "GET /metrics"}
    for name, operation in operations(openapi):
        assert (name in without) or {"401", "403"} <= operation["responses"].keys(), name


def test_operation_ids_are_short_and_unique(openapi: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, operation in operations(openapi)]
    assert len(set(names)) == len(names)
    assert max(len(name) for name in names) < 40


def test_answers_have_no_optional_members(openapi: dict[str, Any]) -> None:
    """A client must be able to rely on every member that the document names."""
    schemas = openapi["components"]["schemas"]
    loose = []
    for name in _answered(openapi):
        properties = set(schemas[name].get("properties", {}))
        missing = properties - set(schemas[name].get("required", ())) - {"object"}
        if missing:
            loose.append((name, sorted(missing)))
    assert loose == []


def test_every_reference_leads_to_a_schema(openapi: dict[str, Any]) -> None:
    named = {f"#/components/schemas/{name}" for name in openapi["components"]["schemas"]}
    used = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(openapi)))
    assert used - named == set()


def _answered(openapi: dict[str, Any]) -> set[str]:
    """Names of the schemas that answers are made of."""
    found: set[str] = set()
    todo = [operation["responses"] for _, operation in operations(openapi)]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found.add(name)
                todo.append(openapi["components"]["schemas"][name])
            todo.extend(node.values())
        elif isinstance(node, list):
            todo.extend(node)
    return found


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(document(), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
