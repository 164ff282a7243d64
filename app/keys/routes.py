"""Keys over HTTP. A key manages keys of its own tenant only."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response

from app.keys import schemas, service
from app.keys.tables import ApiKey
from app.paging import Limit, Page
from app.problem import documented
from app.security.dependencies import Wired, allowed
from app.security.principal import Principal

router = APIRouter(prefix="/v1/keys", tags=["keys"])

Admin = Annotated[Principal, allowed("admin")]


@router.post("", status_code=201)
def create(order: schemas.KeyOrder, wiring: Wired, principal: Admin, response: Response) -> schemas.NewKey:
    """Make a key. The answer is the only place where its text ever appears."""
    expires_at = order.expires_at.timestamp() if order.expires_at else None
    with wiring.database.writing() as session:
        issued = service.issue(session, principal.tenant, order.name, list(order.scopes), expires_at)
    response.headers["Location"] = f"/v1/keys/{issued.key.id}"
    return schemas.NewKey(**_answer(issued.key).model_dump(), key=issued.token)


@router.get("")
def index(wiring: Wired, principal: Admin, limit: Limit = 20, after: str | None = None) -> Page[schemas.Key]:
    """The keys of this tenant, newest first."""
    with wiring.database.reading() as session:
        keys, more = service.page(session, principal, limit, after)
    return Page(data=[_answer(key) for key in keys], has_more=more)


@router.get("/{key_id}", responses=documented(404))
def show(key_id: str, wiring: Wired, principal: Admin) -> schemas.Key:
    with wiring.database.reading() as session:
        return _answer(service.get(session, principal, key_id))


@router.delete("/{key_id}", status_code=204, responses=documented(404, 409))
def revoke(key_id: str, wiring: Wired, principal: Admin) -> None:
    """Refuse this key from now on. Processes that know it follow within seconds."""
    service.revoke(wiring, principal, key_id)


def _answer(key: ApiKey) -> schemas.Key:
    return schemas.Key.model_validate({**vars(key), "object": "key"})
