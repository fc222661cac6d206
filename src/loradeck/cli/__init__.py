"""The command line: the table of verbs, and the exit code of each error.

A verb is a function `cli/VERB.py:VERB`, imported when it is called or listed; its signature and docstring are its flags
and help. It imports what takes long inside the function.
"""

import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter

from loradeck.base.openmp import share_cores
from loradeck.cli.display.encoding import accept_any_text
from loradeck.cli.display.text import printable
from loradeck.cli.options import STDIN, TYPED
from loradeck.cli.process import rank_of_process
from loradeck.errors import LoradeckError

VERBS = (
    "demo",
    "check",
    "train",
    "sweep",
    "plot",
    "eval",
    "generate",
    "chat",
    "serve",
    "studio",
    "jobs",
    "ls",
    "show",
    "publish",
    "versions",
    "prune",
    "diff",
    "merge",
    "convert",
    "export",
    "pull",
    "push",
    "rm",
    "doctor",
)


def _default(value: object) -> object:
    """Return a default as the help shows it; None hides it."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or None
    return None if value is False else value


app = App(
    name="loradeck",
    help="One base, a thousand adapters: train, store, switch and serve LoRA. Begin with `loradeck demo`.",
    help_format="plaintext",  # Markdown would double the time of --help
    version=lambda: version("loradeck"),
    default_parameter=Parameter(negative=(), show_default=_default),
    result_action="return_value",
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
)
for order, verb in enumerate(VERBS):
    app.command(f"loradeck.cli.{verb}:{verb}", name=verb, sort_key=order)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    tokens = _tokens(sys.argv[1:] if arguments is None else arguments)
    accept_any_text()
    share_cores()
    rank = rank_of_process()
    if rank:  # the first process says for all what it is doing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    TYPED.set(tokens)
    try:
        if not tokens or tokens[0] in app.help_flags:
            app.resolved_commands()  # the list of verbs shows the first help line of each
        code = app(tokens)
        sys.stdout.flush()
    except (LoradeckError, CycloptsError) as error:
        text = _report(error) if isinstance(error, LoradeckError) else _usage_error(error)
        print(printable(f"loradeck: {f'process {rank}: ' if rank else ''}{text}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports it at exit
        return 141
    return code if isinstance(code, int) else 0


def _tokens(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the name of standard input for `-`, which cyclopts would take for an option."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [STDIN if text == "-" else text for text in arguments[:end]] + [*arguments[end:]]


def _report(error: LoradeckError) -> str:
    from loradeck.lora.hub import with_hub_ids
    from loradeck.store import with_urls

    return with_urls(with_hub_ids(error.report()))


def _usage_error(error: CycloptsError) -> str:
    text = str(error)
    if isinstance(error, MissingArgumentError) and error.argument and error.keyword is None:  # it was not given at all
        text = re.sub(r"^.* requires an argument\.", f"{error.argument.name} is required.", text)
    return text
