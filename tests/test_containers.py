"""The container files say what they promise: unprivileged, health-checked, GPU reserved, no secrets copied in."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())


def stages() -> dict[str, tuple[str, str]]:
    """Return stage name -> (its base, its instructions)."""
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {name: (base, body) for base, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}


def test_the_default_target_is_cpu_and_the_base_is_an_argument() -> None:
    assert list(stages())[-1] == "cpu"
    assert re.search(r"^ARG BASE=\S+$", DOCKERFILE, flags=re.MULTILINE)
    assert stages()["base"][0] == "${BASE}"


def test_both_images_end_unprivileged_and_without_a_build_stage() -> None:
    for name in ("cpu", "gpu"):
        base, body = stages()[name]
        assert base == "base"
        assert body.strip().splitlines()[-1] == "USER astroclip"
        assert not re.search(r"apt-get|pip install", body + stages()["base"][1])


def test_the_health_check_asks_readiness() -> None:
    assert re.search(r"HEALTHCHECK .*CMD python(.|\n)*/readyz", stages()["base"][1])


def test_compose_has_a_cpu_service_and_a_gpu_service_with_a_reservation() -> None:
    services = COMPOSE["services"]
    assert {name: service["build"]["target"] for name, service in services.items()} == {"cpu": "cpu", "gpu": "gpu"}
    (device,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in services["cpu"]
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(volume.endswith(":ro") for volume in service["volumes"])
        assert service["ports"] == ["${ASTROCLIP_BIND:-127.0.0.1:8000}:8000"]


def test_the_build_context_is_an_allow_list_that_holds_every_copied_path() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", stages()["build"][1], flags=re.MULTILINE)
    wanted = {path.partition("/")[0] for line in copied for path in line.split()}
    assert wanted <= allowed
    assert {"astroclip", "index", "service"} <= allowed


def test_the_smoke_script_is_valid_shell() -> None:
    subprocess.run(["sh", "-n", str(ROOT / "docker/smoke.sh")], check=True)
