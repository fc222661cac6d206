"""OpenAI's files: the datasets that clients upload, and the metrics of their jobs."""

from collections.abc import Callable
from contextlib import ExitStack
from urllib.parse import quote

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from loradeck.api.errors import HttpError
from loradeck.api.requests import read_query
from loradeck.api.responses import json_response
from loradeck.api.state import training_of
from loradeck.api.training_requests import FilesQuery
from loradeck.api.training_responses import FileDeleted, FileObject, Page
from loradeck.api.upload_form import MAX_FORM_BYTES, UploadForm, declared_bytes
from loradeck.errors import FileTooLargeError
from loradeck.live.records import FINE_TUNE, FileRecord
from loradeck.live.uploads import Upload, Uploads

OCTETS = "application/octet-stream"


async def create_file(request: Request) -> Response:
    """Upload a dataset. It goes to the disk while it arrives; if it does not arrive whole, nothing of it stays."""
    training = training_of(request)
    key, max_bytes = request.state.key, training.config.max_file_bytes
    size = declared_bytes(request)
    if size > max_bytes + MAX_FORM_BYTES:
        raise FileTooLargeError(f"the upload has {size} bytes; a file may have {max_bytes}")
    await run_sync(training.uploads.check_room, size)
    with ExitStack() as stack:
        uploads: list[Upload] = []

        def open_file(filename: str) -> Callable[[bytes], object]:
            upload = training.uploads.upload(
                key.name, filename, FINE_TUNE, max_bytes=max_bytes, max_total=key.quota.max_upload_bytes
            )
            uploads.append(stack.enter_context(upload))
            return uploads[0].write

        form = UploadForm(request.headers.get("content-type", ""), open_file)
        async for chunk in request.stream():
            await run_sync(form.write, chunk)
        form.finish()
        _check_fields(form.fields)
        finish = stack.pop_all()
    await run_sync(finish.close)
    return json_response(FileObject.of(uploads[0].record))


async def list_files(request: Request) -> Response:
    """List the key's files, the newest first."""
    training, query = training_of(request), read_query(request, FilesQuery)

    def page() -> Page[FileObject]:
        records, more = training.uploads.list(
            request.state.key.name, after=query.after, limit=query.limit, order=query.order, purpose=query.purpose
        )
        return Page.of([FileObject.of(record) for record in records], more)

    return json_response(await run_sync(page))


async def get_file(request: Request) -> Response:
    """Describe a file."""
    return json_response(FileObject.of(await run_sync(_file, training_of(request).uploads, request)))


async def get_file_content(request: Request) -> Response:
    """Return a file's content."""
    uploads = training_of(request).uploads
    record = await run_sync(_file, uploads, request)
    headers = {
        "content-disposition": f"attachment; filename*=utf-8''{quote(record.filename)}",
        "x-content-type-options": "nosniff",
    }
    path = await run_sync(uploads.path, record.id)
    return FileResponse(path, headers=headers, media_type=OCTETS)


async def delete_file(request: Request) -> Response:
    """Delete a file. Jobs that were created with it go on."""
    id = request.path_params["id"]
    await run_sync(training_of(request).uploads.delete, id, request.state.key.name)
    return json_response(FileDeleted(id))


def _file(uploads: Uploads, request: Request) -> FileRecord:
    return uploads.get(request.path_params["id"], request.state.key.name)


def _check_fields(fields: dict[str, str]) -> None:
    purpose = fields.get("purpose")
    if purpose != FINE_TUNE:
        message = "purpose is missing." if purpose is None else f"Unsupported: purpose={purpose!r:.80}."
        raise HttpError(400, message, param="purpose", hint=f"Send purpose={FINE_TUNE}.")
    for name in fields:
        if name.startswith("expires_after"):
            raise HttpError(
                400, f"Unsupported: {name[:80]}.", param=name[:80], hint="Delete files that are not needed."
            )
