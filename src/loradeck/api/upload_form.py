"""A multipart form with files, which go to their place while they arrive."""

from collections.abc import Callable

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from loradeck.api.errors import HttpError

FORM = "multipart/form-data"
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096  # of all fields besides the files
MAX_FORM_BYTES = 1 << 16  # of a form besides its file


class UploadForm:
    """The fields of a form, as text, and its parts `file`, whose content is handed on piece by piece."""

    def __init__(
        self, content_type: str, open_file: Callable[[str], Callable[[bytes], object]], *, max_files: int = 1
    ) -> None:
        """`open_file` is called with each file's name, and returns what takes its content.

        Raises:
            HttpError: 415, it is no form; 400, it has no boundary.
        """
        kind, options = parse_options_header(content_type)
        if kind.decode("latin-1") != FORM:
            raise HttpError(415, f"The content-type of an upload must be {FORM}.")
        if not options.get(b"boundary"):
            raise HttpError(400, "The content-type has no boundary.")
        self.fields: dict[str, str] = {}
        self.files = 0
        self._open_file, self._max_files = open_file, max_files
        self._write_file: Callable[[bytes], object] | None = None
        self._header = self._value = self._disposition = b""
        self._name, self._content = "", bytearray()
        self._field_bytes = 0
        self._ended = False
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_header,
                    "on_header_value": self._add_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open_part,
                    "on_part_data": self._add_content,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _invalid(str(error)) from error

    def write(self, content: bytes) -> None:
        """Read the next bytes of the body.

        Raises:
            HttpError: 400, it is no form; 413, its fields are too large.
            Exception: what the place of a file raises.
        """
        try:
            self._parser.write(content)
        except FormParserError as error:
            raise _invalid(str(error)) from error

    def finish(self) -> None:
        """Check that the form has ended, and with a file.

        Raises:
            HttpError: 400.
        """
        if not self._ended:
            raise _invalid("it is incomplete")
        if not self.files:
            raise HttpError(400, "The form has no file.", param="file", hint="Send a part named file with a filename.")

    def _begin_part(self) -> None:
        self._disposition = b""
        self._content = bytearray()

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _invalid("a part has no name")
        self._name = _text(options[b"name"])
        self._write_file = None
        if self._name == "file":
            if self.files == self._max_files == 1:
                raise HttpError(400, "The form has two files.", param="file", hint="Upload one after the other.")
            if self.files == self._max_files:
                raise HttpError(413, f"The form has more than {self._max_files} files.", param="file")
            self.files += 1
            self._write_file = self._open_file(_text(options.get(b"filename", b"")))
        elif len(self.fields) == MAX_FIELDS:
            raise HttpError(413, f"The form has more than {MAX_FIELDS} fields.")

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._write_file is not None:
            self._write_file(data[start:end])
            return
        self._field_bytes += end - start
        if self._field_bytes > MAX_FIELD_BYTES:
            raise HttpError(413, f"The form's fields have more than {MAX_FIELD_BYTES} bytes.", param=self._name[:128])
        self._content += data[start:end]

    def _end_part(self) -> None:
        if self._write_file is None:
            self.fields[self._name] = _text(bytes(self._content))

    def _end(self) -> None:
        self._ended = True


def declared_bytes(request: Request) -> int:
    """Return the length of an upload, 0 if its headers do not say it.

    Raises:
        HttpError: 415, it is compressed.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "The body is compressed.", hint="Send it without a content-encoding.")
    length = request.headers.get("content-length", "0")
    return int(length[:20]) if length.isdecimal() else 0


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _invalid(why: str) -> HttpError:
    return HttpError(400, f"The body is no valid form: {why}.")
