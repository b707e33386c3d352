from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.bundles import make_bundle, tiny_encoder
from support.processes import PATIENCE_SECONDS, wait_until

from geosurge import store as stores
from geosurge.bundle import read_manifest
from geosurge.errors import UsageError
from geosurge.server.loader import Loader
from geosurge.settings import ENVIRONMENT_PREFIX, ServerSettings, unknown_variables

CHECKOUT = Path(__file__).resolve().parents[3]
DEPLOY = CHECKOUT / "engine" / "deploy"
PROGRAM = "/opt/geosurge/bin/geosurge"
FILES = ("Dockerfile", "compose.yaml", "geosurge.service", "server.env", "README.md")
DEFAULTS = ServerSettings()


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, its lines joined."""

    name: str
    arguments: str


def instructions() -> list[Instruction]:
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [Instruction(name, arguments.strip()) for name, _, arguments in found]


def arguments_of(name: str) -> list[str]:
    return [instruction.arguments for instruction in instructions() if instruction.name == name]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for value in arguments_of("ENV") for pair in value.split())


def unit() -> dict[str, list[str]]:
    """The unit's settings, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "geosurge.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def unit_environment(state: Path, cache: Path) -> dict[str, str]:
    values = [value.replace("%S", str(state)).replace("%C", str(cache)) for value in unit()["Environment"]]
    return dict(value.split("=", 1) for value in values)


def compose() -> dict[str, Any]:
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(content, dict)
    return content


