from __future__ import annotations

from pathlib import Path

import pytest

from geosurge.errors import ConfigurationError
from geosurge.settings import ServerSettings, load_settings, unknown_variables


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ServerSettings.model_fields, "tokens"]:
        monkeypatch.delenv(f"GEOSURGE_{name.upper()}", raising=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_defaults_are_local_and_valid() -> None:
    settings = load_settings()
    assert settings.host == "127.0.0.1"
    assert settings.port == 50051
    assert settings.decode_workers >= 1
    assert settings.max_receive_message_bytes > settings.max_image_bytes


def test_sizes_follow_from_each_other_where_they_are_not_set() -> None:
    settings = load_settings(max_batch_size=5, decode_workers=3)
    assert settings.max_requests_per_peer == settings.max_concurrent_requests == 5 + 2 * 3
    assert load_settings(max_batch_size=32, decode_workers=3).max_concurrent_requests == 2 * 32


def test_a_wrong_size_is_reported_once_and_not_for_the_sizes_that_follow_from_it() -> None:
    with pytest.raises(ConfigurationError, match=r"^--max-batch-size is 0: [^;]*$"):
        load_settings(max_batch_size=0)


def test_every_field_is_described() -> None:
    assert all(field.description for field in ServerSettings.model_fields.values())


def test_a_flag_wins_over_the_environment_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "server.toml", "port = 1\nmax_batch_size = 2\ngrace_seconds = 3.5\n")
    monkeypatch.setenv("GEOSURGE_PORT", "4")
    monkeypatch.setenv("GEOSURGE_MAX_BATCH_SIZE", "5")
    settings = load_settings(file, port=6, host=None)
    assert (settings.port, settings.max_batch_size, settings.grace_seconds) == (6, 5, 3.5)
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_batch = 3\n", r"max_batch in .*server.toml: there is no such setting; did you mean max_batch_size\?"),
        ("port = 70000\n", r"port in .*server.toml is 70000: input should be less than or equal to 65535"),
        ("port = \n", r"server.toml is not valid TOML"),
        ("[server]\nport = 1\n", r"server in .*server.toml: there is no such setting"),
        ("port = 'a'\nmax_batch_size = 0\n", r"port in .*'a'.*; max_batch_size in .* is 0"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_the_reason(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        load_settings(write(tmp_path / "server.toml", text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read the configuration file"):
        load_settings(tmp_path / "missing.toml")


def test_a_wrong_variable_and_a_wrong_flag_are_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOSURGE_PORT", "http")
    with pytest.raises(ConfigurationError, match="GEOSURGE_PORT in the environment is 'http'"):
        load_settings()
    with pytest.raises(ConfigurationError, match="--device is 'tpu'"):
        load_settings(port=1, device="tpu")


@pytest.mark.parametrize("value", ["tcp://10.0.0.3:50051", "udp://10.0.0.3:50051"])
def test_the_port_variable_of_a_kubernetes_service_is_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("GEOSURGE_PORT", value)
    monkeypatch.setenv("GEOSURGE_MAX_BATCH_SIZE", "5")
    settings = load_settings()
    assert (settings.port, settings.max_batch_size) == (50051, 5)
    assert load_settings(write(tmp_path / "server.toml", "port = 7\n")).port == 7
    assert load_settings(port=8).port == 8


def test_an_unknown_variable_is_reported_with_its_closest_setting() -> None:
    environment = {"GEOSURGE_MAX_BATCH_SIZ": "1", "GEOSURGE_PORT": "1", "HOME": "/", "GEOSURGE_QQ": ""}
    environment |= {"GEOSURGE_TOKEN": "", "GEOSURGE_TOKENS": "", "GEOSURGE_DEBUG": "1"}
    assert unknown_variables(environment) == {"GEOSURGE_MAX_BATCH_SIZ": "GEOSURGE_MAX_BATCH_SIZE", "GEOSURGE_QQ": None}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_listening_beyond_loopback_needs_an_explicit_flag(host: str) -> None:
    with pytest.raises(ConfigurationError, match="--allow-remote"):
        load_settings(host=host)
    assert load_settings(host=host, allow_remote=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_addresses_need_none(host: str) -> None:
    assert load_settings(host=host).host == host


def pem_files(directory: Path) -> dict[str, Path]:
    """Stand-ins for a certificate and its key; the settings look no further than whether they can be read."""
    return {name: write(directory / f"{name}.pem", "") for name in ("tls_certificate", "tls_key")}


def test_tls_with_credentials_may_listen_beyond_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = pem_files(tmp_path)
    other = write(tmp_path / "other", "")
    with pytest.raises(ConfigurationError, match=r"'0.0.0.0' .*no encryption; .*--tls-certificate.*--allow-remote"):
        load_settings(host="0.0.0.0", token_file=other)
    with pytest.raises(ConfigurationError, match=r"'0.0.0.0' .*anybody could call .*--token-file.*--tls-client-ca"):
        load_settings(host="0.0.0.0", **tls)
    assert load_settings(host="0.0.0.0", **tls, token_file=other).token_file == other
    assert load_settings(host="0.0.0.0", **tls, tls_client_ca=other).tls_client_ca == other
    assert load_settings(host="0.0.0.0", **tls, allow_remote=True).allow_remote
    monkeypatch.setenv("GEOSURGE_TOKENS", "admin:...")
    assert load_settings(host="0.0.0.0", **tls).host == "0.0.0.0"


def test_the_administration_is_exposed_no_more_easily(tmp_path: Path) -> None:
    tls = pem_files(tmp_path)
    for given in ({}, tls):
        with pytest.raises(ConfigurationError, match=r"admin_host '0.0.0.0' can be reached from other machines"):
            load_settings(admin_host="0.0.0.0", admin_port=0, **given)
    assert load_settings(admin_host="0.0.0.0", admin_port=0, **tls, token_file=tls["tls_key"]).admin_port == 0


def test_files_of_tls_come_together_and_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = pem_files(tmp_path)
    for alone in ("tls_certificate", "tls_key"):
        with pytest.raises(ConfigurationError, match="--tls-certificate and --tls-key come together"):
            load_settings(**{alone: tls[alone]})
    with pytest.raises(ConfigurationError, match="--tls-client-ca needs TLS"):
        load_settings(tls_client_ca=tls["tls_key"])
    missing = tmp_path / "missing"
    for name in ("tls_certificate", "tls_key", "tls_client_ca", "token_file"):
        for unreadable, reason in ((missing, "No such file"), (tmp_path, "Is a directory")):
            expected = rf"--{name.replace('_', '-')} is '{unreadable}': the file cannot be read \({reason}"
            with pytest.raises(ConfigurationError, match=expected):
                load_settings(**{**tls, name: unreadable})
    monkeypatch.setenv("GEOSURGE_TOKEN_FILE", str(missing))
    with pytest.raises(ConfigurationError, match=f"GEOSURGE_TOKEN_FILE in the environment is '{missing}'"):
        load_settings()
