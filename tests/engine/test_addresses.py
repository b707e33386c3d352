from __future__ import annotations

import pytest

from geosurge.addresses import address_to_host, is_loopback, join_address


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7"), ("example.org", "example.org:7")],
)
def test_a_host_survives_its_address(host: str, address: str) -> None:
    assert join_address(host, 7) == address
    assert address_to_host(address) == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_hosts(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "10.1.2.3", "example.org", "localhost.example.org"])
def test_hosts_that_other_machines_may_reach(host: str) -> None:
    assert not is_loopback(host)
