"""`owned()` is the only way to reach a tenant's rows from a request: read from the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.tables import Base

ROOT = Path(__file__).resolve().parents[2]
TENANT_TABLES = frozenset(
    mapper.class_.__name__ for mapper in Base.registry.mappers if "tenant" in mapper.columns
)
_REACHES = {"select", "update", "delete", "insert", "get", "get_one", "query", "exists"}

#: Who may reach rows of every tenant, and why. A function, or a whole file where it serves no request.
ALLOWED = {
    "app/db.py:owned": "it is the filter",
    "app/keys/service.py:ensure_first_key": "runs at the first start, before there is a tenant",
    "app/keys/service.py:_look_up": "finds out who the tenant is",
    "app/keys/service.py:_note_use": "the key has just been looked up",
    "app/datasets/service.py:_discard": "equal blobs are one blob for all tenants",
    "app/jobs/claims.py": "workers act for every tenant, on ids that they were given by the database",
    "app/jobs/lifecycle.py": "acts on the job that its caller has found",
    "app/jobs/plan.py": "filters by the tenant of the job that it plans",
    "app/jobs/queries.py": "filters by the tenant of the job whose claim is held",
    "app/webhooks/delivery.py": "sends for every tenant",
    "app/retention.py": "housekeeping for every tenant",
}


def reaches(source: str, tables: frozenset[str] = TENANT_TABLES) -> Iterator[tuple[str, str]]:
    """(function, table) for each statement on a tenant's table that does not go through `owned`."""
    for function, call in _calls(ast.parse(source), ""):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        keyed = name in ("get", "get_one") and any(_names_tenant(argument) for argument in call.args[1:])
        if name in _REACHES and not keyed:
            for argument in call.args:
                table = argument.value if isinstance(argument, ast.Attribute) else argument
                if isinstance(table, ast.Name) and table.id in tables:
                    yield function, table.id


def _names_tenant(key: ast.AST) -> bool:
    """True for a primary key that the tenant is a part of."""
    return any(isinstance(part, ast.Attribute) and part.attr == "tenant" for part in ast.walk(key))


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(child, ast.Call):
            yield function, child
        yield from _calls(child, inside)


def found() -> set[tuple[str, str, str]]:
    places = set()
    for path in sorted((ROOT / "app").rglob("*.py")):
        file = str(path.relative_to(ROOT))
        places |= {(file, function, table) for function, table in reaches(path.read_text())}
    return places


def test_tables_with_a_tenant_are_known() -> None:
    assert {"Job", "Dataset", "Student", "ApiKey"} <= TENANT_TABLES


def test_requests_reach_tenant_tables_through_owned_only() -> None:
    stray = [
        f"{file}:{function} reaches {table} without owned()"
        for file, function, table in sorted(found())
        if file not in ALLOWED and f"{file}:{function}" not in ALLOWED
    ]
    assert stray == []


def test_every_exception_is_still_needed() -> None:
    needed = {place for file, function, _ in found() for place in (file, f"{file}:{function}")}
    unused = [place for place in ALLOWED if place not in needed and place != "app/db.py:owned"]
    assert unused == []


@pytest.mark.parametrize(
    "statement",
    [
        "sa.select(Job)",
        "select(Job.id)",
        "session.get(Job, job_id)",
        "sa.update(Job).where(Job.id == job_id)",
        "sa.select(Shard, Job).join(Job)",
    ],
)
def test_the_check_sees(statement: str) -> None:
    assert list(reaches(f"def show():\n    session.execute({statement})")) == [("show", "Job")]


@pytest.mark.parametrize(
    "statement",
    ["owned(Job, principal).where(Job.id == job_id)", "session.get(Job, (principal.tenant, key))"],
)
def test_the_check_lets_pass(statement: str) -> None:
    assert not list(reaches(f"def show():\n    session.scalar({statement})"))
