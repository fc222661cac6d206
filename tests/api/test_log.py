"""The log of a server: what a line is, in both formats, whatever is logged."""

import json
import logging
import warnings
from io import StringIO

import pytest

from loradeck.api.config import ServerConfig
from loradeck.api.log import logging_to

log = logging.getLogger("loradeck.test")
EVIL = "x\n2026-01-01 00:00:00 ERROR forged\r\x1b[2J\x85\u2028 status=200"


def written(**config: str) -> list[str]:
    """The lines of a few events."""
    stream = StringIO()
    with logging_to(stream, ServerConfig(**config)):
        log.debug("detail")
        log.info("loaded %(adapter)s in %(seconds).3f s", {"adapter": "poet@2", "seconds": 0.12345})
        log.info("plain %s", EVIL)
        log.info("failed: %(error)s", {"error": EVIL})
        log.info("100% sure")
        logging.getLogger("uvicorn.error").warning("of a library")
        logging.getLogger("some.library").info("too much")
        warnings.warn("of Python", UserWarning, stacklevel=1)
        try:
            raise ValueError(EVIL)
        except ValueError:
            log.exception("a bug")
    log.info("afterwards")
    return stream.getvalue().split("\n")[:-1]


@pytest.mark.filterwarnings("default")
def test_text() -> None:
    lines = written()
    starts = [line.split(" ", 3)[2:] for line in lines if not line.startswith("  ")]
    assert starts[0] == ["INFO", "loaded poet@2 in 0.123 s"]
    assert [level for level, _ in starts] == ["INFO"] * 4 + ["WARNING"] * 2 + ["ERROR"]
    assert starts[2][1].startswith('failed: "x\\n2026')
    assert starts[3][1] == "100% sure"
    assert lines[-1].startswith("  ")  # the traceback
    assert all(line.isprintable() for line in lines)


@pytest.mark.filterwarnings("default")
def test_json() -> None:
    lines = [json.loads(line) for line in written(log_format="json", log_level="debug")]
    assert [line["level"] for line in lines] == ["debug"] + ["info"] * 4 + ["warning"] * 2 + ["error"]
    assert lines[1]["adapter"] == "poet@2"
    assert lines[1]["seconds"] == 0.12345
    assert lines[1]["message"] == "loaded poet@2 in 0.123 s"
    assert lines[3]["error"] == EVIL
    assert lines[5]["logger"] == "uvicorn.error"
    assert "ValueError" in lines[-1]["traceback"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("level", "levels"), [("warning", {"WARNING", "ERROR"}), ("error", {"ERROR"})])
def test_levels(level: str, levels: set[str]) -> None:
    assert {line.split(" ", 3)[2] for line in written(log_level=level) if not line.startswith("  ")} == levels
