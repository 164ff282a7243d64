"""Webhooks of a tenant `t`, on both databases, that may lead to this machine."""

from __future__ import annotations

import base64

import pytest
from pydantic import SecretStr

from app.settings import Settings


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The loopback may be asked, and there is a key on either database."""
    key = base64.b64encode(bytes(range(32))).decode()
    return settings.model_copy(update={"egress_allow": ("127.0.0.0/8",), "secret_key": SecretStr(key)})
