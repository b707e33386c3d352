from __future__ import annotations

import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from support.secured import Authority

from geosurge.certificates import read_authorities, read_identity
from geosurge.errors import ConfigurationError


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_an_identity_is_its_files_and_does_not_show_its_key(authority: Authority) -> None:
    chain, key = authority.issue("server")
    identity = read_identity(chain, key)
    assert identity.chain == chain.read_bytes()
    assert identity.key == key.read_bytes()
    assert "PRIVATE" not in repr(identity)


def test_authorities_are_their_file(authority: Authority) -> None:
    assert read_authorities(authority.ca_file) == authority.ca_file.read_bytes()


def test_what_cannot_be_used_is_named(authority: Authority, tmp_path: Path) -> None:
    chain, key = authority.issue("server")
    other_key = authority.issue("other")[1]
    junk = tmp_path / "junk.pem"
    junk.write_bytes(b"\xff\xfe no PEM")
    empty = tmp_path / "empty.pem"
    empty.touch()
    encrypted = tmp_path / "encrypted.key"
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encrypted.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    for certificate, its_key in ((chain, other_key), (chain, junk), (chain, encrypted), (junk, key), (empty, key)):
        with pytest.raises(ConfigurationError, match=re.escape(f"{certificate} and the key {its_key}")):
            read_identity(certificate, its_key)
    for file in (junk, empty, key):
        with pytest.raises(ConfigurationError, match=re.escape(str(file))):
            read_authorities(file)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigurationError, match=f"cannot read {re.escape(str(missing))}: "):
            read_authorities(missing)
        with pytest.raises(ConfigurationError, match=f"cannot read {re.escape(str(missing))}: "):
            read_identity(missing, key)
