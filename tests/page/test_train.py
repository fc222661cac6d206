"""The view Train, as a person uses it: from a dropped dataset to an adapter, and all that can happen on the way."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from tests.page.conftest import PageServer

DROP = """(place, [name, content]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(content), (each) => each.charCodeAt(0))], name));
  place.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
HOSTILE = "<img src=x onerror=\"document.title = 'hacked'\"><script>document.title = 'hacked'</script>"


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


GOOD = lines(*(chat(f"{number}?", "Ahoy!") for number in range(6)))
PAIRS = lines(*({"prompt": f"{number}?", "chosen": "Ahoy!", "rejected": "Hello."} for number in range(4)))


def drop(page: "Page", name: str, content: bytes) -> None:
    page.locator(".drop").evaluate(DROP, [name, base64.b64encode(content).decode()])


def open_train(page: "Page", server: "PageServer") -> None:
    page.goto(f"{server.url}/#train")
    page.get_by_text("Drop a dataset here").wait_for()


def upload(page: "Page", server: "PageServer", content: bytes = GOOD, name: str = "ahoy.jsonl") -> None:
    """Drop a dataset, and wait for the plan of its job."""
    open_train(page, server)
    drop(page, name, content)
    page.get_by_role("heading", name=name).wait_for()
    page.get_by_role("region", name="Plan").wait_for()


def start(page: "Page", server: "PageServer", name: str, epochs: int) -> str:
    """Start a job of three steps an epoch, and return its id."""
    upload(page, server)
    page.get_by_label("Name of the adapter").fill(name)
    page.get_by_label("Epochs").fill(str(epochs))
    page.get_by_label("Batch size").fill("2")
    page.get_by_role("button", name="Start training").click()
    page.get_by_role("heading", name=name).wait_for()
    return state(page)["job"]


def state(page: "Page") -> Any:
    return json.loads(unquote(page.url).partition("=")[2])


def status(page: "Page", text: str) -> None:
    """Wait until the job has a status."""
    page.locator(".badge", has_text=re.compile(f"^{text}$")).wait_for()


def get(page: "Page", server: "PageServer", path: str) -> Any:
    return page.request.get(f"{server.url}/{path}").json()


def test_wrong_lines_are_shown_and_the_file_can_be_deleted(page: "Page", server: "PageServer") -> None:
    open_train(page, server)
    drop(page, "wrong.jsonl", GOOD + b'{"messages": [{"role": "captain", "content": "Ahoy"}]}\n{"messages": 3}\n')
    problems = page.get_by_role("list", name="Problems")
    problems.get_by_text(re.compile(r":7\b")).wait_for()
    problems.get_by_text(re.compile(r":8\b")).wait_for()
    problems.get_by_text("captain").wait_for()
    assert page.get_by_role("button", name="Start training").count() == 0
    page.get_by_role("button", name="Delete this file").click()
    page.get_by_text("Drop a dataset here").wait_for()
    page.get_by_role("link", name="wrong.jsonl").wait_for(state="detached")
    assert "wrong.jsonl" not in [file["filename"] for file in get(page, server, "v1/files")["data"]]


def test_a_file_that_is_no_dataset_is_refused_in_one_sentence(page: "Page", server: "PageServer") -> None:
    open_train(page, server)
    drop(page, "empty.jsonl", b"")
    page.get_by_role("alert").get_by_text(re.compile("^'empty.jsonl' is empty$")).wait_for()
    drop(page, "picture.jsonl", bytes(range(256)))
    page.get_by_text("1 problem: mend the file, and drop it again.").wait_for()
    page.get_by_text("picture.jsonl is not text").wait_for()


