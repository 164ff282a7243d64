"""compose.yaml, as docker-compose itself reads it: it parses, and it keeps what the service relies on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).parents[2]
PROFILES = ("gpu", "cpu", "minio")
OURS = {"migrate", "gateway", "maintenance", "worker-gpu", "worker-cpu", "worker-cpu-only"}


def _compose() -> list[str]:
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if (
        shutil.which("docker")
        and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    ):
        return ["docker", "compose"]
    pytest.skip(
        "docker-compose is not installed: compose.yaml was not parsed by it (apt install docker-compose)"
    )


def resolved(*profiles: str, **environment: str) -> dict[str, Any]:
    """The services of these profiles, every variable and anchor resolved."""
    arguments = [part for profile in profiles for part in ("--profile", profile)]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    ran = subprocess.run(
        [*_compose(), "-f", ROOT / "compose.yaml", *arguments, "config"],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "WARN" not in ran.stderr.upper(), ran.stderr  # such as a variable without a value
    services: dict[str, Any] = yaml.safe_load(ran.stdout)["services"]
    return services


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return resolved(*PROFILES)


def test_every_profile_parses_with_its_services(services: dict[str, Any]) -> None:
    assert set(services) == OURS | {"redis", "postgres", "minio", "minio-bucket"}
    started = {name for name, service in services.items() if not service.get("profiles")}
    assert started == {"migrate", "gateway", "maintenance", "redis", "postgres"}


def test_nothing_of_ours_runs_as_root_and_everything_that_stays_is_checked(services: dict[str, Any]) -> None:
    for name in OURS:
        assert services[name]["user"] == "10001:10001", name
    lasting = {name for name, service in services.items() if service.get("restart") != "no"}
    assert [name for name in lasting if "healthcheck" not in services[name]] == []


def test_a_worker_is_not_healthy_because_another_one_answers(services: dict[str, Any]) -> None:
    checks = [" ".join(services[name]["healthcheck"]["test"]) for name in OURS if name.startswith("worker")]
    checks.append((ROOT / "docker" / "worker.Dockerfile").read_text())
    assert [
        check for check in checks if not re.search(r"ping .*--destination .?celery@\$+\(hostname\)", check)
    ] == []


def test_everything_waits_for_the_migration(services: dict[str, Any]) -> None:
    for name in OURS - {"migrate"}:
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully", name
    assert services["migrate"]["command"] == ["python", "-m", "app.migrate"]


def test_redis_keeps_its_keys(services: dict[str, Any]) -> None:
    command = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_the_gpu_worker_reserves_one_gpu_and_the_queues_are_all_served(services: dict[str, Any]) -> None:
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert queues(services["worker-cpu"]) == {"cpu"}
    assert queues(services["worker-cpu-only"]) == {"gpu", "cpu"}
    assert services["worker-cpu-only"]["environment"]["DRAM_DEVICE"] == "cpu"
    image = (ROOT / "docker" / "worker.Dockerfile").read_text()
    default = json.loads(
        re.findall(r"^CMD (\[.*?\])$", image, re.MULTILINE | re.DOTALL)[-1].replace("\\\n", "")
    )
    assert queues({"command": default}) == {"gpu"}


def test_passwords_come_from_the_environment() -> None:
    services = resolved(*PROFILES, POSTGRES_PASSWORD="mine", MINIO_ROOT_PASSWORD="own")
    assert "dram-development" not in json.dumps(services)
    assert (
        services["gateway"]["environment"]["DRAM_DATABASE_URL"] == "postgresql://dram:mine@postgres:5432/dram"
    )


def test_every_setting_can_be_made_in_the_environment() -> None:
    fixed = {"home", "database_url", "redis_url", "host", "port"}  # by what compose starts
    names = {f"DRAM_{name.upper()}" for name in Settings.model_fields.keys() - fixed}
    services = resolved(*PROFILES, **dict.fromkeys(names, "told"))
    for name in OURS:
        told = {key for key, value in services[name]["environment"].items() if value == "told"}
        assert names - told <= {"DRAM_DEVICE"}, name
    assert services["worker-gpu"]["environment"]["DRAM_DEVICE"] == "told"


def test_what_is_not_set_is_left_to_the_settings(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty value would be refused, and a default written in compose.yaml would be a second one."""
    usual = Settings()
    for name, value in services["gateway"]["environment"].items():
        if value is not None:
            monkeypatch.setenv(name, value)
    different = {name for name, value in Settings() if value != getattr(usual, name)}
    assert different == {"home", "database_url", "redis_url", "storage_url", "log_json"}


def test_networks_of_the_operator_are_there_for_all_who_read_the_file_of_teachers() -> None:
    for name, service in resolved(*PROFILES, DRAM_NETWORKS="/srv/networks").items():
        if name in OURS:
            assert "/srv/networks:/networks:ro" in service["volumes"], name


def test_answers_under_way_are_finished_before_the_gateway_is_killed(services: dict[str, Any]) -> None:
    image = (ROOT / "docker" / "gateway.Dockerfile").read_text()
    graceful = re.findall(r'"--timeout-graceful-shutdown", "(\d+)"', image)
    assert int(services["gateway"]["stop_grace_period"].removesuffix("s")) > int(graceful[0])


def test_only_the_gateway_is_reached_from_outside_and_only_from_this_machine(
    services: dict[str, Any],
) -> None:
    assert [name for name, service in services.items() if service.get("ports")] == ["gateway"]
    assert "127.0.0.1" in json.dumps(services["gateway"]["ports"])


def test_the_images_copy_only_what_exists_and_do_not_run_as_root() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name in ("gateway", "worker"):
        lines = (ROOT / "docker" / f"{name}.Dockerfile").read_text().splitlines()
        copied = [
            part
            for line in lines
            if line.startswith("COPY ") and "--from" not in line
            for part in line.split()[1:-1]
        ]
        assert copied != []
        for part in copied:
            assert (ROOT / part).exists(), part
            assert f"!{part}" in ignored, part
        users = [line.split()[1] for line in lines if line.startswith("USER ")]
        assert users[-1] == "10001:10001"


def queues(service: dict[str, Any]) -> set[str]:
    command = service["command"]
    return set(command[command.index("-Q") + 1].split(","))
