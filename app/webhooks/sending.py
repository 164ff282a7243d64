"""One message to one webhook: signed as Standard Webhooks says, and sent once.

The specification: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app.errors import Unavailable
from app.security.egress import Egress
from app.security.secretbox import SecretBox
from app.settings import Settings
from app.webhooks.tables import Webhook
from models.errors import Unreachable
from models.teachers.http_endpoint import seconds_to_wait

_PREFIX = "whsec_"
_SECRET_BYTES = 32
#: From connecting to the answer's head; what it says besides is not read.
_TIMEOUT_S = 15.0
GONE = 410


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt. `reason`: why it failed; empty: it did not. `after_s`: the pause asked for."""

    http_status: int | None
    reason: str
    after_s: float = 0.0


def new_secret() -> str:
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def open_secrets(settings: Settings, webhook: Webhook, clock: float) -> list[str]:
    """The secrets to sign with now, the newest first; of those before it, the ones that can be opened.

    Raises `Unavailable` where the newest cannot.
    """
    box = SecretBox.opening(settings)
    opened = [box.open(webhook.secret, webhook.id).decode()]
    for sealed in valid(webhook.old_secrets, clock):
        with suppress(Unavailable):  # of a key that the service has lost
            opened.append(box.open(sealed, webhook.id).decode())
    return opened


def valid(old_secrets: Mapping[str, float], clock: float) -> dict[str, float]:
    """Those that still sign, with the moment until which they do."""
    return {sealed: until for sealed, until in old_secrets.items() if until > clock}


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """HMAC-SHA256 of `id.timestamp.body`, in the form `v1,<base64>`."""
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()


def send(
    egress: Egress, url: str, keys: Iterable[str], message_id: str, payload: dict[str, Any], clock: float
) -> Outcome:
    """Post a message, signed with each of the `keys`. `clock`: the attempt's time in seconds since 1970.

    The address is looked up and checked anew. The connection is not kept: the next message may be hours away.
    """
    body = json.dumps(payload, separators=(",", ":")).encode()
    timestamp = int(clock)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "dram-webhooks",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signature(key, message_id, timestamp, body) for key in keys),
    }
    try:
        answer = egress.post(url, body, headers, timeout_s=_TIMEOUT_S, max_bytes=None)
    except Unreachable as error:
        return Outcome(None, told(error))
    finally:
        egress.close()
    if 200 <= answer.status < 300:
        return Outcome(answer.status, "")
    asked = seconds_to_wait(answer.headers.get("retry-after", ""), clock)
    return Outcome(answer.status, _words(answer.status), asked or 0.0)


def told(error: Unreachable) -> str:
    """What is wrong, as a sentence; without the hint, which of an answer is about teachers."""
    return f"{error.detail[:1].upper()}{error.detail[1:]}."


def _words(status: int) -> str:
    if status == GONE:
        return "It answered 410 Gone: the webhook was disabled."
    if 300 <= status < 400:
        return (
            f"It answered {status}: redirects are not followed. Make a webhook with the address it leads to."
        )
    return f"It answered {status}; only a 2xx status says that a message was received."