def test_a_dataset_becomes_an_adapter(page: "Page", server: "PageServer") -> None:
    upload(page, server)
    assert page.get_by_role("table").first.get_by_role("row").nth(1).all_inner_texts()[0].split()[:3] == [
        "train",
        "6",
        "6",
    ]
    assert "Ahoy!" in "".join(page.locator("mark.learned").all_inner_texts())
    assert page.get_by_label("Epochs").get_attribute("placeholder") == "3"
    plan = page.get_by_role("region", name="Plan")
    plan.get_by_text("LoRA loses quality with large batches").wait_for()
    page.get_by_label("Name of the adapter").fill("fresh")
    page.get_by_label("Batch size").fill("2")
    page.get_by_text("More settings").click()
    page.get_by_label("Rank (r)").fill("3")
    page.get_by_label("Target modules").fill("q_proj, v_proj")
    plan.get_by_text("fresh").wait_for()
    page.get_by_role("button", name="Start training").click()
    status(page, "succeeded")
    chart = page.get_by_role("slider", name="Loss")
    assert chart.get_attribute("aria-valuemax") == "9"
    assert chart.locator("path.curve").first.get_attribute("d")
    models = {model["id"]: model for model in get(page, server, "v1/models")["data"]}
    assert models["fresh"]["adapter"]["rank"] == 3
    assert models["fresh"]["adapter"]["targets"] == ["q_proj", "v_proj"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the metrics").click()
    assert download.value.suggested_filename == "fresh.csv"
    assert download.value.path().read_text().startswith("step,train_loss")
    job = state(page)["job"]
    page.get_by_role("link", name="Open step 9 in Compare").click()
    assert state(page) == {"columns": [{"model": "tiny"}, {"model": f"{job}:ckpt-9"}]}
    assert unquote(page.url).partition("#")[2].startswith("compare=")


def test_validation_samples_and_a_reload(page: "Page", server: "PageServer") -> None:
    upload(page, server, lines(*(chat(f"What is {number}?", f"It is {number}.") for number in range(20))))
    page.get_by_label("Name of the adapter").fill("sampled")
    page.get_by_label("Epochs").fill("2")
    page.get_by_text("More settings").click()
    page.get_by_label("Share held out for validation").fill("0.2")
    page.get_by_role("button", name="Start training").click()
    status(page, "succeeded")
    page.reload()
    status(page, "succeeded")
    page.get_by_role("button", name="validation loss").wait_for()
    page.get_by_text("Samples at evaluations").wait_for()
    assert "What is" in page.locator("dl.samples dt").first.inner_text()
    page.get_by_role("link", name="All files and jobs").click()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="sampled"))
    row.get_by_text("sampled@1").wait_for()
    row.get_by_role("checkbox").check()
    page.get_by_label("Curve", exact=True).select_option("validation loss")
    page.get_by_role("slider", name="Checked jobs").locator("path.curve[d^=M]").wait_for()


def test_settings_that_are_refused(page: "Page", server: "PageServer") -> None:
    upload(page, server)
    page.get_by_label("Name of the adapter").fill("no/name")
    alert = page.get_by_role("alert")
    alert.get_by_text("no/name").wait_for()
    assert page.locator("#job-suffix[aria-invalid]").count() == 1
    page.get_by_label("Name of the adapter").fill("name")
    page.get_by_role("region", name="Plan").wait_for()
    page.get_by_text("More settings").click()
    page.get_by_label("Target modules").fill("nowhere")
    alert.get_by_text("nowhere").wait_for()


def test_cancel(page: "Page", server: "PageServer") -> None:
    start(page, server, "cancelled", 100_000)
    status(page, "running")
    page.get_by_role("button", name="Cancel…").click()
    page.get_by_role("button", name="Let it go on").click()
    page.get_by_role("button", name="Cancel…").click()
    page.get_by_role("button", name="Cancel the job").click()
    status(page, "cancelled")
    assert page.get_by_role("button", name="Pause").count() == 0


def test_pause_and_resume(page: "Page", server: "PageServer") -> None:
    job = start(page, server, "paused", 100_000)
    page.get_by_role("button", name="Pause").click()
    status(page, "paused")
    assert get(page, server, f"v1/fine_tuning/jobs/{job}")["status"] == "paused"
    page.get_by_role("button", name="Resume").click()
    status(page, "running")
    page.get_by_role("button", name="Cancel…").click()
    page.get_by_role("button", name="Cancel the job").click()
    status(page, "cancelled")


