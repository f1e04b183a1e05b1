"""A server of buckets on loopback that speaks S3, and connections to it that break."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

BUCKET = "pairs"


@dataclass
class Buckets:
    """The server.

    Attributes:
        endpoint: Its address.
        client: Reads and fills it.
        key: Credentials that may do everything.
        stranger: Credentials that it accepts, and that may do nothing.
    """

    endpoint: str
    client: Any
    key: tuple[str, str] = ("", "")
    stranger: tuple[str, str] = ("", "")

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """For a process that is to use it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key[0],
            "AWS_SECRET_ACCESS_KEY": self.key[1],
            "AWS_REGION": "us-east-1",
        }

    def upload(self, folder: Path, under: str) -> str:
        """Put a folder's files into the bucket; its address there."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = f"{under}/{path.relative_to(folder)}"
                self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        return f"s3://{BUCKET}/{under}"

    def keys(self, under: str) -> list[str]:
        """What lies in a folder of the bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=under)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", ()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """From here on signatures count, and so do the rights of whoever signed."""
        from moto import settings
        from moto.core.responses import ActionAuthenticatorMixin

        # The server runs in this process.
        before = settings.INITIAL_NO_AUTH_ACTION_COUNT
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0.0
        ActionAuthenticatorMixin.request_count = 0
        try:
            yield
        finally:
            settings.INITIAL_NO_AUTH_ACTION_COUNT = before


@contextmanager
def running_buckets() -> Iterator[Buckets]:
    """A server with one bucket, and one user who may read and fill it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"

    def client(name: str) -> Any:
        keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
        return boto3.client(name, endpoint_url=endpoint, region_name="us-east-1", **keys)

    # What an earlier server of this process was told is still known.
    httpx.post(f"{endpoint}/moto-api/reset").raise_for_status()
    buckets = Buckets(endpoint, client("s3"))
    buckets.client.create_bucket(Bucket=BUCKET)
    users = client("iam")
    for name, actions in (("owner", "s3:*"), ("stranger", "s3:ListAllMyBuckets")):
        users.create_user(UserName=name)
        rights = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "%s", '
        rights = (rights + '"Resource": "*"}]}') % actions
        users.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=rights)
    made = users.create_access_key(UserName="owner")["AccessKey"]
    buckets.key = (made["AccessKeyId"], made["SecretAccessKey"])
    other = users.create_access_key(UserName="stranger")["AccessKey"]
    buckets.stranger = (other["AccessKeyId"], other["SecretAccessKey"])
    try:
        yield buckets
    finally:
        server.stop()


@dataclass
class Breaking:
    """Connections to a server that end after some bytes.

    Attributes:
        after: Bytes of answers that pass before a connection is cut.
        cuts: How many of the coming connections are cut.
        done: How many were.
    """

    target: tuple[str, int]
    after: int
    cuts: int
    endpoint: str = ""
    done: int = 0
    opened: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pass_on(self, near: socket.socket) -> None:
        """Hand bytes on in both directions until one side ends, or its time has come."""
        with self.lock:
            self.opened += 1
            left = self.after if self.cuts > 0 else None
            self.cuts -= left is not None
        with near, suppress(OSError), socket.create_connection(self.target) as far:
            threading.Thread(target=self._copy, args=(near, far), daemon=True).start()
            while chunk := far.recv(2**16):
                near.sendall(chunk if left is None else chunk[:left])
                if left is not None:
                    left -= len(chunk)
                    if left <= 0:
                        with self.lock:
                            self.done += 1
                        break
            # Closing alone would leave it open for as long as the other thread waits on it.
            near.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(2**16):
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def breaking(endpoint: str, after: int, cuts: int) -> Iterator[Breaking]:
    """A way to a server on which connections are cut."""
    address = urlsplit(endpoint)
    proxy = Breaking((str(address.hostname), int(address.port or 0)), after, cuts)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def take() -> None:
            with suppress(OSError):
                while True:
                    near = listener.accept()[0]
                    threading.Thread(target=proxy.pass_on, args=(near,), daemon=True).start()

        threading.Thread(target=take, daemon=True).start()
        yield proxy
