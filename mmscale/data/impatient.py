"""Connections on which bytes only trickle count as failed.

Timeouts of HTTP libraries begin anew with every byte that arrives, so that a server which sends one
now and then is waited for without end.
"""

import ssl
import time
from typing import Any

import httpcore

# Fewer bytes than this in so many seconds of waiting, counted from a request's first byte on.
LEAST_BYTES, SECONDS = 2**13, 10.0


class SlowError(Exception):
    """A server sends too slowly."""


class ImpatientBackend(httpcore.NetworkBackend):
    """Opens connections as another backend does, and measures what arrives on them."""

    def __init__(self, backend: httpcore.NetworkBackend):
        self._backend = backend

    def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        """As the other backend."""
        return _Stream(self._backend.connect_tcp(*arguments, **options))

    def connect_unix_socket(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        """As the other backend."""
        return _Stream(self._backend.connect_unix_socket(*arguments, **options))

    def sleep(self, seconds: float) -> None:
        """As the other backend."""
        self._backend.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    """A connection; only time spent in waiting for bytes counts."""

    def __init__(self, stream: httpcore.NetworkStream):
        self._stream = stream
        self._waited, self._arrived, self._has_begun = 0.0, 0, False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Bytes that have arrived.

        Raises:
            SlowError: Too few of them.
        """
        began = time.monotonic()
        content = self._stream.read(max_bytes, timeout)
        if self._has_begun:
            self._waited += time.monotonic() - began
            self._arrived += len(content)
        self._has_begun = True
        if self._waited >= SECONDS:
            if self._arrived < LEAST_BYTES:
                raise SlowError(f"only {self._arrived:,} bytes in {self._waited:.0f} seconds")
            self._waited, self._arrived = 0.0, 0
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send, a new request: its answer is measured from its first byte on."""
        self._stream.write(buffer, timeout)
        self._waited, self._arrived, self._has_begun = 0.0, 0, False

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """The same over TLS."""
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """As the connection."""
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        """Close it."""
        self._stream.close()