def test_an_unreadable_number_is_not_left_out(page: "Page", server: "PageServer") -> None:
    upload(page, server)
    before = get(page, server, "v1/fine_tuning/jobs")["data"]
    page.get_by_label("Seed").focus()
    page.keyboard.type("1e")
    page.get_by_role("button", name="Start training").click()
    assert page.evaluate("document.activeElement.id") == "job-seed"
    page.get_by_role("heading", name="New job").wait_for()
    assert get(page, server, "v1/fine_tuning/jobs")["data"] == before


def test_an_empty_field_shows_what_holds_then(page: "Page", server: "PageServer") -> None:
    upload(page, server)
    page.get_by_text("More settings").click()
    rank, samples = page.get_by_label("Rank (r)"), page.get_by_label("Samples at each evaluation")
    default = rank.get_attribute("placeholder")
    rank.fill("3")
    page.locator("#job-r[placeholder='3']").wait_for()  # the plan follows
    rank.fill("")
    page.locator(f"#job-r[placeholder='{default}']").wait_for()
    assert default not in ("auto", "3")
    samples.fill("")
    page.locator("#job-samples[placeholder=auto]").wait_for()  # none are answered


def test_a_plan_follows_once_the_server_is_back(page: "Page", make_server: Callable[..., "PageServer"]) -> None:
    server = make_server()
    upload(page, server)
    server.kill()
    page.get_by_label("Epochs").fill("2")
    page.get_by_role("alert").get_by_text("The server does not answer.").wait_for()
    server.start()
    plan = page.get_by_role("region", name="Plan")
    plan.get_by_role("row").filter(has=page.get_by_role("rowheader", name="epochs")).filter(has_text="2").wait_for()


def test_a_server_that_is_killed_and_comes_back(page: "Page", make_server: Callable[..., "PageServer"]) -> None:
    server = make_server("--checkpoint-every", "5")
    job = start(page, server, "survivor", 100)
    chart = page.get_by_role("slider", name="Loss")
    page.locator("[role=slider][aria-valuemax]").first.wait_for()
    page.wait_for_function("() => Number(document.querySelector('[role=slider]').getAttribute('aria-valuemax')) > 20")
    server.kill()
    page.get_by_role("status").get_by_text("does not answer").wait_for()
    server.start()
    page.get_by_role("status").get_by_text("tiny").wait_for()
    status(page, "succeeded")
    assert state(page) == {"job": job}
    assert chart.get_attribute("aria-valuemax") == "300"


def test_dataset_lines_are_text(page: "Page", server: "PageServer") -> None:
    open_train(page, server)
    drop(page, "hostile.jsonl", lines(chat(HOSTILE, HOSTILE), {"messages": [{"role": HOSTILE, "content": HOSTILE}]}))
    page.get_by_role("list", name="Problems").get_by_text("<img").wait_for()
    assert page.locator("mark.learned", has_text="<script>").count()
    assert page.locator("main img, main script").count() == 0
    assert "hacked" not in page.title()


def test_preference_pairs(page: "Page", server: "PageServer") -> None:
    upload(page, server, PAIRS, "pairs.jsonl")
    page.get_by_text("preference pairs for DPO").wait_for()
    assert page.get_by_label("Method").input_value() == "dpo"
    page.get_by_label("Beta").fill("0.2")
    page.get_by_label("Name of the adapter").fill("preferred")
    page.get_by_role("button", name="Start training").click()
    status(page, "succeeded")
    job = get(page, server, f"v1/fine_tuning/jobs/{state(page)['job']}")
    assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.2


