"""Putting a folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lorafit.errors import ModelError, UsageError
from lorafit.files import SEAL
from lorafit.text import first_line


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a model repository, which is made if it doesn't exist; returns its address.

    The login is the one of `hf auth login`, or HF_TOKEN; it is never shown. An existing repository stays as public or
    private as it is. Raises UsageError for an id that can't be one, ModelError if the hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UsageError(
            f"--push {repo}: not a repository id; expected OWNER/NAME with letters, digits, - _ and ."
        ) from None
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder to push")
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{repo}: can't be pushed offline; unset HF_HUB_OFFLINE")
    api = HfApi()
    try:
        made = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, repo_type="model", ignore_patterns=[SEAL])
    except LocalTokenNotFoundError:
        raise ModelError(f"{repo}: not logged in to the hub; run: hf auth login") from None
    except OfflineModeIsEnabled:
        raise ModelError(f"{repo}: can't be pushed offline; unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise ModelError(f"{repo}: {_REFUSALS.get(status) or f'the hub refused: {_told(error)}'}") from None
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise ModelError(f"{repo}: the hub can't be reached: {_told(error)}; try again when online") from None
    return str(made)


_REFUSALS = {
    401: "the hub doesn't accept the login; run: hf auth login, with a token that may write",
    403: "the login may not write there; use a token with write access, or another owner",
    404: "the owner doesn't exist, or the login can't see it",
}
"""What a hub's answers mean, by HTTP status."""


def _told(error: Exception) -> str:
    """The first line of an error without anything that looks like a token."""
    return " ".join("hf_…" if "hf_" in word else word for word in first_line(error).split())
