"""Upload model folders to a Hugging Face Hub repository in one commit, and download them.

huggingface_hub makes the requests. This module adds retries where it has none, and one-line errors that say how to fix
the problem. The environment variable HF_ENDPOINT selects the Hub.
"""

import contextlib
import functools
import hashlib
import http.client
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import wrap_errors
from .card import CARD, PICTURE, RECIPE, SUMMARY, make_card
from .fingerprint import fingerprint_in_picture, weights_fingerprint
from .folder import CONFIG, WEIGHTS, check_folder, read_config, unchanging
from .writing import HubError

_FILES = (CONFIG, WEIGHTS, CARD, PICTURE, SUMMARY, RECIPE)  # never checkpoints: they are for resuming, and pickles
_BY_HAND = f"; or put {CONFIG} and {WEIGHTS} from another machine into a folder, and load local-dir:FOLDER"
_WAITS = (1.0, 4.0)  # seconds before each retry of a request that huggingface_hub does not retry
# Base error of huggingface_hub's HTTP client (requests, httpx or httpx2), raised when there is no response.
_ClientError: Any = next(kind for kind in reversed(HfHubHTTPError.__mro__) if kind.__module__ != "builtins")
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def check_repo_id(repo_id: str) -> None:
    """Raise `HubError` if this is not a valid repository id, such as a path or an id with a forbidden character."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        said = str(error).split(" Use `repo_type`")[0]
        raise HubError(f"{repo_id!r} is not a valid repository id: {said} Give USER/NAME, e.g. me/my-model") from error


def check_access(repo_id: str, *, token: str | None = None) -> str:
    """Check the repository id and the token before long work that ends in a push; return the id as `USER/NAME`.

    Raises:
        HubError: The id is invalid, or the Hub cannot be reached or rejects the token.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with _one_line(repo_id, api):
        user = _patiently("checking the token", api.whoami)["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def files_to_push(folder: str | os.PathLike, repo_id: str, *, license: str | None = None) -> dict[str, Path | bytes]:
    """Return the files that a push of a model folder uploads: a mapping from name in the repository to path or content.

    The model card is the folder's `README.md`. If that is missing, the card is generated from `config.json`,
    `summary.json` and `explanation.png`; `license` is for this generated card, see `make_card`. Results and figures of
    other weights than the folder's are left out, with a warning.

    Raises:
        HubError: The folder is not a complete model, see `check_folder`.
    """
    folder = Path(folder)
    check_folder(folder)
    stale = _stale_results(folder)
    files: dict[str, Path | bytes] = {
        name: folder / name for name in _FILES if name not in stale and (folder / name).is_file()
    }
    if CARD not in files:
        files[CARD] = card_of_folder(folder, repo_id, license=license).encode()
    return files


def card_of_folder(folder: str | os.PathLike, repo_id: str | None, *, license: str | None = None) -> str:
    """Generate a folder's model card from `config.json` and, if they exist, `summary.json` and `explanation.png`.

    `repo_id` and `license` as for `make_card`. Results and figures of other weights than the folder's are left out.

    Raises:
        HubError: `config.json` or `summary.json` cannot be read.
    """
    folder = Path(folder)
    config, stale = read_config(folder), _stale_results(folder)
    summary = None if SUMMARY in stale else _read_summary(folder)
    picture = PICTURE if PICTURE not in stale and (folder / PICTURE).is_file() else None
    with wrap_errors(f"cannot make a model card from {folder / CONFIG} and {SUMMARY}", HubError):
        return str(make_card(config, repo_id=repo_id, summary=summary, picture=picture, license=license))


def _read_summary(folder: Path) -> dict[str, Any] | None:
    if not (folder / SUMMARY).is_file():
        return None
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{folder / SUMMARY} is not JSON: {error}; remove it, or train again") from error


def _stale_results(folder: Path) -> set[str]:
    """Return the files whose content was measured on other weights than the folder's, and warn about them.

    train.py records the fingerprint of the weights in `summary.json` and `explanation.png`. A figure without one, made
    by a user, is trusted unless the summary is not.
    """
    if not (folder / WEIGHTS).is_file():  # a folder of hub_configs: the weights are in the package
        return set()
    weights, stale, summary = weights_fingerprint(folder / WEIGHTS), set(), _read_summary(folder)
    if summary is not None and (not isinstance(summary, dict) or summary.get("weights") != weights):
        stale |= {SUMMARY, RECIPE}
    if (folder / PICTURE).is_file():
        drawn = fingerprint_in_picture(folder / PICTURE)
        stale |= {PICTURE} if (SUMMARY in stale if drawn is None else drawn != weights) else set()
    there = sorted(name for name in stale if (folder / name).is_file())
    if there:
        _warn_once(
            f"left out: {', '.join(there)} in {folder}, made with other weights than those in {WEIGHTS}, or by a "
            "version of timm_coda that did not record which; `timm-coda evaluate` measures these weights"
        )
    return stale


@functools.cache
def _warn_once(text: str) -> None:
    _logger.warning(text)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    token: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
) -> CommitInfo:
    """Upload a model folder, as written by `save_pretrained` or train.py, to the Hub in one commit.

    The repository is created if missing. Only config.json, model.safetensors, README.md (the model card, generated if
    missing), explanation.png, summary.json and recipe.yaml are uploaded. The commit makes all of them visible at once.
    If a push fails, nothing becomes visible, and the next call does not upload the finished files again.

    Args:
        folder: The model folder.
        repo_id: `USER/NAME`, or `NAME` for the token's own user.
        private: Visibility of a new repository; by default public, or the organisation's default.
        revision: Existing branch to commit to; by default main.
        commit_message: First line of the commit message.
        token: Token of a user with write access; by default HF_TOKEN or the one saved by `hf auth login`.
        create_pr: Open a pull request instead of committing.
        license: Licence of the weights, for the card, such as `"mit"`; the default is explained in `make_card`.

    Returns:
        The commit, with `.commit_url`, `.oid` and `.pr_url`.

    Raises:
        HubError: The folder is not a complete model, the id is invalid, the token or write access is missing, or the
            Hub cannot be reached after retries.
    """
    check_repo_id(repo_id)
    check_folder(folder)
    repo_id = check_access(repo_id, token=token)
    api = HfApi(token=token)

    def commit(files: dict[str, Path | bytes]) -> CommitInfo:
        # New operations for each try check the Hub's files again: a commit whose response was lost is not repeated.
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )

    with _one_line(repo_id, api, revision), unchanging(Path(folder), _FILES) as still:
        files = files_to_push(still, repo_id, license=license)
        _patiently(f"creating {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        # Never retry a pull request: a second one would be opened.
        return commit(files) if create_pr else _patiently(f"uploading to {repo_id}", lambda: commit(files))


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Download `config.json` and `model.safetensors` of one commit to the cache. Arguments as for `hf_hub_download`.

    Returns:
        Their folder in the cache.

    Raises:
        HubError: The model is missing or not readable with this token, the Hub cannot be reached, or the weights do not
            match the Hub's checksum.
    """
    check_repo_id(repo_id)

    def download(name: str, *, revision: str | None = revision, force_download: bool = force_download) -> Path:
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        call = functools.partial(hf_hub_download, repo_id, name, force_download=force_download, **options)
        return Path(_patiently(f"downloading {name}", call))  # before 1.0, a transfer that breaks off is not retried

    with _one_line(repo_id, HfApi(token=token), revision, otherwise=_BY_HAND):
        config = download(CONFIG)
        commit = config.parent.name  # so that both files are of one commit, even if a push comes in between
        weights = download(WEIGHTS, revision=commit)
        if not _is_what_it_says(weights):
            _logger.warning(f"{repo_id}: {WEIGHTS} is damaged (wrong checksum); downloading it again")
            weights = download(WEIGHTS, revision=commit, force_download=True)
            if not _is_what_it_says(weights):
                weights.resolve().unlink()
                raise HubError(
                    f"{repo_id}: {WEIGHTS} was damaged in both downloads (wrong checksum) and was deleted: try again "
                    "later, or from another network"
                )
    return config.parent


def _is_what_it_says(path: Path) -> bool:
    """Return False if a large cached file does not have the Hub's SHA-256, which is its name in the cache."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):  # a small file, or a cache without links: the SHA-256 is unknown
        return True
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == blob.name


def _patiently(what: str, action: Callable[[], _T]) -> _T:
    """Run `action`; retry it twice after a dropped connection, an overloaded Hub or a concurrent commit."""
    for wait in _WAITS:
        try:
            return action()
        except Exception as error:
            if not _may_pass(error):
                raise
            _logger.warning(f"{what}: {_reason(error)}; trying again in {wait:.0f} s")
            time.sleep(wait)
    return action()


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, LocalEntryNotFoundError):  # huggingface_hub has tried to reach the Hub
        return False
    for cause in _causes(error):
        if _answered(cause):
            status = cause.response.status_code
            return status >= 500 or status in (408, 409, 412, 429)
        if isinstance(cause, (_ClientError, json.JSONDecodeError)):  # JSONDecodeError: an error page instead of JSON
            return True
    return False


