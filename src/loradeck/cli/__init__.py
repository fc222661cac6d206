"""The command line: which verbs there are, and what becomes of an error. Knows no verb's own business, and no torch.

A verb is a function `cli/VERB.py:VERB`, imported when it is called or listed: its signature and docstring are its flags
and help. What takes long to import is imported inside it.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from loradeck import __version__
from loradeck.cli.display.text import shown
from loradeck.errors import LoradeckError

VERBS = (
    "demo",
    "check",
    "train",
    "sweep",
    "plot",
    "generate",
    "chat",
    "serve",
    "ls",
    "show",
    "diff",
    "merge",
    "export",
    "rm",
    "doctor",
)

app = App(
    name="loradeck",
    help="One base, a thousand adapters: train, store, switch and serve LoRA. Begin with `loradeck demo`.",
    help_format="plaintext",  # Markdown would double the time of --help
    version=__version__,
    default_parameter=Parameter(negative=(), show_default=lambda value: None if value is False else value),
    result_action="return_value",
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
)
for order, verb in enumerate(VERBS):
    app.command(f"loradeck.cli.{verb}:{verb}", name=verb, sort_key=order)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if not tokens or tokens[0] in app.help_flags:
            app.resolved_commands()  # the list of verbs shows the first line of each
        code = app(tokens)
        sys.stdout.flush()
    except (LoradeckError, CycloptsError) as error:
        said = error.told() if isinstance(error, LoradeckError) else error
        print(shown(f"loradeck: {said}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it when it ends
        return 141
    return code if isinstance(code, int) else 0
