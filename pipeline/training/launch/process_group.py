"""The process group of ranks on Ray: a store that only their network can reach."""

import ipaddress
import os
import socket
from datetime import timedelta
from typing import Any

import psutil  # type: ignore[import-untyped]

_stores: list[Any] = []  # of the rank 0 that this process is


def open_store(world_size: int, timeout_seconds: int) -> tuple[str, int]:
    """Opens the store at which ranks find each other, on the address of this node only."""
    import ray
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=1024)
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    _stores[:] = [store]
    return host, port


def join_group(
    backend: str, rank: int, world_size: int, host: str, port: int, timeout_seconds: int
) -> None:
    """Joins the group through the store of rank 0."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=timeout_seconds)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    if ipaddress.ip_address(host).is_loopback:  # then ranks meet there, and nowhere else
        loopback = _interface_of(host)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    store = (
        _stores[0]
        if rank == 0
        else TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _interface_of(host: str) -> str:
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    return next(
        name
        for name, addresses in interfaces.items()
        if any(address.address == host for address in addresses)
    )
