"""Keys over HTTP, and what every key may and may not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from app import main
from app.keys import service as keys
from app.settings import Settings
from app.wiring import Wiring

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Gateway

#: Nothing in these depends on the kind of database.
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def test_a_key_is_made_listed_used_and_revoked(client: httpx.Client, gateway: Gateway) -> None:
    made = client.post("/v1/keys", json={"name": "ci", "scopes": ["jobs:read"]})
    assert made.status_code == 201
    key = made.json()
    assert made.headers["location"] == f"/v1/keys/{key['id']}"
    assert key["key"].startswith(f"dram_{key['id'].removeprefix('key_')}_")

    listed = client.get("/v1/keys").json()
    assert [item["name"] for item in listed["data"]] == ["ci", "first key"]
    assert all("key" not in item and "secret_digest" not in item for item in listed["data"])
    assert client.get(f"/v1/keys/{key['id']}").json()["scopes"] == ["jobs:read"]

    with gateway.client(key["key"]) as other:
        assert other.get("/v1/methods").status_code == 200
        refused = other.get("/v1/keys")
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert "'admin'" in refused.json()["detail"]
        assert client.delete(f"/v1/keys/{key['id']}").status_code == 204
        refused = other.get("/v1/methods")
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]


def test_gateways_that_start_at_once_make_one_first_key(wiring: Wiring) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: keys.ensure_first_key(wiring), range(8)))
    assert len([key for key in made if key]) == 1


def test_pages_follow_each_other(client: httpx.Client) -> None:
    for number in range(4):
        client.post("/v1/keys", json={"name": str(number), "scopes": ["jobs:read"]})
    first = client.get("/v1/keys?limit=3").json()
    second = client.get(f"/v1/keys?limit=3&after={first['data'][-1]['id']}").json()
    assert ([len(first["data"]), first["has_more"]], [len(second["data"]), second["has_more"]]) == (
        [3, True],
        [2, False],
    )
    assert len({item["id"] for item in first["data"] + second["data"]}) == 5


@ONCE
@pytest.mark.parametrize(
    ("order", "pointer"),
    [
        ({"name": "", "scopes": ["jobs:read"]}, "/name"),
        ({"name": "a", "scopes": []}, "/scopes"),
        ({"name": "a", "scopes": ["root"]}, "/scopes/0"),
        ({"name": "a", "scopes": ["jobs:read"], "tenant": "rival"}, "/tenant"),
        ({"name": "a", "scopes": ["jobs:read"], "expires_at": "2030-01-01T00:00:00"}, "/expires_at"),
    ],
)
def test_a_wrong_order_says_where(client: httpx.Client, order: dict[str, object], pointer: str) -> None:
    answer = client.post("/v1/keys", json=order)
    assert answer.status_code == 422
    assert [item["pointer"] for item in answer.json()["errors"]] == [pointer]
    assert len(client.get("/v1/keys").json()["data"]) == 1


def test_the_last_key_that_manages_keys_stays(client: httpx.Client, gateway: Gateway) -> None:
    own = client.get("/v1/keys").json()["data"][0]["id"]
    refused = client.delete(f"/v1/keys/{own}")
    assert (refused.status_code, refused.json()["code"]) == (409, "last_admin_key")
    assert client.get("/v1/keys").status_code == 200


def test_another_tenants_key_is_not_found(client: httpx.Client, gateway: Gateway) -> None:
    own = client.get("/v1/keys").json()["data"][0]["id"]
    with gateway.client(gateway.key_of("rival", "admin")) as rival:
        for method in ("GET", "DELETE"):
            answer = rival.request(method, f"/v1/keys/{own}")
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert own not in rival.get("/v1/keys").text


def _routes(tmp_path: Path) -> list[tuple[str, str]]:
    app = main.create_app(Settings(home=tmp_path / "routes"))
    return sorted(
        (method, context.path)
        for context in iter_route_contexts(app.routes)
        for method in (context.methods or ())
        if context.path.startswith("/v1/")
    )


@ONCE
def test_no_route_answers_without_a_key_or_with_a_wrong_host(
    anonymous: httpx.Client, gateway: Gateway, tmp_path: Path
) -> None:
    routes = _routes(tmp_path)
    assert len(routes) > 20
    for method, path in routes:
        concrete = path.replace("{", "x").replace("}", "x")
        for headers in ({}, {"Host": "x/healthz?"}, {"Authorization": "Bearer dram_x"}):
            answer = anonymous.request(method, concrete, headers=headers)
            assert answer.status_code == 401, (method, path, headers)


@ONCE
def test_no_route_answers_a_key_without_any_scope_of_use(gateway: Gateway, tmp_path: Path) -> None:
    """A key that may only upload reaches nothing else."""
    with gateway.client(gateway.key_of("default", "datasets:write")) as uploader:
        for method, path in _routes(tmp_path):
            if (method, path) in (("POST", "/v1/datasets"), ("DELETE", "/v1/datasets/{dataset_id}")):
                continue
            answer = uploader.request(method, path.replace("{", "x").replace("}", "x"), json=_body(path))
            assert answer.status_code == 403, (method, path)


@ONCE
def test_objects_of_nobody_are_404_everywhere(client: httpx.Client, tmp_path: Path) -> None:
    for method, path in _routes(tmp_path):
        if "{" in path:
            numbered = path.replace("{sample_id}", "0")  # the images of a job go by numbers
            answer = client.request(method, numbered.replace("{", "x").replace("}", "x"), json=_body(path))
            assert answer.status_code == 404, (method, path, answer.text)
            if method != "HEAD":
                assert answer.json()["code"].endswith("not_found") or answer.json()["code"].startswith(
                    "unknown_"
                )


def _body(path: str) -> dict[str, object] | None:
    """A body that is valid, so that only the scope is wrong: FastAPI looks at bodies first."""
    if path == "/v1/keys":
        return {"name": "a", "scopes": ["admin"]}
    if path == "/v1/webhooks":
        return {"url": "https://1.1.1.1/"}
    if path == "/v1/jobs":
        return {"dataset_id": "ds_1", "teacher_id": "efficientnet_lite0", "student": "conv4"}
    if path.endswith("/headers"):
        return {"headers": {}}
    return None
