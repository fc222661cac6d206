"""`loradeck studio`: the server, with its page opened in a browser."""

import os
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Annotated

from cyclopts import Parameter

from loradeck.api.config import ServerConfig
from loradeck.cli.options import Dtype, ServedTask, Weights
from loradeck.cli.serve import ENGINE, LIVE, SERVER, serve
from loradeck.errors import ConfigError, LoradeckError, StorageError
from loradeck.live.config import LiveConfig
from loradeck.serve.config import EngineConfig


def studio(
    base: str,
    /,
    *,
    adapters: Path = Path("adapters"),
    no_browser: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    dtype: Dtype = "auto",
    weights: Weights = "blocks",
    task: ServedTask = "generate",
    draft_model: str | None = None,
    engine: Annotated[EngineConfig, Parameter(name="*")] = ENGINE,
    config: Annotated[ServerConfig, Parameter(name="*")] = SERVER,
    live: Annotated[LiveConfig, Parameter(name="*")] = LIVE,
) -> None:
    """Compare, blend, train and watch adapters in a browser.

    It is `loradeck serve --train`, with a folder of adapters that is made where
    there is none, and its page opened. See docs/page.md.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        adapters: A folder of adapters' folders.
        no_browser: Only print the page's address.
        host: The address to listen on; any but the loopback needs a file of API keys.
        port: The port to listen on; 0 picks a free one.
        keys: A file of API keys with the permissions of each.
        draft_model: A smaller base with the same tokenizer, which drafts tokens that the base then checks.
    """
    is_new = not adapters.exists()
    try:
        adapters.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(
            f"{adapters} is a file, not a folder of adapters", hint="Give --adapters a folder."
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot make the folder {adapters}: {error.strerror}", hint="Give --adapters another folder."
        ) from error
    try:
        serve(
            base,
            adapters=str(adapters),
            host=host,
            port=port,
            keys=keys,
            dtype=dtype,
            weights=weights,
            task=task,
            draft_model=draft_model,
            train=True,
            engine=engine,
            config=config,
            live=live,
            on_ready=None if no_browser else open_page,
        )
    except LoradeckError:
        if is_new:
            with suppress(OSError):  # it is not empty
                adapters.rmdir()
        raise


def open_page(url: str) -> None:
    """Open a page in the user's browser, unless there is only one that would take over the terminal."""
    graphical = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & os.environ.keys()
    if graphical:
        Thread(target=webbrowser.open, args=(url,), daemon=True).start()  # it may wait for the browser