def test_it_fits_a_phone(page: "Page", server: "PageServer") -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    upload(page, server)
    width = "() => document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 360
    page.get_by_label("Name of the adapter").fill("narrow")
    page.get_by_role("button", name="Start training").click()
    status(page, "succeeded")
    assert page.evaluate(width) <= 360
    page.get_by_role("link", name="All files and jobs").click()
    page.get_by_role("link", name="narrow").wait_for()
    assert page.evaluate(width) <= 360


def test_several_files_and_one_that_is_refused(page: "Page", make_server: Callable[..., "PageServer"]) -> None:
    server = make_server("--max-file-bytes", "2000")
    open_train(page, server)
    files = [("small.jsonl", GOOD), ("large.jsonl", GOOD * 10)]
    page.locator("input[type=file]").first.set_input_files(
        [{"name": name, "mimeType": "application/json", "buffer": content} for name, content in files]
    )
    page.get_by_role("alert").get_by_text("large.jsonl").wait_for()
    page.get_by_role("link", name="small.jsonl").wait_for()
    page.get_by_role("button", name="Delete small.jsonl").click()
    page.get_by_role("link", name="small.jsonl").wait_for(state="detached")
    assert get(page, server, "v1/files")["data"] == []


@pytest.mark.parametrize("again", [False, True], ids=["once", "from a checkpoint"])
def test_events_arrive_once_and_in_order(page: "Page", server: "PageServer", again: bool) -> None:
    steps = [*range(1, 1501), *(range(1401, 1601) if again else ())]
    events = [
        {"id": f"ftevent-{number:024x}", "created_at": 0, "type": "metrics", "level": "info", "message": "",
         "data": {"step": step, "train_loss": number, "learning_rate": 1.0}}
        for number, step in enumerate(steps)
    ]  # fmt: skip
    open_train(page, server)
    points = page.evaluate(
        """async (events) => {
          const { JobEvents } = await import("/page/job_events.js");
          const fetched = window.fetch;
          window.fetch = async (path) => {
            const url = new URL(path, location.href);
            if (!url.pathname.includes("ftjob-x")) return fetched(path);
            const newest = events.slice(0, window.known).reverse();
            const from = newest.findIndex(({ id }) => id === url.searchParams.get("after")) + 1;
            const data = newest.slice(from, from + 1000);
            return Response.json({ data, has_more: newest.length > from + 1000, last_id: data.at(-1)?.id });
          };
          const job = new JobEvents("ftjob-x");
          for (window.known of [1200, 1450, events.length]) await Promise.all([job.load(), job.load()]);
          return job.curves.loss;
        }""",
        events,
    )
    assert [step for step, _ in points] == [*range(1, 1601 if again else 1501)]
    assert points[-1][1] == len(events) - 1