def environment_file() -> dict[str, str]:
    lines = (DEPLOY / "server.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def installed_program() -> str:
    return str(Path(sys.executable).with_name("geosurge"))


@contextmanager
def started_unit(directory: Path, store: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """What systemd would start, on free ports; and the address of its monitoring."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    environment |= unit_environment(directory / "state", directory / "cache")
    shutil.copytree(store, environment["GEOSURGE_INDEX"])
    Path(environment["GEOSURGE_SCRATCH"]).mkdir(parents=True)
    # As an administrator's environment file would, which wins over the unit.
    environment |= {"GEOSURGE_PORT": "0", "GEOSURGE_METRICS_PORT": "0"}
    [command] = unit()["ExecStart"]
    log = directory / "log"
    words = command.replace(PROGRAM, installed_program()).split()
    with log.open("wb") as output, subprocess.Popen(words, stderr=output, env=environment) as process:
        try:

            def announced() -> re.Match[str] | None:
                assert process.poll() is None, log.read_text()
                return re.search(r"^serving .*, monitoring on (\S+)$", log.read_text(), re.MULTILINE)

            yield process, wait_until(announced, "the server announces itself")[1]
        finally:
            process.kill()


def probe(address: str, path: str = "/readyz") -> int:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
        return int(answer.status)


def health_check(address: str) -> int:
    """Runs the image's HEALTHCHECK against a server."""
    [check] = arguments_of("HEALTHCHECK")
    program, *rest = json.loads(check.partition("CMD ")[2])
    assert program == "python"
    environment = {**os.environ, "GEOSURGE_METRICS_PORT": address.rpartition(":")[2]}
    return subprocess.run([sys.executable, *rest], env=environment, capture_output=True, check=False).returncode


def seconds(value: str) -> float:
    return float(value.removesuffix("s"))


def sizing() -> dict[str, str]:
    """The README's table of sizes."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    return {name: value.strip() for name, value in rows}


def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(CHECKOUT / "tests" / "benchmarks" / "sizing.py"))


@pytest.mark.parametrize("name", FILES)
def test_every_variable_and_flag_is_a_setting(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert unknown_variables(dict.fromkeys(re.findall(r"GEOSURGE_[A-Z_]+", text), "")) == {}
    flags = re.findall(r"geosurge serve((?: --[a-z-]+(?: [^-\s`]\S*)?)*)", text)
    named = {flag.replace("-", "_") for line in flags for flag in re.findall(r"--([a-z-]+)", line)}
    assert named <= {*ServerSettings.model_fields, "help", "config"}


def test_the_settings_are_accepted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOSURGE_TOKENS", f"locate:{'a' * 32}")
    files = {name: tmp_path / name for name in ("tls_certificate", "tls_key", "token_file")}
    for path in files.values():
        path.write_text("")
    for environment in (image_environment(), unit_environment(tmp_path, tmp_path), environment_file()):
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            settings = ServerSettings(**files)  # type: ignore[arg-type]
        assert settings.drain_seconds == 0.0


def test_the_image_alone_does_not_serve_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in image_environment().items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="can be reached from other machines"):
        ServerSettings()


def test_the_unit_is_valid(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("there is no systemd-analyze")
    copy = tmp_path / "geosurge.service"
    copy.write_text((DEPLOY / "geosurge.service").read_text().replace(PROGRAM, installed_program()))
    done = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    judged = [analyze, "security", "--offline=true", "--threshold=20", str(copy)]
    done = subprocess.run(judged, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_supervisors_wait_longer_than_the_server_takes_to_stop() -> None:
    longest = DEFAULTS.drain_seconds + DEFAULTS.grace_seconds
    assert seconds(unit()["TimeoutStopSec"][0]) > longest
    for service in compose()["services"].values():
        assert seconds(service["stop_grace_period"]) > longest


def test_supervisors_start_a_server_again_that_crashed_but_not_one_with_wrong_settings() -> None:
    assert unit()["Restart"] == ["on-failure"]
    assert unit()["RestartPreventExitStatus"] == [str(UsageError.exit_code)]
    assert {service["restart"] for service in compose()["services"].values()} == {"unless-stopped"}


def test_the_unit_starts_reloads_and_stops_with_success(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name, seed in (("first", 1), ("second", 2)):
        bundle = make_bundle(tmp_path / name, name=name, seed=seed, encoder=tiny_encoder())
        stores.publish(store, bundle, verify=False, activate=name == "first")
    with started_unit(tmp_path, store) as (process, address):
        assert probe(address) == 200
        assert health_check(address) == 0
        [reload] = unit()["ExecReload"]
        stores.activate(tmp_path / "state" / "geosurge" / "indexes", "second")
        subprocess.run(shlex.split(reload), env={**os.environ, "MAINPID": str(process.pid)}, check=True)

        def activated() -> bool:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as page:
                return b'geosurge_active_version{version="second"} 1.0' in page.read()

        wait_until(activated, "the version that the store names is active")
        [number] = unit()["KillSignal"]
        process.send_signal(signal.Signals[number])
        assert process.wait(PATIENCE_SECONDS) == 0
        assert health_check(address) != 0
    assert list((tmp_path / "cache" / "geosurge").iterdir()) == []


def test_the_dockerfile_is_made_of_known_instructions_in_order() -> None:
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "EXPOSE", "USER", "STOPSIGNAL", "HEALTHCHECK"}
    names = [instruction.name for instruction in instructions()]
    assert set(names) == {*known, "ENTRYPOINT", "CMD"}
    assert names[:2] == ["ARG", "FROM"]
    assert arguments_of("FROM") == ["${BASE} AS build", "${BASE}"]
    # Only the last one counts.
    for name in ("USER", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"):
        assert len(arguments_of(name)) == 1
        assert names.index(name) > len(names) - 1 - names[::-1].index("FROM")
    for name in ("VOLUME", "ENTRYPOINT", "CMD"):
        assert all(isinstance(word, str) for word in json.loads(arguments_of(name)[0]))


def test_build_arguments_are_declared_and_choose_an_extra() -> None:
    declared = {value.partition("=")[0]: value.partition("=")[2] for value in arguments_of("ARG")}
    assert declared == {"BASE": "python:3.11-slim", "DEVICE": "cpu"}
    text = " ".join(instruction.arguments for instruction in instructions())
    assert set(re.findall(r"\$\{(\w+)\}", text)) == {*declared, "PATH"}
    extras = (CHECKOUT / "pyproject.toml").read_text()
    for device in ("cpu", "gpu"):
        assert f"\n{device} = [" in extras
        assert re.search(rf"\b{device}\) set --", text)
    for name, service in compose()["services"].items():
        assert service["build"]["args"] == {"DEVICE": name}
        assert service["build"]["dockerfile"] == str((DEPLOY / "Dockerfile").relative_to(CHECKOUT))
        assert (DEPLOY / service["build"]["context"]).resolve() == CHECKOUT


def test_what_is_copied_is_there_and_passes_the_ignore_file() -> None:
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied: set[str] = set()
    for value in arguments_of("COPY"):
        words = [word for word in value.split() if not word.startswith("--")]
        if "--from=build" not in value:
            copied.update(words[:-1])
    assert copied == allowed
    assert all((CHECKOUT / path).exists() for path in copied)


def test_the_image_is_no_root_and_holds_no_secret() -> None:
    [user] = arguments_of("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert arguments_of("STOPSIGNAL") == ["SIGTERM"]
    assert json.loads(arguments_of("VOLUME")[0]) == [image_environment()["GEOSURGE_INDEX"]]
    assert f"{DEFAULTS.port} {image_environment()['GEOSURGE_METRICS_PORT']}" in arguments_of("EXPOSE")
    named = {*image_environment(), *(value.partition("=")[0] for value in arguments_of("ARG"))}
    assert not [name for name in named if re.search("TOKEN|KEY|SECRET|PASSWORD", name)]


def test_the_compose_services_are_closed_and_differ_in_the_device_alone() -> None:
    content = compose()
    assert set(content["services"]) == {"cpu", "gpu"}
    named = {mount.partition(":")[0] for mount in content["services"]["cpu"]["volumes"]}
    assert named == {*content["volumes"], "/etc/geosurge"}
    for service in content["services"].values():
        targets = {mount.split(":")[1] for mount in service["volumes"]}
        assert {image_environment()["GEOSURGE_INDEX"], image_environment()["GEOSURGE_SCRATCH"]} <= targets
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["ports"] == [f"{DEFAULTS.port}:{DEFAULTS.port}"]
        assert (DEPLOY / service["env_file"]).is_file()
    cpu, gpu = content["services"]["cpu"], content["services"]["gpu"]
    assert {name for name in gpu if cpu.get(name) != gpu[name]} == {
        "profiles",
        "image",
        "build",
        "environment",
        "deploy",
    }
    assert gpu["profiles"] == ["gpu"]
    assert gpu["environment"] == {"GEOSURGE_DEVICE": "cuda"}
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


async def test_sizes_are_those_that_the_server_reckons_with(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny", encoder=tiny_encoder())
    sizes = benchmark()["manifest_sizes"](read_manifest(bundle))
    loader = Loader(None, device="cpu", limits=None, max_batch_size=1, scratch=tmp_path)  # type: ignore[arg-type]
    try:
        needs = await loader.needs(bundle)
    finally:
        loader.stop()
    assert 1e6 * (sizes["index_mb"] + sizes["encoder_mb"]) == pytest.approx(needs.memory_bytes)


def test_the_page_tells_what_the_script_prints() -> None:
    script = benchmark()
    told = sizing()
    named = set(re.findall(r"``(\w+)``", script["__doc__"]))
    assert set(told) == named
    computed = script["manifest_sizes"](read_manifest(stores.resolve_bundle(CHECKOUT / "indexes")))
    assert {name: told[name] for name in computed} == {name: f"{value:.1f}" for name, value in computed.items()}


def test_the_page_tells_the_defaults() -> None:
    text = (DEPLOY / "README.md").read_text()
    for name in ("max_batch_size", "max_loaded_versions", "max_stream_window"):
        flag = f"--{name.replace('_', '-')}"
        assert f"`{flag}` ({getattr(DEFAULTS, name)})" in text, flag
