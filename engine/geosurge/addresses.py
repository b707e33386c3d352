"""Addresses of servers: ``host:port``, and whether other machines can reach a host."""

from __future__ import annotations

import ipaddress


def join_address(host: str, port: int) -> str:
    """``host:port``, as gRPC writes it: an IPv6 host is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_to_host(address: str) -> str:
    """The host of ``host:port``, without brackets."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(host: str) -> bool:
    """Whether a host is reachable from this machine alone; a name other than ``localhost`` counts as remote."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