def test_a_key_trains_what_it_may(
    page: "Page", make_server: Callable[..., "PageServer"], tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    digest = hashlib.sha256(b"secret").hexdigest()
    keys.write_text(f'[alice]\nsha256 = "{digest}"\nadapters = ["poet", "mine-*"]\ntrain = true\ncreate = ["mine-*"]\n')
    server = make_server("--keys", str(keys))
    page.add_init_script("sessionStorage.setItem('loradeck.key', 'secret')")
    open_train(page, server)
    drop(page, "ahoy.jsonl", GOOD)
    page.get_by_role("alert").get_by_text("mine-*").wait_for()  # there is no name that it may create yet
    page.get_by_text("this key may create: mine-*").wait_for()
    assert page.get_by_label("Train", exact=True).locator("option").all_inner_texts() == ["tiny", "poet"]
    page.get_by_label("Name of the adapter").fill("theirs")
    page.get_by_role("alert").get_by_text("theirs").wait_for()
    page.get_by_label("Name of the adapter").fill("mine-first")
    page.get_by_role("region", name="Plan").wait_for()
    page.get_by_role("button", name="Start training").click()
    status(page, "succeeded")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the metrics").click()
    assert download.value.path().read_text().startswith("step,train_loss")


def test_training_goes_on_from_an_adapter_with_a_validation_file(page: "Page", server: "PageServer") -> None:
    upload(page, server, lines(*(chat(f"{number}?", "Aye!") for number in range(4))), "valid.jsonl")
    upload(page, server)
    page.get_by_label("Train", exact=True).select_option("pirate")
    page.get_by_label("Validation file").select_option("valid.jsonl")
    plan = page.get_by_role("region", name="Plan")
    plan.get_by_text("as pirate has it").first.wait_for()
    assert plan.locator("dd").nth(2).inner_text() == "4"
    page.get_by_role("button", name="Start training").click()
    status(page, "succeeded")
    page.get_by_role("link", name="Open in Compare").click()
    assert state(page)["columns"][1] == {"model": "pirate@2"}


def create(page: "Page", server: "PageServer", name: str, filename: str, content: bytes) -> str:
    """Create a job as another client would, and return its id."""
    file = {"name": filename, "mimeType": "text/plain", "buffer": content}
    form: Any = {"purpose": "fine-tune", "file": file}
    id = page.request.post(f"{server.url}/v1/files", multipart=form).json()["id"]
    body = {"model": "tiny", "training_file": id, "suffix": name}
    return page.request.post(f"{server.url}/v1/fine_tuning/jobs", data=body).json()["id"]


def test_curves_of_several_jobs(page: "Page", server: "PageServer") -> None:
    open_train(page, server)
    for name in ("left", "right"):
        create(page, server, name, "ahoy.jsonl", GOOD)
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name=name))
        row.get_by_text(f"{name}@1").wait_for()
        row.get_by_role("checkbox").check()
    legend = page.get_by_role("list", name="Curves of Checked jobs")
    for name in ("left", "right"):
        legend.get_by_role("button", name=name).wait_for()
    page.get_by_role("slider", name="Checked jobs").locator("path.curve[d^=M]").nth(1).wait_for()
    page.get_by_role("checkbox", name="Show left in the chart").uncheck()
    legend.get_by_role("button", name="left").wait_for(state="detached")


def test_an_upload_can_be_stopped(page: "Page", server: "PageServer") -> None:
    open_train(page, server)
    page.route("**/v1/files", lambda route: None if route.request.method == "POST" else route.continue_())
    drop(page, "endless.jsonl", GOOD)
    page.get_by_role("progressbar", name="Upload of endless.jsonl").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("alert").get_by_text("endless.jsonl: The upload was stopped.").wait_for()


def test_a_job_that_fails_says_why(page: "Page", server: "PageServer") -> None:
    open_train(page, server)
    job = create(page, server, "failing", "bad.jsonl", b'{"prompt": 1}\n')
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="failing"))
    row.get_by_text("failed").wait_for()
    row.get_by_text("bad.jsonl:1").wait_for()
    row.get_by_role("link").click()
    page.get_by_role("alert").get_by_text("bad.jsonl:1").wait_for()
    assert state(page) == {"job": job}


def test_a_job_that_is_not_there(page: "Page", server: "PageServer") -> None:
    page.goto(f"{server.url}/#train=%7B%22job%22%3A%22ftjob-0%22%7D")
    page.get_by_role("alert").get_by_text("ftjob-0").wait_for()
    page.get_by_role("link", name="All files and jobs").click()
    page.get_by_text("Drop a dataset here").wait_for()


def test_settings_stay_while_another_view_is_shown(page: "Page", server: "PageServer") -> None:
    upload(page, server)
    address = page.url
    page.get_by_label("Name of the adapter").fill("unfinished")
    page.get_by_role("link", name="Adapters").click()
    page.get_by_label("Name of the adapter").wait_for(state="detached")
    page.get_by_role("link", name="Train", exact=True).click()
    assert page.get_by_label("Name of the adapter").input_value() == "unfinished"
    assert page.url == address
    page.get_by_role("link", name="Train", exact=True).click()
    page.get_by_text("Drop a dataset here").wait_for()
