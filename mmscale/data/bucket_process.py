"""The process that reads and fills buckets with obstore for another one, and ends with it.

obstore works with threads that a fork leaves behind: in a forked decoding process, whose parent has
read a bucket before, each call would wait without end. This file is run by its path, so that it
starts in a moment and holds no more than obstore.

A line is a socket on which requests come one after another, each a JSON object. Frames answer: a
letter, a length, and so many bytes. `h` is a JSON object, `d` data, `e` a JSON object with the
`kind` and the `why` of a failure; `.` ends an answer.
"""

import configparser
import datetime
import importlib.util
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FRAME = struct.Struct(">cI")
# What is sent at once: less is on its way where a reader stops early.
_LEAST_CHUNK = 2**18
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NO_RETRIES = {"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=30)}
_RETRIES = {"max_retries": 6, "retry_timeout": datetime.timedelta(seconds=60)}
_BEAT_SECONDS = 5.0
_PART = 2**23
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d+)")
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "InvalidBucketName"}
_NOT_ACCEPTED = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken",
    "AuthenticationFailed", "InvalidAuthenticationInfo", "TokenRefreshRequired", "InvalidSecurity",
}  # fmt: skip
_SET = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_SKIP_SIGNATURE=true"
    " for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS or run gcloud auth application-default login; "
    "GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_CLIENT_ID with its "
    "secret; AZURE_SKIP_SIGNATURE=true for a public container",
}


