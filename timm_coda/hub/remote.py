"""Model folders over the network: to a repository of the Hugging Face Hub in one commit, and from there.

huggingface_hub talks; what is added here is patience where it has none, and errors in one line that say how to mend
them. Which Hub it is, the variable HF_ENDPOINT says.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import wrap_errors
from .card import CARD, PICTURE, RECIPE, SUMMARY, make_card
from .folder import CONFIG, WEIGHTS, HubError, check_folder, read_config

_FILES = (CONFIG, WEIGHTS, CARD, PICTURE, SUMMARY, RECIPE)  # never checkpoints: those are for going on, and pickles
_WAITS = (1.0, 4.0)  # seconds between tries of what huggingface_hub itself does not try again
# What the client that huggingface_hub is made with, httpx or httpx2, raises where no answer comes.
_ClientError: Any = HfHubHTTPError.__bases__[0]
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def check_repo_id(repo_id: str) -> None:
    """Raise `HubError` for what can be no repository's id: a path, a letter that is not allowed."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        said = str(error).split(" Use `repo_type`")[0]
        raise HubError(f"{repo_id!r} is no repository's id: {said} Give USER/NAME, such as me/my-model") from error


def check_access(repo_id: str, *, token: str | None = None) -> str:
    """Find out before long work whether a push can succeed; returns the id with the user's name in front.

    Raises:
        HubError: The id is none, or the Hub cannot be reached or does not accept the token.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with _one_line(repo_id, api):
        user = _patiently("asking whose token it is", api.whoami)["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def files_to_push(folder: str | os.PathLike, repo_id: str, *, license: str | None = None) -> dict[str, Path | bytes]:
    """What a push of a model's folder uploads: name in the repository and where it is, or what it says.

    The model card is made from `config.json`, `summary.json` and `explanation.png`, unless the folder has its own
    `README.md`; `license` is for that card, see `make_card`.

    Raises:
        HubError: The folder is not a whole model, see `check_folder`.
    """
    folder = Path(folder)
    check_folder(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in _FILES if (folder / name).is_file()}
    if CARD not in files:
        files[CARD] = card_of_folder(folder, repo_id, license=license).encode()
    return files


def card_of_folder(folder: str | os.PathLike, repo_id: str | None, *, license: str | None = None) -> str:
    """The text of the model card of a folder that has a `config.json`, with what else is known there.

    `repo_id` and `license` as `make_card`.

    Raises:
        HubError: `config.json` or `summary.json` cannot be read.
    """
    folder = Path(folder)
    config, summary = read_config(folder), None
    if (folder / SUMMARY).is_file():
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        except ValueError as error:
            raise HubError(f"{folder / SUMMARY} is not JSON: {error}; move it away, or train again") from error
    picture = PICTURE if (folder / PICTURE).is_file() else None
    with wrap_errors(f"no model card can be made of what {folder / CONFIG} and {SUMMARY} say", HubError):
        return str(make_card(config, repo_id=repo_id, summary=summary, picture=picture, license=license))


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
    """Upload a model's folder, such as `save_pretrained` or train.py makes, to the Hub, in one commit.

    The repository is made if there is none. Of the folder go config.json, model.safetensors, README.md (the model card,
    made if missing), explanation.png, summary.json and recipe.yaml; nothing else. What is uploaded becomes visible with
    the commit, all of it or nothing; after a failure another call goes on with what is there already.

    Args:
        folder: The model.
        repo_id: `USER/NAME`, or `NAME` for the token's own user.
        private: For a new repository; by default public, or as the organisation says.
        revision: Branch to commit to, which is there already; by default main.
        commit_message: First line of the commit.
        token: Of a user who may write there; by default HF_TOKEN or what `hf auth login` saved.
        create_pr: Open a pull request in place of committing.
        license: Of the weights, for the card, such as `"mit"`; by default what is known of them.

    Returns:
        The commit: `.commit_url`, `.oid`, `.pr_url`.

    Raises:
        HubError: The folder is not a whole model, the id is none, the token or the right to write there is missing, or
            the Hub cannot be reached, also after some tries.
    """
    check_repo_id(repo_id)
    check_folder(folder)
    repo_id = check_access(repo_id, token=token)
    files = files_to_push(folder, repo_id, license=license)
    api = HfApi(token=token)

    def commit() -> CommitInfo:
        # Each try asks anew what is there: a commit whose answer got lost is not made a second time.
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )

    with _one_line(repo_id, api, revision):
        _patiently(f"making {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        # ... but for pull requests, which would be opened twice.
        return commit() if create_pr else _patiently(f"uploading to {repo_id}", commit)


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Download `config.json` and `model.safetensors` of one commit into the cache; arguments as `hf_hub_download`.

    Returns:
        Their folder in the cache.

    Raises:
        HubError: No such model, no right to read it, no connection, or the weights are not those that the Hub says.
    """
    check_repo_id(repo_id)

    def download(name: str, *, revision: str | None = revision, force_download: bool = force_download) -> Path:
        path = hf_hub_download(
            repo_id,
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return Path(path)

    with _one_line(repo_id, HfApi(token=token), revision):
        config = download(CONFIG)
        commit = config.parent.name  # so that both are of one commit, also while somebody pushes
        weights = download(WEIGHTS, revision=commit)
        if not _is_what_it_says(weights):
            _logger.warning(f"{repo_id}: {WEIGHTS} is damaged, its checksum is wrong; downloading it again")
            weights = download(WEIGHTS, revision=commit, force_download=True)
            if not _is_what_it_says(weights):
                weights.resolve().unlink()
                raise HubError(
                    f"{repo_id}: {WEIGHTS} is damaged on its way, twice its checksum was wrong: try again later, or "
                    "from another network; no part of it was kept"
                )
    return config.parent


def _is_what_it_says(path: Path) -> bool:
    """False if a large file in the cache has not the SHA-256 that the Hub says, which is its name there."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):  # a small file, or a cache without links: nothing to compare with
        return True
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == blob.name


def _patiently(what: str, action: Callable[[], _T]) -> _T:
    """Try again, twice, after what may pass: a dropped connection, an overloaded Hub, a commit at the same moment."""
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
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return status >= 500 or status in (408, 409, 412, 429)
        if isinstance(cause, (_ClientError, json.JSONDecodeError)):  # JSON: an error page in its place
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _reason(error: BaseException) -> str:
    """One line: what the Hub says, else what the library says."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return " ".join(
                f"{cause.response.status_code} {cause.server_message or cause.response.reason_phrase}".split()
            )
    *_, cause = _causes(error)
    return " ".join(f"{cause}".split()) or type(cause).__name__


