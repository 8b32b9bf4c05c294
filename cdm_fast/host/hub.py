"""The Hugging Face hub, through `huggingface_hub`: names of models, fetching files, uploading a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cdm_fast.errors import UserError
from cdm_fast.host.reading import bad, error_text

PREFIX = "hf:"
TOKEN = "set HF_TOKEN, or log in by `hf auth login`"


class HubName(NamedTuple):
    """A repository of the hub, "OWNER/NAME", and its branch, tag or commit, by default the newest."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return PREFIX + self.repo + ("" if self.revision is None else f"@{self.revision}")


def on_hub(run: str | Path) -> bool:
    """True if `run` names a repository of the hub, `hf:...`, and not a folder."""
    return str(run).startswith(PREFIX)


def parse_hub_name(name: str | Path) -> HubName:
    """Parses `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`; UserError if it names no repository."""
    repo, at, revision = str(name).removeprefix(PREFIX).partition("@")
    if not repo.strip() or at and not revision.strip():
        raise UserError(
            f"{name} names no model; give hf:OWNER/NAME, hf:OWNER/NAME@REVISION or diffusers:PATH"
        )
    return HubName(repo, revision or None)


def fetch(name: HubName, patterns: Sequence[str]) -> Path:
    """The folder of a repository's files that match `patterns`, in the cache of `huggingface_hub`.

    Files in the cache are not fetched again; without a network the cached ones are used. The folder is named
    after the commit. Raises UserError if the package is missing or the repository cannot be fetched.
    """
    hub = _client("hf: models")
    try:
        found = hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=list(patterns))
    except (OSError, ValueError, RuntimeError, hub.errors.HTTPError) as error:
        raise bad(name, _told(error, hub.errors, name.revision)) from None
    return Path(found)


def assets_folder(name: HubName, commit: str) -> Path:
    """A folder for files derived from a repository, created beside the cache of `huggingface_hub`."""
    hub = _client("hf: models")
    try:
        return Path(hub.cached_assets_path("cdm_fast", namespace=name.repo, subfolder=commit))
    except (OSError, ValueError) as error:
        raise bad(name, f"has no place in the cache ({error_text(error)}); set HF_HOME") from None


def read_text(name: HubName, path: str) -> str | None:
    """A text file of a repository's newest commit that is about to be written; None if there is none yet."""
    hub = _client("push")
    try:
        found = hub.hf_hub_download(name.repo, path)
    except (hub.errors.EntryNotFoundError, hub.errors.RepositoryNotFoundError) as error:
        if isinstance(error, hub.errors.LocalEntryNotFoundError):  # there is no network
            raise bad(name, _told(error, hub.errors, None, writing=True)) from None
        return None
    except (OSError, ValueError, RuntimeError, hub.errors.HTTPError) as error:
        raise bad(name, _told(error, hub.errors, None, writing=True)) from None
    return Path(found).read_text(encoding="utf-8", errors="replace")


def upload(folder: Path, name: HubName, *, private: bool, message: str, replaced: Sequence[str]) -> str:
    """Uploads a folder as one commit, creating the repository if needed; returns the URL of the commit.

    replaced: patterns of files that are deleted unless they are uploaded again. private: whether a new
    repository is private; an existing one does not change. Raises UserError if the package, a token,
    permission or the network is missing.
    """
    hub = _client("push")
    api = hub.HfApi(library_name="cdm_fast")
    try:
        api.create_repo(name.repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name.repo,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(replaced),
        )
    except (OSError, ValueError, RuntimeError, hub.errors.HTTPError) as error:
        raise bad(name, _told(error, hub.errors, name.revision, writing=True)) from None
    return str(commit.commit_url)


def _client(purpose: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"{purpose} needs the package huggingface_hub; pip install 'cdm_fast[hub]'") from None
    return huggingface_hub


def _told(error: BaseException, kinds: Any, revision: str | None, writing: bool = False) -> str:
    """What went wrong and what to do, of an error that `huggingface_hub` raises."""
    done = "pushed to" if writing else "fetched"
    if isinstance(error, kinds.HFValidationError):
        return "is no name of a repository; give OWNER/NAME"
    if isinstance(error, kinds.GatedRepoError):
        return f"is gated; accept its terms on its page, and {TOKEN}"
    if isinstance(error, kinds.RevisionNotFoundError):
        return f"has no revision {revision}; give a branch, a tag or a whole commit of it"
    if isinstance(error, kinds.LocalTokenNotFoundError):
        return f"needs a token, and there is none; {TOKEN}"
    status = _status(error)
    if status == 401 and writing:
        return f"needs a token with the right to write; {TOKEN}"
    if isinstance(error, kinds.RepositoryNotFoundError):
        return f"is no repository that can be seen; check the name, and if it is private, {TOKEN}"
    if status in (401, 403):
        return f"is closed to this token; {TOKEN} of an account that may {'write' if writing else 'read'} it"
    return f"cannot be {done} ({error_text(error)}); check the name and the network"


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, or behind its cause."""
    response = getattr(error, "response", None)
    if response is None and error.__cause__ is not None:
        return _status(error.__cause__)
    return getattr(response, "status_code", None)
