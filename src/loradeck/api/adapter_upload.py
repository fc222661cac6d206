"""`POST /v1/adapters`: an adapter's folder is uploaded as a form, and published once it has been loaded."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from anyio import CancelScope
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.adapter_folder import MAX_FILES, UploadedFolder
from loradeck.api.adapter_publishing import check_new_name, publish_folder, store_of, work_folder
from loradeck.api.adapters import adapter_card, residents_of
from loradeck.api.auth import ApiKey
from loradeck.api.errors import HttpError, status_of
from loradeck.api.responses import ModelCard, json_response
from loradeck.api.state import ServerState, state_of
from loradeck.api.upload_form import MAX_FORM_BYTES, UploadForm, declared_bytes
from loradeck.errors import AdapterError, ConfigError, Door, FileTooLargeError, LoradeckError, StorageError

MAX_PROBLEMS = 100  # in the text of an error
SPARE = 64 << 20  # bytes of the disk that uploads leave to others


class UploadError(HttpError):
    """An upload that is no adapter of this base. Its text has a line for each problem."""

    def __init__(self, error: LoradeckError, folder: Path) -> None:
        """`folder` is that of the upload on this machine, which clients do not learn."""
        super().__init__(status_of(error), self._plain(error.message, folder), param="file")
        self.problems = tuple(self._plain(problem, folder) for problem in error.problems)
        self.hint = self._plain(error.hint_for("http"), folder)

    def text(self, door: Door) -> str:
        """Return the message, the problems and the hint, each on a line of its own."""
        rest = len(self.problems) - MAX_PROBLEMS
        more = [f"and {rest} more"] if rest > 0 else []
        return "\n".join([self.message, *self.problems[:MAX_PROBLEMS], *more, *filter(None, [self.hint_for(door)])])

    @staticmethod
    def _plain(text: str, folder: Path) -> str:
        return text.replace(f"{folder}/", "").replace(str(folder), "the upload")


async def upload_adapter(request: Request) -> Response:
    """Upload a PEFT folder, or a zip of one, and publish it as the next version of a name.

    It goes to the disk while it arrives. If it does not arrive whole or is refused, nothing of it stays.
    """
    state, key = state_of(request), request.state.key
    key.check_control()
    store, max_bytes = store_of(state), state.config.max_adapter_upload_bytes
    size = declared_bytes(request)
    if size > max_bytes + MAX_FORM_BYTES * MAX_FILES:
        raise FileTooLargeError(f"the upload has {size} bytes; an adapter may have {max_bytes}")
    with ExitStack() as stack:
        try:
            folder = await run_sync(stack.enter_context, work_folder(store))
            await run_sync(_check_room, folder, size)
            (folder / "parts").mkdir()
            upload = stack.enter_context(UploadedFolder(folder / "parts", max_bytes))
            form = UploadForm(request.headers.get("content-type", ""), upload.add, max_files=MAX_FILES)
            async for chunk in request.stream():
                with _disk_errors():
                    await run_sync(form.write, chunk)
            form.finish()
            name = _name(state, key, form)
            async with state.lock(name):
                card = await run_sync(_publish, state, name, upload, folder / "adapter")
        finally:
            with CancelScope(shield=True):  # large files take the disk some time
                await run_sync(stack.close)
    return json_response(card)


def _name(state: ServerState, key: ApiKey, form: UploadForm) -> str:
    name = form.fields.get("name")
    if name is None:
        raise HttpError(400, "name is missing.", param="name", hint="Send a part named name.")
    check_new_name(state, key, name)
    return name


def _publish(state: ServerState, name: str, upload: UploadedFolder, folder: Path) -> ModelCard:
    try:
        with _disk_errors():
            upload.finish(folder)
        version = publish_folder(state, name, folder, "an upload")
    except (AdapterError, ConfigError) as error:
        raise UploadError(error, folder) from error
    return adapter_card(state, version.spec, version, residents_of(state))


def _check_room(folder: Path, size: int) -> None:
    """Check that the disk has room for an upload and for the version that it becomes."""
    if 2 * size + SPARE > shutil.disk_usage(folder).free:
        raise StorageError(f"the disk has no room for {size} bytes more", hint="Make room on the server's disk.")


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "Make room on the server's disk." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(f"the upload cannot be kept: {error.strerror or error}", hint=hint) from error