@contextlib.contextmanager
def _one_line(repo_id: str, api: HfApi, revision: str | None = None) -> Iterator[None]:
    """Turn whatever goes wrong on the way into a `HubError` of one line that says how to mend it."""
    try:
        yield
    except HubError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, _ClientError) as error:
        raise HubError(_explain(error, repo_id, api, revision)) from error


def _explain(error: BaseException, repo_id: str, api: HfApi, revision: str | None) -> str:
    causes, hub = list(_causes(error)), f"the Hub ({api.endpoint})"
    status = next((cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)), 0)
    token: Any = get_token() if api.token is None else api.token
    login = f"make one at {api.endpoint}/settings/tokens, then `hf auth login`, HF_TOKEN or --token"

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_any(LocalTokenNotFoundError):
        return f"{repo_id}: there is no token for {hub}: {login}"
    if is_any(OfflineModeIsEnabled) or (is_any(LocalEntryNotFoundError) and len(causes) == 1):
        missing = " is not in the cache, and" if is_any(LocalEntryNotFoundError) else ":"
        return f"{repo_id}{missing} HF_HUB_OFFLINE (or local_files_only) is set, so {hub} is not asked: unset it"
    if is_any(RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: make it with `hf repos branch create {repo_id} {revision}`"
    if is_any(RemoteEntryNotFoundError):
        name = next((name for name in (CONFIG, WEIGHTS) if name in str(error)), "file")
        pickles = "; pickles such as pytorch_model.bin can run code and are not read" if name == WEIGHTS else ""
        return f"{repo_id} has no {name}{pickles}: push the model again with model.push_to_hub({repo_id!r})"
    if is_any(GatedRepoError):
        return f"{repo_id} is gated ({_reason(error)}): ask for access at {api.endpoint}/{repo_id}; then {login}"
    if status == 403:
        owner = f"the token {token[:6]}..." if isinstance(token, str) else "without a token one"
        return (
            f"{owner} has no right to do this with {repo_id} ({_reason(error)}): if it is somebody else's, choose "
            f"another name; if it is yours, {login}, with the right to write"
        )
    if is_any(RepositoryNotFoundError):
        seen = "may not see it" if token else "is missing"
        return f"{hub} has no model {repo_id!r}; if it is private, the token {seen}: {login}"
    if status == 401:
        shown = f"the token {token[:6]}..." if isinstance(token, str) else "a request without a token"
        return f"{hub} does not accept {shown} for {repo_id} ({_reason(error)}): {login}"
    if status == 409:
        return f"{hub} says that {repo_id} is taken or in use ({_reason(error)}): choose another name, or try again"
    if status >= 500 or (not status and is_any(_ClientError, LocalEntryNotFoundError)):
        return (
            f"{hub} cannot be reached for {repo_id}, or answers with errors ({_reason(error)}): run the same again "
            "later, what is done already stays"
        )
    return f"{hub} refuses {repo_id}: {_reason(error)}" if status else f"{repo_id}: {_reason(error)}"
