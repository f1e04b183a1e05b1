"""Files of data sets on the hub: `hf://datasets/ORG/NAME[@REVISION]/PATH`, read by byte ranges."""

import re
from collections.abc import Generator
from dataclasses import dataclass

import httpx

from mmscale.data.remote import HUB, Entries, NotThereError, PassingError, Web, safe_url
from mmscale.errors import DataError

_ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")


@dataclass(frozen=True)
class HubAddress:
    """What an address names.

    Attributes:
        data_set: Organisation and name.
        revision: Branch, tag or commit.
        path: In the data set; empty for the whole.
    """

    data_set: str
    revision: str
    path: str

    @classmethod
    def of(cls, url: str) -> "HubAddress":
        """The parts of an address.

        Raises:
            DataError: It has not the parts that it needs.
        """
        found = _ADDRESS.fullmatch(url)
        if found is None:
            raise DataError(f"{url}: is no data set of the hub; write {HUB}datasets/ORG/NAME/PATH")
        data_set, revision, path = found.groups()
        # A branch with a slash in its name is written with %2F, as huggingface_hub does.
        return cls(data_set, (revision or "main").replace("%2F", "/"), path or "")


class HubFiles(Web):
    """Reads files of the hub's data sets, with the token that huggingface_hub finds."""

    def __init__(self) -> None:
        super().__init__()
        # Where the hub keeps a file, for as long as that address is good: it limits how often it
        # is asked for one.
        self._kept_at: dict[str, str] = {}

    def _target(self, url: str) -> tuple[str, dict[str, str]]:
        if kept := self._kept_at.get(url):
            return kept, {}
        # Takes a moment to import.
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        where = HubAddress.of(url)
        if constants.HF_HUB_OFFLINE:
            raise DataError(
                f"{url}: is not fetched where HF_HUB_OFFLINE is set; unset it, or name shards on "
                "this machine"
            )
        address = hf_hub_url(
            where.data_set, where.path, repo_type="dataset", revision=where.revision
        )
        # The client gives them to the hub alone: a redirect to another host goes without a token.
        return address, build_hf_headers()

    def _attempt(
        self, url: str, at: int, end: int | None, size: int | None
    ) -> Generator[bytes, None, None]:
        was_kept = url in self._kept_at
        try:
            yield from super()._attempt(url, at, end, size)
        except (DataError, PassingError) as error:
            if not was_kept:
                raise
            self._kept_at.pop(url, None)
            raise PassingError("the address at which the hub keeps it has expired") from error

    def _check_status(self, url: str, answer: httpx.Response, size: int | None) -> None:
        super()._check_status(url, answer, size)
        if answer.history:
            self._kept_at[url] = str(answer.url)

    def _refusal(self, url: str, answer: httpx.Response) -> DataError:
        reasons = [*(past.headers.get("X-Error-Code") for past in answer.history)]
        code = answer.headers.get("X-Error-Code") or next(filter(None, reasons), "")
        return _told(url, answer.status_code, code)

    def entries(self, folder: str) -> Entries:
        """As of any store."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.hf_api import RepoFile

        where = HubAddress.of(folder)
        inside = where.path.strip("/")
        try:
            found = list(
                HfApi().list_repo_tree(
                    where.data_set, inside or None, revision=where.revision, repo_type="dataset"
                )
            )
        except HfHubHTTPError as error:
            code = error.response.headers.get("X-Error-Code") or ""
            raise _told(folder, error.response.status_code, code) from error
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise DataError(
                f"{safe_url(folder)}: the hub cannot be asked ({type(error).__name__}); mend the "
                "network and try again"
            ) from error
        sizes = {entry.path: entry.size for entry in found if isinstance(entry, RepoFile)}
        return Entries(
            {path.rpartition("/")[2]: size for path, size in sizes.items()},
            [entry.path.rpartition("/")[2] for entry in found if entry.path not in sizes],
        )


def _told(url: str, status: int, code: str) -> DataError:
    """The hub's refusal in a sentence, by the status and the code that it gives."""
    where = HubAddress.of(url)
    if code == "EntryNotFound":
        return NotThereError(
            f"{url}: the data set has no such file at revision {where.revision}; check the path"
        )
    if code == "RevisionNotFound":
        return DataError(
            f"{url}: the data set has no revision {where.revision}; name a branch, tag or commit"
        )
    if code == "GatedRepo":
        return DataError(
            f"{url}: the data set is gated; accept its terms on its page, then log in with "
            "hf auth login or set HF_TOKEN"
        )
    if status in (401, 403) or code == "RepoNotFound":
        return DataError(
            f"{url}: the hub has no data set {where.data_set}, or your token may not read it "
            f"({status}); check the name, then hf auth login or HF_TOKEN"
        )
    if status == 404:
        return NotThereError(f"{url}: the hub answers 404; check the address")
    return DataError(f"{url}: the hub answers {status}; check the address and the access to it")