class RefusalError(Exception):
    """A failure as it is told: its kind (`missing`, `refused`, `passing`, `size`) and why."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind, self.why = kind, why


class Opened:
    """The buckets that were opened, by scheme and name."""

    def __init__(self) -> None:
        self._stores: dict[tuple[str, str, bool], Any] = {}
        self._lock = threading.Lock()
        # Credentials that once were found may be away for a moment.
        self._worked: set[tuple[str, str]] = set()

    def answer(self, line: socket.socket, asked: dict[str, Any]) -> None:
        """Do what is asked for and send the answer's frames, the last one excepted."""
        import obstore

        scheme, bucket, path = parts_of(asked["url"])
        try:
            store = self._store(scheme, bucket)
            if asked["do"] == "get":
                self._get(line, store, path, asked)
            elif asked["do"] == "list":
                found = obstore.list_with_delimiter(store, path or None)
                sizes = {item["path"].rpartition("/")[2]: item["size"] for item in found["objects"]}
                folders = [prefix.rpartition("/")[2] for prefix in found["common_prefixes"]]
                send(line, b"h", {"files": sizes, "folders": folders})
            elif asked["do"] == "walk":
                for part in obstore.list(store, path or None):
                    names = {item["path"].removeprefix(path).lstrip("/"): item for item in part}
                    send(line, b"h", {"files": {name: i["size"] for name, i in names.items()}})
            elif asked["do"] == "put":
                self._put(line, scheme, bucket, path, asked)
            elif asked["do"] == "delete":
                with suppress(FileNotFoundError):
                    obstore.delete(store, path)
        except (RefusalError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            raise self._refusal(error, scheme, bucket) from error
        self._worked.add((scheme, bucket))

    def _get(self, line: socket.socket, store: Any, path: str, asked: dict[str, Any]) -> None:
        import obstore

        start, end = asked["start"], asked["end"]
        wanted: Any = {"range": {"offset": start} if end is None else (start, end)}
        got = obstore.get(store, path, options=wanted if start or end is not None else {})
        send(line, b"h", {"size": got.meta["size"]})
        for chunk in got.stream(min_chunk_size=_LEAST_CHUNK):
            content = memoryview(chunk)
            line.sendall(FRAME.pack(b"d", len(content)))
            line.sendall(content)

    def _put(
        self, line: socket.socket, scheme: str, bucket: str, path: str, asked: dict[str, Any]
    ) -> None:
        """Write an object; an empty frame a few seconds says that it is still on its way."""
        import obstore

        # Of a large file one part may fail; whoever reads goes on by itself.
        store = self._store(scheme, bucket, _RETRIES)
        content = Path(asked["file"]) if "file" in asked else asked["text"].encode()
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        # A store takes 10,000 parts.
        chunk = max(_PART, size // 9_000)
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(obstore.put, store, path, content, chunk_size=chunk)
            while not wait([done], _BEAT_SECONDS).done:
                send(line, b"h", {})
            done.result()

    def _store(self, scheme: str, bucket: str, retries: Any = None) -> Any:
        place = (scheme, bucket, retries is not None)
        with self._lock:
            if place not in self._stores:
                self._stores[place] = open_store(scheme, bucket, retries or _NO_RETRIES)
            return self._stores[place]

    def _refusal(self, error: Exception, scheme: str, bucket: str) -> RefusalError:
        """What obstore's error is, in words that hold neither an address nor a secret."""
        text = str(error)
        code = next(iter(_CODE.findall(text)), "")
        status = int(next(iter(_STATUS.findall(text)), "0"))
        told = f"{status} {code}".strip() if status else ""
        first = text.split("\n")[0]
        # A login that was sent and refused is no login that was not found.
        of_machine = re.search(r"169\.254\.|/latest/(?:api|meta)|metadata\.google", first)
        is_refused = code in _NOT_ACCEPTED or (
            not of_machine
            and (status == 401 or ("token request" in first and status in (400, 403)))
        )
        if (of_machine or re.search("token request|[Cc]redential", first)) and not is_refused:
            kind = "passing" if (scheme, bucket) in self._worked else "refused"
            return RefusalError(kind, f"no credentials were found; {_SET[scheme]}")
        if code in _NO_BUCKET:
            where = "no bucket" if scheme != "az" else "no container"
            return RefusalError(
                "refused", f"there is {where} {bucket} ({told}); check its name{_at()}"
            )
        if status == 404 or isinstance(error, FileNotFoundError):
            return RefusalError("missing", "the store has no such object; check the address")
        if status == 416:
            return RefusalError("size", "it is shorter")
        if is_refused:
            return RefusalError(
                "refused", f"the credentials are not accepted ({told}); {_SET[scheme]}"
            )
        if status == 403:
            return RefusalError(
                "refused",
                f"the credentials may not do this, or there is no such object ({told}); ask for "
                f"the right to it, or {_SET[scheme]}",
            )
        if status in _PASSING:
            return RefusalError("passing", told)
        if "region" in text or status in (301, 307) or code == "AuthorizationHeaderMalformed":
            return RefusalError(
                "refused", f"the bucket is in another region ({told}); set AWS_REGION"
            )
        if status:
            return RefusalError("refused", f"the store answers {told}; check the address")
        if "builder error" in text or "URL scheme is not allowed" in text:
            why = "the endpoint is plain http; set AWS_ALLOW_HTTP=true if you trust the network"
            return RefusalError("refused", why)
        if isinstance(error, OSError) and error.filename is not None:
            return RefusalError("refused", f"cannot be read here ({error.strerror})")
        # What reqwest says of a connection: nothing in it names an address.
        said = re.findall(r"(?:HTTP error: )([^\n(]+)", text)
        return RefusalError("passing", said[0].strip() if said else "the connection failed")


def parts_of(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and path of an address."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    return scheme, bucket, path.strip("/")


def open_store(scheme: str, bucket: str, retries: Any) -> Any:
    """A bucket with the credentials that are found.

    Raises:
        RefusalError: There are settings that cannot be followed.
    """
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore, S3Store

    if not bucket:
        raise RefusalError("refused", f"names no bucket; write {scheme}://BUCKET/PATH")
    options: dict[str, Any] = {"retry_config": retries}
    try:
        if scheme == "s3":
            profile = _profile()
            endpoint = profile.get("endpoint") or _endpoint()
            return S3Store(bucket, client_options=client(endpoint), **profile, **options)
        if scheme == "gs":
            address = os.environ.get("GOOGLE_BASE_URL", "")
            return GCSStore(bucket, client_options=client(address), **options)
        names = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR")
        if not any(map(os.environ.get, names)):
            raise RefusalError("refused", "no account was named; set AZURE_STORAGE_ACCOUNT_NAME")
        address = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT", "")
        return AzureStore(bucket, client_options=client(address), **options)
    except BaseError as error:
        reason = str(error).split("\n")[0].partition("error: ")[2]
        raise RefusalError("refused", f"cannot be opened ({reason}); {_SET[scheme]}") from error


def client(endpoint: str) -> Any:
    """Options of a connection: plain http on loopback only, or where it is asked for."""
    options: dict[str, Any] = {"connect_timeout": "10s", "read_timeout": "20s", "timeout": "300s"}
    if urlsplit(endpoint).hostname in _LOOPBACK:
        options["allow_http"] = True
    return options


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _at() -> str:
    host = urlsplit(_endpoint()).hostname
    return f" and AWS_ENDPOINT_URL ({host})" if host else ""


def _profile() -> dict[str, Any]:
    """What a profile brings, where the environment has no keys: obstore itself reads none."""
    endpoint = {"endpoint": os.environ["AWS_ENDPOINT_URL_S3"]} if os.environ.get(
        "AWS_ENDPOINT_URL_S3"
    ) else {}  # fmt: skip
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return endpoint
    asked = os.environ.get("AWS_PROFILE")
    files = {
        "AWS_SHARED_CREDENTIALS_FILE": ("~/.aws/credentials", "{}"),
        "AWS_CONFIG_FILE": ("~/.aws/config", "profile {}"),
    }
    name, found = asked or "default", dict[str, str]()
    for variable, (usual, section) in files.items():
        parser = configparser.RawConfigParser()
        with suppress(OSError, configparser.Error, RuntimeError):
            parser.read(Path(os.environ.get(variable) or usual).expanduser(), "utf-8")
        for title in (section.format(name), name):
            if parser.has_section(title):
                found = dict(parser.items(title)) | found
                break
    if asked and not found:
        raise RefusalError(
            "refused", f"there is no profile {asked}; set AWS_PROFILE to one of yours"
        )
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
        "endpoint_url": "endpoint",
    }
    given = {ours: found[theirs] for theirs, ours in names.items() if found.get(theirs)}
    if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        given.pop("region", None)
    if os.environ.get("AWS_ENDPOINT_URL"):
        given.pop("endpoint", None)
    if found and "access_key_id" not in given and len(found) > 1:
        given |= _by_boto3(asked, found)
    return given | endpoint


def _by_boto3(profile: str | None, found: dict[str, str]) -> dict[str, Any]:
    """Credentials of a profile that has no keys but names who gives them."""
    if not {"sso_session", "sso_start_url", "role_arn", "credential_process"} & found.keys():
        return {}
    if importlib.util.find_spec("boto3") is None:
        raise RefusalError(
            "refused", f"the profile {profile or 'default'} has no keys of its own, which boto3 "
            "resolves; run pip install boto3"
        )  # fmt: skip
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    return {"credential_provider": Boto3CredentialProvider(boto3.Session(profile_name=profile))}


def send(line: socket.socket, letter: bytes, content: Any) -> None:
    """Send a frame with a JSON object."""
    text = json.dumps(content).encode()
    line.sendall(FRAME.pack(letter, len(text)) + text)


def serve_line(line: socket.socket, opened: Opened) -> None:
    """Answer the requests of a line until it is closed."""
    with line, line.makefile("rb") as requests, suppress(BrokenPipeError, ConnectionResetError):
        for request in requests:
            try:
                opened.answer(line, json.loads(request))
                line.sendall(FRAME.pack(b".", 0))
            except RefusalError as refusal:
                send(line, b"e", {"kind": refusal.kind, "why": refusal.why})


def main(descriptor: int) -> None:
    """Take lines from the process that started this one, until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    opened = Opened()
    with socket.socket(fileno=descriptor) as control:
        while True:
            message, lines, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                # What is on its way goes nowhere any more.
                os._exit(0)
            line = socket.socket(fileno=lines[0])
            threading.Thread(target=serve_line, args=(line, opened), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]))
