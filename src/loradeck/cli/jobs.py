"""`loradeck jobs`: the fine-tuning jobs of a server that trains."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from cyclopts import Parameter

from loradeck.cli.display.text import columns, fitting, print_json, printable
from loradeck.cli.openai_client import OpenAIClient
from loradeck.cli.options import AsJson
from loradeck.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from loradeck.train.events import Evaluation, Sample, Step

PATH = "fine_tuning/jobs"
MOST = 1000  # jobs of a list
EVENTS = 10  # that `show` prints
DROPPED = ("created", "model", "id", "adapter")  # columns, in this order, if the terminal is narrow
ENDS = {"succeeded": "finished", "cancelled": "stopped", "failed": "diverged"}  # how the view of a run says it


def jobs(
    action: Literal["ls", "show", "watch", "cancel", "pause", "resume"] = "ls",
    job: str | None = None,
    /,
    *,
    server: str = "http://127.0.0.1:8000",
    key: Annotated[str, Parameter(env_var="LORADECK_KEY", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """List, watch, or change the fine-tuning jobs of a server that trains.

    ls lists the key's jobs, the newest first; show tells about one of them, and
    watch follows one to its end, in the view of `loradeck train`; without JOB
    they take the newest. cancel, pause and resume change JOB.

    Args:
        action: What to do.
        job: A job's id, such as ftjob-4f0c, or the name of its adapter.
        server: The URL of `loradeck serve BASE --adapters FOLDER --train`.
        key: The server's API key.
    """
    client = OpenAIClient(server, key)
    if action == "ls":
        if job is not None:
            raise ConfigError("ls lists all jobs", hint=f"For one of them: loradeck jobs show {job[:128]}")
        _list(client, as_json=as_json)
        return
    if job is None and action not in ("show", "watch"):
        raise ConfigError(f"{action} needs a job", hint="Give its id; `loradeck jobs` lists them.")
    if action == "watch" and as_json:
        raise ConfigError("watch draws what happens", hint="For JSON: loradeck jobs show JOB --json.")
    id = _find(client, job)
    if action == "watch":
        _watch(client, id)
    elif action == "show":
        _show(client, id, as_json=as_json)
    else:
        changed = client.read(f"{PATH}/{quote(id)}/{action}", dict[str, Any], {})
        if as_json:
            print_json(changed)
        else:
            print(printable(f"{id} is {changed['status']}"))


def _newest(client: OpenAIClient, count: int) -> dict[str, Any]:
    return client.read(f"{PATH}?limit={count}", dict[str, Any])


def _find(client: OpenAIClient, job: str | None) -> str:
    """Return the id of the newest job that has this id or name; of all of them, if there is none given."""
    if job is not None and job.startswith("ftjob-"):
        return job
    matches = [each["id"] for each in _newest(client, MOST if job else 1)["data"] if job in (None, each["name"])]
    if not matches:
        raise ConfigError(
            f"no job is named {job[:128]!r}" if job else f"{client.url} has no jobs", hint="`loradeck jobs` lists them."
        )
    return matches[0]


def _list(client: OpenAIClient, *, as_json: bool) -> None:
    page = _newest(client, MOST)
    if as_json:
        print_json(page["data"])
        return
    if not page["data"]:
        print(f"no jobs on {client.url}")
        return
    heads = ["name", "status", "steps", "adapter", "model", "created", "id"]
    rows = [
        [
            each["name"],
            each["status"],
            _steps(each),
            each["fine_tuned_model"] or "-",
            each["model"],
            _time(each),
            each["id"],
        ]
        for each in page["data"]
    ]
    shown = fitting([heads, *rows], DROPPED)
    print(columns(shown, right=[at for at, head in enumerate(shown[0]) if head == "steps"]))
    if missing := [head for head in heads if head not in shown[0]]:
        print(f"no room for {', '.join(missing)}; --json has all")
    if page["has_more"]:
        print("older jobs are not listed")


def _show(client: OpenAIClient, id: str, *, as_json: bool) -> None:
    job = client.read(f"{PATH}/{quote(id)}", dict[str, Any])
    if as_json:
        print_json(job)
        return
    facts = {
        "id": job["id"],
        "name": job["name"],
        "status": job["status"],
        "model": job["model"],
        "adapter": job["fine_tuned_model"],
        "steps": _steps(job),
        "tokens": job["trained_tokens"],
        "file": job["training_file"],
        "seed": job["seed"],
        "settings": ", ".join(f"{name}={value}" for name, value in job["lora"].items()),
        "created": _time(job),
        "error": job["error"] and " ".join(job["error"]["message"].split()),
    }
    print(columns([[name, f"{value}"] for name, value in facts.items() if value not in (None, "")]))
    events = client.read(f"{PATH}/{quote(id)}/events?limit={EVENTS}", dict[str, Any])["data"]
    for event in reversed(events):
        print(printable(f"{_time(event)}  {event['message']}"))


def _watch(client: OpenAIClient, id: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from loradeck.cli.display.live_view import progress
    from loradeck.train.events import End

    job = client.read(f"{PATH}/{quote(id)}", dict[str, Any])
    console = Console()
    with progress(console, {job["name"]: job["total_steps"] or 0}) as listen:
        seconds = 0.0
        for event in _events(client, id, job["name"], lambda text: console.print(Text(printable(text)))):
            seconds = event.seconds
            listen(event)
        job = client.read(f"{PATH}/{quote(id)}", dict[str, Any])
        reason: Any = ENDS.get(job["status"], "interrupted")
        listen(End(job=job["name"], step=job["steps"], seconds=seconds, reason=reason, kept=job["steps"]))
    if job["error"]:
        raise TrainingError(f"{id} failed: {job['error']['message']}")
    print(printable(f"{id} is {job['status']}" + (f": {job['fine_tuned_model']}" if job["fine_tuned_model"] else "")))


def _events(
    client: OpenAIClient, id: str, name: str, on_message: Callable[[str], object]
) -> "Iterator[Step | Evaluation | Sample]":
    """Yield a job's metrics and samples as the events of a run; `on_message` is called with all else about it."""
    from loradeck.train.events import Evaluation, Sample, Step

    seconds, tokens = 0.0, 0
    for event in client.events(f"{PATH}/{quote(id)}/events?stream=true", dict[str, Any]):
        data = event["data"]
        for sample in data.get("samples", ()):
            yield Sample(job=name, step=data["step"], seconds=seconds, **sample)
        if event["type"] == "message" and "samples" not in data:
            on_message(f"{_time(event)}  {event['message']}")
        if "train_loss" in data:
            speed = data.get("tokens_per_second")
            took = (data["tokens"] - tokens) / speed if speed else 0.0
            seconds, tokens = seconds + took, data["tokens"]
            yield Step(
                job=name,
                step=data["step"],
                seconds=seconds,
                steps=data["total_steps"],
                took=took,
                loss=data["train_loss"],
                learning_rate=data["learning_rate"],
                grad_norm=0.0,
                tokens=tokens,
                supervised=0,
                memory=0,
                accuracy=data.get("train_accuracy"),
            )
        elif "valid_loss" in data:
            accuracy = data.get("valid_accuracy")
            yield Evaluation(
                job=name,
                step=data["step"],
                seconds=seconds,
                loss=data["valid_loss"],
                tokens=0,
                best=False,
                accuracy=accuracy,
            )


def _steps(job: dict[str, Any]) -> str:
    return f"{job['steps']}/{job['total_steps'] or '?'}"


def _time(entry: dict[str, Any]) -> str:
    return datetime.fromtimestamp(entry["created_at"], UTC).astimezone().isoformat(" ", "minutes")[:16]
