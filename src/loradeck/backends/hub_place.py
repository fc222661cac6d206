"""Files in a model repository of the Hugging Face hub. Each change is a commit; token and mirror are its client's.

`create` is a commit that the hub takes only on top of the one that was looked at, so no two create one file.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loradeck.backends.place import Place
from loradeck.errors import AdapterError, ConfigError, LoradeckError, StoreUnreachableError
from loradeck.hub import is_hub_id, why_refused, why_unreachable

if TYPE_CHECKING:
    pass

RACES = 50  # commits of others in a row, after which `create` gives up
CONFLICT = (409, 412)  # statuses: another commit was quicker


class HubPlace(Place):
    """The files below hf://owner/repository, hf://owner/repository@branch or a folder in it."""

    def __init__(self, url: str) -> None:
        """Nothing is asked yet.

        Raises:
            ConfigError: the URL names no repository.
        """
        owner, _, rest = url.partition("://")[2].strip("/").partition("/")
        name, _, self._folder = rest.partition("/")
        self._repository, _, revision = f"{owner}/{name}".partition("@")
        self._revision = revision or None
        if not is_hub_id(self._repository):
            raise ConfigError(f"{url} names no repository", hint="Give hf://OWNER/REPOSITORY or a folder in it.")
        super().__init__(url)

    def list(self, folder: str) -> dict[str, int]:
        """Return the bytes of each file below a folder, by their paths in it; none if there is no such folder.

        Raises:
            LoradeckError: the hub refuses, or does not answer.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        path = self._path(folder)

        def entries() -> "list[Any]":
            return [*HfApi().list_repo_tree(self._repository, path, recursive=True, revision=self._revision)]

        try:
            files = self.call(entries, missing=True)
        except FileNotFoundError:
            return {}
        return {entry.path.removeprefix(f"{path}/"): entry.size for entry in files if isinstance(entry, RepoFile)}

    def upload(self, files: Mapping[str, Path]) -> None:
        """Write files, by their paths, in one commit.

        Raises:
            LoradeckError: the hub refuses, or does not answer.
        """
        self.call(partial(self._commit, files))

    def create(self, path: str, content: bytes) -> bool:
        """Write a file unless there is one already; return whether there was none.

        Raises:
            LoradeckError: the hub refuses, or does not answer.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi()
        for _ in range(RACES):
            head = self.call(lambda: api.model_info(self._repository, revision=self._revision).sha)
            if self.call(partial(api.get_paths_info, self._repository, [self._path(path)], revision=head)):
                return False
            try:
                self._commit({path: content}, parent=head)
            except HfHubHTTPError as error:
                if error.response.status_code not in CONFLICT:
                    raise self.error(error) from error
                continue
            except Exception as error:  # of the HTTP library, which is the hub client's own choice
                raise self.error(error) from error
            return True
        raise StoreUnreachableError(f"{self.url} has new commits all the time", hint="Try again later.")

    def replace(self, path: str, content: bytes) -> None:
        """Write a file, whether there is one or not.

        Raises:
            LoradeckError: the hub refuses, or does not answer.
        """
        self.call(partial(self._commit, {path: content}))

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files; those that are not there are none.

        Raises:
            LoradeckError: the hub refuses, or does not answer.
        """
        from huggingface_hub import HfApi

        names = [self._path(path) for path in paths]
        infos = self.call(lambda: HfApi().get_paths_info(self._repository, names, revision=self._revision))
        if infos:
            self.call(partial(self._commit, dict.fromkeys(info.path.removeprefix(self._prefix) for info in infos)))

    def error(self, error: Exception) -> LoradeckError:
        """Return the error of a call that failed."""
        if isinstance(error, LoradeckError):
            return error
        if refused := why_refused(self._repository, "store", error):
            return AdapterError(refused[0], hint=refused[1])
        text = f"{self.url}: {why_unreachable(error)}"
        status = getattr(getattr(error, "response", None), "status_code", 503)
        if status in (401, 403):
            return AdapterError(text, hint="Log in with a token that may do so: hf auth login")
        if 400 <= status < 500 and status not in (408, 429):
            return AdapterError(text)
        return StoreUnreachableError(text, hint="Try again later.")

    def is_missing(self, error: Exception) -> bool:
        """Return whether an error says that there is no such file or folder."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            return False
        return isinstance(error, EntryNotFoundError | FileNotFoundError)

    @property
    def _prefix(self) -> str:
        return f"{self._folder}/" if self._folder else ""

    def _path(self, path: str) -> str:
        return f"{self._prefix}{path}"

    def _commit(self, files: Mapping[str, bytes | Path | None], parent: str | None = None) -> None:
        """Write files, and remove those without content, on top of a commit or of the latest."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
            for path, content in ((self._path(name), content) for name, content in files.items())
        ]
        HfApi().create_commit(
            self._repository,
            operations,
            commit_message=f"loradeck: {next(iter(files))}",
            revision=self._revision,
            parent_commit=parent,
        )

    def _files(self) -> Any:
        from huggingface_hub import HfFileSystem

        return HfFileSystem(skip_instance_cache=True)  # no instance is for several threads
