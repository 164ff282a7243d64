"""Settings from DRAM_* environment variables. Built once by an entry point and handed down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.security.egress import Rule

#: Variable in which a child process is given its parent's settings, as JSON: its arguments could be read by everybody.
HANDED_ON = "DRAM_COMPUTE_SETTINGS"


class Settings(BaseSettings):
    """Every setting of gateway and workers. The defaults are the embedded service below `home`."""

    model_config = SettingsConfigDict(env_prefix="DRAM_", frozen=True)

    home: Path = Field(
        Path(".dram"), description="Folder of the embedded service: database, blobs, redis, logs."
    )
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite below home.")
    redis_url: str = Field("", description="redis:// or redis+socket:// URL; empty: set by `dram up`.")
    storage_url: str = Field(
        "", description="fsspec URL such as s3://bucket/prefix; empty: a folder below home."
    )
    storage_options: dict[str, str] = Field({}, description="fsspec options, such as endpoint_url, as JSON.")
    teachers_file: Path | None = Field(
        None, description="TOML list of the operator's own teachers and generators."
    )

    secret_key: SecretStr = Field(
        SecretStr(""),
        description="Encrypts the users' secrets: 32 bytes in base64; several, separated by commas: the first "
        "encrypts, all decrypt. Empty: the embedded service makes a file 'secret.key' below home.",
    )
    egress_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Destinations that users' URLs may name although they are private, plain http or on another "
        "port: host, host:port, CIDR or CIDR:port, separated by commas.",
    )

    host: str = "127.0.0.1"
    port: int = Field(8700, ge=0, le=65535)
    docs: bool = Field(True, description="Serve /docs and /openapi.json.")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="Where stages compute.")
    cpu_bfloat16: bool = Field(
        False, description="Train in bfloat16 on CPUs that have it: about 1.5 times faster for convolutions."
    )
    log_level: str = "INFO"
    log_json: bool = False

    max_upload_bytes: int = Field(512 * 2**20, ge=1, description="Largest request body.")
    max_model_bytes: int = Field(256 * 2**20, ge=1, description="Largest ONNX file of a user's teacher.")
    upload_deadline_s: float = Field(600, gt=0, description="Longest time a request body may take to arrive.")
    max_images: int = Field(10_000, ge=2, description="Most images in one data set.")
    max_image_bytes: int = Field(32 * 2**20, ge=1, description="Largest single image file.")
    max_image_pixels: int = Field(40_000_000, ge=1, description="Most pixels of a single image.")
    max_classes: int = Field(100, ge=2)
    max_shots: int = Field(
        50, ge=1, description="Most labelled images a class; with masks, in all so many for each class."
    )
    min_shots: int = Field(
        1,
        ge=1,
        description="Fewest labelled images a class; with masks, in all. Without test images never fewer than 2.",
    )
    image_timeout_s: float = Field(10, gt=0, description="Longest time one image may take to decode.")
    disk_reserve_bytes: int = Field(
        512 * 2**20, ge=0, description="Free space below which uploads are refused."
    )

    lease_ttl_s: float = Field(
        60, gt=0, description="A claim not renewed for so long may be taken by another."
    )
    heartbeat_s: float = Field(2, gt=0, description="Longest pause between two renewals of a claim.")
    stall_s: float = Field(1800, gt=0, description="A stage that reports no progress for so long is stopped.")
    checkpoint_s: float = Field(20, ge=0, description="Pause between two checkpoints of a long stage.")
    max_attempts: int = Field(3, ge=1, description="Times a shard may be claimed before its job fails.")
    reap_s: float = Field(5, gt=0, description="Pause between two rounds of the maintenance loop.")
    ring_again_s: float = Field(
        10, gt=0, description="Ready work that nobody took is announced again after this."
    )
    idle_restart_s: float = Field(
        120, gt=0, description="A worker that takes nothing for so long while work waits is restarted."
    )
    max_active_jobs: int = Field(100, ge=1, description="Unfinished jobs a tenant may have.")
    retention_days: float = Field(
        30,
        gt=0,
        description="So long live stage outputs and black boxes' answers from when they were last used, idempotency "
        "keys, messages to webhooks, and, from a job's end, its images where their data set was deleted.",
    )

    @field_validator("egress_allow", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("egress_allow")
    @classmethod
    def _can_be_read(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            Rule.parse(text)
        return value

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home.absolute() / 'dram.db'}"

    @property
    def storage(self) -> str:
        return self.storage_url or f"file://{self.home.absolute() / 'blobs'}"

    @property
    def redis(self) -> str:
        return self.redis_url or f"redis+socket://{self.home.absolute() / 'redis.sock'}"