def _answered(error: BaseException) -> TypeGuard[HfHubHTTPError]:
    """Return whether the Hub responded. In huggingface_hub before 1.0, a file missing in the cache is such an error."""
    return isinstance(error, HfHubHTTPError) and error.response is not None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _reason(error: BaseException) -> str:
    """Return the reason in one line: the Hub's message, or else the library's."""
    for cause in _causes(error):
        if _answered(cause):
            code = cause.response.status_code
            return " ".join(f"{code} {cause.server_message or http.client.responses.get(code, '')}".split())
    *_, cause = _causes(error)
    return " ".join(f"{cause}".split()) or type(cause).__name__


@contextlib.contextmanager
def download_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of huggingface_hub, when timm downloads from a repository, into `HubError`, as `fetch` does."""
    repo_id, _, revision = repo_id.removeprefix("hf-hub:").partition("@")
    try:
        yield
    except Exception as error:
        if not any(
            isinstance(cause, (HfHubHTTPError, LocalEntryNotFoundError, _ClientError)) for cause in _causes(error)
        ):
            raise
        raise HubError(_explain(error, repo_id, HfApi(), revision or None, _BY_HAND)) from error


@contextlib.contextmanager
def _one_line(repo_id: str, api: HfApi, revision: str | None = None, *, otherwise: str = "") -> Iterator[None]:
    """Turn any error inside into a one-line `HubError` that says how to fix the problem.

    `otherwise` is added where the Hub is not reached: what to do without it.
    """
    try:
        yield
    except HubError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, _ClientError) as error:
        raise HubError(_explain(error, repo_id, api, revision, otherwise)) from error


def _explain(error: BaseException, repo_id: str, api: HfApi, revision: str | None, otherwise: str = "") -> str:
    causes, hub = list(_causes(error)), f"the Hub ({api.endpoint})"
    status = next((cause.response.status_code for cause in causes if _answered(cause)), 0)
    token: Any = get_token() if api.token is None else api.token
    login = f"create a token at {api.endpoint}/settings/tokens and pass it with `hf auth login`, HF_TOKEN or --token"

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_any(LocalTokenNotFoundError):
        return f"{repo_id}: the token for {hub} is missing: {login}"
    if is_any(OfflineModeIsEnabled) or (is_any(LocalEntryNotFoundError) and len(causes) == 1):
        missing = " is not in the cache, and" if is_any(LocalEntryNotFoundError) else ":"
        why = f"HF_HUB_OFFLINE (or local_files_only) is set, so {hub} is not contacted"
        return f"{repo_id}{missing} {why}: unset it{otherwise}"
    if is_any(RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: create it with `hf repos branch create {repo_id} {revision}`"
    if is_any(EntryNotFoundError) and not is_any(LocalEntryNotFoundError):
        name = next((name for name in (CONFIG, WEIGHTS) if name in str(error)), "file")
        pickles = "; pickles such as pytorch_model.bin can run code and are not loaded" if name == WEIGHTS else ""
        return f"{repo_id} has no {name}{pickles}: push the model again with model.push_to_hub({repo_id!r})"
    if is_any(GatedRepoError):
        return f"{repo_id} is gated ({_reason(error)}): ask for access at {api.endpoint}/{repo_id}; then {login}"
    if status == 403:
        owner = f"the token {token[:6]}..." if isinstance(token, str) else "a request without a token"
        return (
            f"{owner} has no permission for this on {repo_id} ({_reason(error)}): if the repository is not yours, "
            f"choose another name; if it is, the token needs write access: {login}"
        )
    if is_any(RepositoryNotFoundError):
        seen = "cannot access it" if token else "is missing"
        return f"{hub} has no model {repo_id!r}; if it is private, the token {seen}: {login}"
    if status == 401:
        shown = f"the token {token[:6]}..." if isinstance(token, str) else "a request without a token"
        return f"{hub} does not accept {shown} for {repo_id} ({_reason(error)}): {login}"
    if status == 409:
        return f"{hub} reports that {repo_id} is taken or in use ({_reason(error)}): choose another name, or try again"
    if status >= 500 or (not status and is_any(_ClientError, LocalEntryNotFoundError)):
        return (
            f"{hub} cannot be reached for {repo_id}, or responds with errors ({_reason(error)}): try again later; "
            f"finished transfers are not repeated{otherwise}"
        )
    return f"{hub} rejected the request for {repo_id}: {_reason(error)}" if status else f"{repo_id}: {_reason(error)}"
