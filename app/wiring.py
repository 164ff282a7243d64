"""What an entry point builds once and hands down: settings, database, blobs, doorbell."""

from __future__ import annotations

from dataclasses import dataclass, field

from app import storage
from app.caching import Rendered
from app.db import Database
from app.doorbell import Doorbell
from app.security.principal import PrincipalCache
from app.settings import Settings
from app.storage import BlobStore


@dataclass(frozen=True)
class Wiring:
    settings: Settings
    database: Database
    blobs: BlobStore
    doorbell: Doorbell
    callers: PrincipalCache = field(default_factory=PrincipalCache)
    rendered_jobs: Rendered = field(default_factory=Rendered)

    @classmethod
    def build(cls, settings: Settings) -> Wiring:
        return cls(
            settings=settings,
            database=Database(settings.database),
            blobs=storage.connect(settings.storage, settings.storage_options),
            doorbell=Doorbell(settings.redis),
        )

    def close(self) -> None:
        self.doorbell.close()
        self.database.close()
