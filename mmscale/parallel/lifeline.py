"""A connection from each rank to the next: the system cuts it when that rank's process ends.

A rank that is killed says nothing, and NCCL lets the others wait for it. A machine that is lost
cuts nothing, but no longer answers the system's probes.
"""

import os
import select
import socket
import sys
import threading
from collections.abc import Callable

import torch.distributed as dist

from mmscale.errors import gist

_NAME = "mmscale/lifeline/{}"
_CONNECT_SECONDS = 30.0
# Lost after 5 + 4 * 3 seconds without an answer.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}

# What others learn this process's end from.
_sockets: list[socket.socket] = []
# No fork comes between a connection and its place in the list.
_listing = threading.Lock()


def hold(store: "dist.Store", rank: int, size: int, gone: Callable[[int], None]) -> None:
    """Hold the line to the next rank, and let the one before hold its own to this one.

    Args:
        store: Where the ranks met.
        rank: This rank.
        size: Of the world, at least 2.
        gone: Called from a thread, with the rank whose process has ended.
    """
    address = _own_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server(("", 0), family=family)
    _sockets.append(listener)
    store.set(_NAME.format(rank), f"{listener.getsockname()[1]} {address}")
    threading.Thread(target=_answer, args=(listener,), daemon=True).start()
    follows = (rank + 1) % size
    watcher = threading.Thread(target=_watch, args=(store.clone(), follows, gone), daemon=True)
    watcher.start()


def _own_address() -> str:
    """The address by which this machine reaches the meeting point, and others reach it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # Nothing is sent: the system only looks up the way.
        probe.connect(address)
        return str(probe.getsockname()[0])


def _answer(listener: socket.socket) -> None:
    while True:
        select.select([listener], [], [])
        with _listing:
            # Nothing is read from it: who connects learns when this process ends, and no more.
            _sockets.append(listener.accept()[0])


def _watch(store: "dist.Store", follows: int, gone: Callable[[int], None]) -> None:
    try:
        port, address = store.get(_NAME.format(follows)).decode().split(" ")
        if follows == 0:
            # It knows itself by a loopback address where its name stands for one on its machine.
            address = os.environ["MASTER_ADDR"]
        line = socket.create_connection((address, int(port)), timeout=_CONNECT_SECONDS)
    except (RuntimeError, OSError) as error:
        sys.stderr.write(
            f"mmscale: rank {follows} cannot be connected to ({gist(error)}): where it is killed, "
            "others notice only when an exchange with it fails\n"
        )
        return
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        while line.recv(64):
            continue
    except OSError:
        pass
    gone(follows)


def _cut_in_a_fork() -> None:
    """A decoding process must not hold its parent's lines when that is killed."""
    for held in _sockets:
        held.close()
    _sockets.clear()
    _listing.release()


os.register_at_fork(
    before=_listing.acquire, after_in_parent=_listing.release, after_in_child=_cut_in_a_fork
)
