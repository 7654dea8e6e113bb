"""Hugging Face's hub, or a server that speaks its protocol, through huggingface_hub.

Its own settings hold: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the like.
"""

from collections.abc import Iterable
from pathlib import Path

from selfmask_dist.common.optional import require
from selfmask_dist.models.repository import TAG, HubError, check_listing

_MAX_BYTES = 8 * 2**30  # of one file


class HuggingFaceHub:
    """Repositories of models on a server.

    Args:
        endpoint: its address; None: Hugging Face's own.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._hub = require("huggingface_hub", "huggingface_hub", needed_by="a hub that is no folder")
        self._endpoint = endpoint

    def push(self, repo: str, folder: Path, *, message: str, private: bool) -> str:
        """See `Hub.push`."""
        api = self._hub.HfApi(endpoint=self._endpoint)
        try:
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        except (self._hub.errors.HfHubHTTPError, OSError) as error:
            raise HubError(f"{repo} cannot be pushed: {_line(error)}") from error
        return str(url)

    def fetch(self, repo: str, wanted: Iterable[str], out: Path) -> None:
        """See `Hub.fetch`. All files are of one commit."""
        api = self._hub.HfApi(endpoint=self._endpoint)
        try:
            info = api.model_info(repo)
            listed = [one.rfilename for one in info.siblings or ()]
            check_listing(listed, repo)
            for name in wanted:
                if name not in listed:
                    continue
                about = {"repo_id": repo, "filename": name, "revision": info.sha, "endpoint": self._endpoint}
                size = self._hub.hf_hub_download(**about, local_dir=out, dry_run=True).file_size
                if size > _MAX_BYTES:
                    raise HubError(f"{repo}: {name} takes {size:,} bytes, at most {_MAX_BYTES:,} are fetched")
                self._hub.hf_hub_download(**about, local_dir=out)
        except (self._hub.errors.HfHubHTTPError, OSError) as error:
            raise HubError(f"{repo} cannot be fetched: {_line(error)}") from error

    def repositories(self, owner: str | None) -> list[str]:
        """See `Hub.repositories`."""
        api = self._hub.HfApi(endpoint=self._endpoint)
        try:
            return sorted(model.id for model in api.list_models(filter=TAG, author=owner))
        except (self._hub.errors.HfHubHTTPError, OSError) as error:
            raise HubError(f"the hub's list cannot be had: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
