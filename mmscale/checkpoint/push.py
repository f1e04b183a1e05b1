"""A folder to a page of the Hugging Face hub; what the hub refuses becomes one sentence."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from mmscale.errors import ConfigError, gist

_LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


def require_page(page: str) -> None:
    """Refuse, before a model is loaded, to push where nobody may write.

    Args:
        page: ORG/NAME.

    Raises:
        ConfigError: The name is none of the hub's, no token is there, the hub does not know it, or
            cannot be reached.
    """
    try:
        validate_repo_id(page)
    except HFValidationError as error:
        raise ConfigError(f"{page}: no name of a page: {gist(error)}") from error
    if page.count("/") != 1:
        raise ConfigError(f"{page}: name the page as ORG/NAME, such as my-org/{page}")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{page}: HF_HUB_OFFLINE=1 forbids to push; unset it")
    with telling(page):
        token = get_token()
    if token is None:
        raise ConfigError(f"{page}: pushing needs a token of {constants.ENDPOINT}: {_LOG_IN}")
    with telling(page):
        HfApi(token=token).whoami()


def push_folder(folder: Path, page: str, private: bool, revision: str | None = None) -> str:
    """Make the page if there is none and put the files of a folder there.

    Args:
        folder: With a `README.md`.
        page: ORG/NAME.
        private: A new page is seen by its organisation only; one that is there stays as it is.
        revision: Branch, made if there is none; None: `main`.

    Returns:
        The page's address.

    Raises:
        ConfigError: The hub refuses it or cannot be reached.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    with telling(page):
        # A page that is there keeps who sees it.
        address = api.create_repo(page, private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(page, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=page, folder_path=folder, revision=revision, commit_message="Add the model"
        )
    return str(address)


@contextmanager
def telling(page: str) -> Iterator[None]:
    """Calls of the hub's client; their failures become one ConfigError.

    Raises:
        ConfigError: Says what the hub has against it, and what helps.
    """
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{page}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            return _answer(link)
    # Its client's own base: httpx's or httpx2's by the release of huggingface_hub.
    if any(isinstance(link, HTTPError) for link in chain):
        return f"{constants.ENDPOINT} cannot be reached; push again once it can"
    return f"the hub's client could not push it: {gist(error)}"


def _answer(error: HfHubHTTPError) -> str:
    code, endpoint = error.response.status_code, constants.ENDPOINT
    said = (error.server_message or gist(error)).strip().rstrip(".")
    match code:
        case 401:
            return f"{endpoint} does not know the token ({code}: {said}): {_LOG_IN}"
        case 403:
            return (
                f"{endpoint} does not let this token write there ({code}: {said}); give one that "
                f"may write, or another page"
            )
        case 404:
            return (
                f"{endpoint} has no such organisation, page or branch ({code}: {said}); check the "
                f"name and --revision"
            )
        case _ if code >= 500:
            return f"{endpoint} fails ({code}: {said}); push again later"
        case _:
            return f"{endpoint} refuses it ({code}: {said}); change what it names"
