"""The web page in a real Chromium, against a real control plane over HTTP whose workers are stand-ins."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from configs.task_spec import TaskSpec
from orchestrator.api.requests import (
    ListTasks,
    ListTeams,
    ListVersions,
    ReadAudit,
    ReadEvents,
    ShowMatrix,
    ShowScores,
    ShowStorage,
    ShowTask,
    Submit,
)
from orchestrator.commands.score_texts import latex_text
from orchestrator.tasks.task_record import results_key
from subspace_store.requests import Expire, Hold
from tests.browser.conftest import FIRST, PICTURES, Visit, Visits, loses
from tests.browser.install import AXE
from tests.builders import LABELS, task_document, write_rows
from tests.orchestrator import tables
from tests.orchestrator.api.test_flipped import keep
from tests.orchestrator.site import Site
from workers.orders import Train

pytestmark = pytest.mark.browser


def submit(site: Site, title: str) -> None:
    site.client.ask(Submit(task=TaskSpec.model_validate(site.document(title)), by="ann"))


def keep_results(site: Site) -> None:
    """What each row of red/alpha got, as workers keep it: right at its birth, and wrong by now."""
    record = site.plant.get("red/alpha")
    for version, per_row in ((1, (1,)), (4, (0,))):
        keep(site, record, results_key(record.task_id, version), version, per_row)


def hold_training(site: Site) -> None:
    site.plant.cluster.hold = lambda order: isinstance(order, Train)


# --- logging in --------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_and_a_right_one_is_kept_for_this_tab_alone(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.page.goto(site.url)
    ann.page.get_by_label("Token").fill("wrong")
    ann.page.get_by_role("button", name="Log in").click()
    assert "missing or wrong token" in ann.page.get_by_role("alert").inner_text()
    ann.log_in("admin")
    kept = "[Object.keys(sessionStorage), Object.keys(localStorage), document.cookie]"
    assert ann.page.evaluate(kept) == [["onebasis-token"], ["onebasis-theme"], ""]
    ann.page.reload()
    ann.page.get_by_role("heading", name="Now", exact=True).wait_for()
    ann.page.get_by_role("button", name="Log out").click()
    ann.page.get_by_label("Token").wait_for()
    assert ann.page.evaluate(kept)[0] == []


def test_a_token_that_is_revoked_meanwhile_leads_back_to_the_login(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("admin")
    ann.open("Admin")
    ann.page.get_by_role("button", name=re.compile("^Revoke .* of admin-of-all")).click()
    ann.page.get_by_role("button", name="Revoke it").click()
    ann.page.get_by_role("button", name="Log in").wait_for()


# --- the pages ---------------------------------------------------------------------------------------------------


def test_a_task_moves_from_waiting_to_training_to_published_without_a_reload(site: Site, visit: Visits) -> None:
    hold_training(site)
    ann = visit()
    ann.log_in("admin")
    for title in ("red/one", "blue/two", "red/three"):
        submit(site, title)
    runs, waits = (
        ann.page.get_by_role("region", name="Tasks that run"),
        ann.page.get_by_role("region", name="Tasks that wait"),
    )
    row = runs.get_by_role("row", name="red/one")
    row.get_by_text("3/10").wait_for()
    assert "training" in row.inner_text()
    waiting = waits.get_by_role("row", name="red/three")
    waiting.get_by_text("no-free-place").wait_for()
    ann.page.keyboard.press("Control+F5")  # in the middle of it
    row.get_by_text("3/10").wait_for()
    site.plant.cluster.hold = lambda order: False
    site.plant.cluster.release()
    newest = ann.page.get_by_role("region", name="Newest tasks").get_by_role("row", name="red/three")
    newest.get_by_text("published").wait_for()
    assert ann.page.get_by_text("Nothing runs.").is_visible()
    assert site.client.ask(ShowTask(reference="red/three"))["state"] == "published"


def test_a_task_is_submitted_by_upload_goes_on_where_it_was_cut_off_and_is_watched(site: Site, visit: Visits) -> None:
    hold_training(site)
    folder = site.folder / "mine"
    rows = [
        {"text": f"a text {n} {random.Random(n).randbytes(2000).hex()}", "label": LABELS[n % 2]} for n in range(600)
    ]
    write_rows(folder / "rows/train.jsonl", rows)  # 2.4 MB: several pieces
    write_rows(
        folder / "eval.jsonl", [{"text": "another", "label": LABELS[0]}, {"text": "one more", "label": LABELS[1]}]
    )
    files = {"train_file": "rows/train.jsonl", "eval_file": "eval.jsonl"}
    document = task_document("red/sent", data=files, method={"name": "lora"})
    (folder / "task.yaml").write_text(yaml.safe_dump(document))
    ann = visit()
    ann.log_in("submitter", "red")
    pieces: list[tuple[str, int]] = []

    def cut_off(route: Any) -> None:
        offset = int(parse_qs(urlsplit(route.request.url).query)["offset"][0])
        pieces.append((route.request.url.split("?")[0][-64:], offset))
        route.abort() if len(pieces) == 2 else route.continue_()

    ann.page.route(re.compile("/v1/uploads/red/"), cut_off)
    ann.open("Submit")
    ann.page.get_by_label("Task file", exact=True).set_input_files(folder / "task.yaml")
    form = ann.page.get_by_role("form", name="Submit red/sent")
    form.get_by_role("button", name="Submit", exact=True).click()
    assert "data.train_file: nothing to send is chosen" in form.get_by_role("alert").inner_text()
    assert pieces == []
    form.get_by_label("Rows to train with: rows/train.jsonl").set_input_files(folder / "eval.jsonl")
    form.get_by_text("The task file names train.jsonl here, and eval.jsonl is chosen").wait_for()
    form.get_by_label("Rows to train with: rows/train.jsonl").set_input_files(folder / "rows/train.jsonl")
    form.get_by_label("Rows to score with: eval.jsonl").set_input_files(folder / "eval.jsonl")
    assert form.get_by_role("alert").count() == 0  # what was missing is chosen
    assert serious(ann) == []
    ann.page.screenshot(path=kept("submit"), full_page=True)
    form.get_by_role("button", name="Only check it").click()
    ann.page.get_by_text("It would be taken in: 600 rows to train, 2 rows to score").wait_for()
    assert [task["title"] for task in site.client.ask(ListTasks())].count("red/sent") == 0  # checked, and not taken in
    # Both files came whole, and what was cut off began again where it was.
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files.values()}
    assert {digest for digest, _ in pieces} == {*digests.values()}
    of_train = [offset for digest, offset in pieces if digest == digests["rows/train.jsonl"]]
    assert of_train[0] == 0
    assert of_train[1] == of_train[2] > 0
    assert of_train[2:] == sorted({*of_train[2:]})
    sent = len(pieces)
    form.get_by_role("button", name="Submit", exact=True).click()
    ann.page.get_by_role("heading", name="red/sent").wait_for()
    assert len(pieces) == sent  # the service has them already
    ann.page.locator(".why").get_by_text("is fine-tuning its adapter").wait_for()
    site.plant.cluster.hold = lambda order: False
    site.plant.cluster.release()
    ann.page.get_by_text("main holds it since version 5").wait_for()
    task = site.client.ask(ShowTask(reference="red/sent"))
    assert (task["train_rows"], task["state"]) == (600, "published")
    asked = [
        row
        for row in site.client.ask(ReadAudit())
        if row["request"] in ("upload", "submit") and row["of"] == row["seq"]
    ]
    assert [(row["name"], row["request"]) for row in asked[-2:]] == [
        ("submitter-of-red", "upload"),
        ("submitter-of-red", "submit"),
    ]


def test_a_page_that_is_left_sends_and_submits_nothing_more(site: Site, visit: Visits) -> None:
    folder = site.folder / "mine"
    for name in ("train.jsonl", "eval.jsonl"):
        write_rows(folder / name, [{"text": f"{name} {n}", "label": LABELS[n % 2]} for n in range(4)])
    document = task_document("red/left", data={"train_file": "train.jsonl", "eval_file": "eval.jsonl"})
    (folder / "task.yaml").write_text(yaml.safe_dump(document))
    ann = visit()
    ann.log_in("submitter", "red")
    held: list[Any] = []
    posted: list[str] = []
    # The first piece gets no answer. Playwright takes no bound method here.
    ann.page.route(re.compile("/v1/uploads/red/"), lambda route: held.append(route))
    ann.page.on("request", lambda asked: posted.append(asked.url) if asked.method == "POST" else None)
    ann.open("Submit")
    ann.page.get_by_label("Task file", exact=True).set_input_files(folder / "task.yaml")
    form = ann.page.get_by_role("form", name="Submit red/left")
    form.get_by_label("Rows to train with: train.jsonl").set_input_files(folder / "train.jsonl")
    form.get_by_label("Rows to score with: eval.jsonl").set_input_files(folder / "eval.jsonl")
    form.get_by_role("button", name="Submit", exact=True).click()
    form.get_by_text("Sending train.jsonl").wait_for()
    ann.open("Now")
    ann.page.wait_for_timeout(1000)  # longer than it waits before it would send a piece again
    assert len(held) == 1
    assert [url.rpartition("/v1/")[2] for url in posted] == ["read-task", "uploads/missing"]


def test_a_task_file_that_is_none_is_refused_with_the_words_of_the_service(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("submitter", "red")
    ann.open("Submit")
    choose = ann.page.get_by_label("Task file", exact=True)
    choose.set_input_files({"name": "a.yaml", "mimeType": "text/yaml", "buffer": b"team: red\nname: x\nlorra: {}\n"})
    assert "unknown key 'lorra' (did you mean 'lora'?)" in ann.page.get_by_role("alert").inner_text()
    choose.set_input_files({"name": "a.yaml", "mimeType": "text/yaml", "buffer": b"team: r\xe9d\n"})
    assert "is no UTF-8 text" in ann.page.get_by_role("alert").inner_text()


def test_the_rows_that_flipped_are_shown_in_a_cell(site: Site, visit: Visits) -> None:
    keep_results(site)
    ann = visit()
    ann.log_in("viewer", "red")
    ann.open("Matrix")
    ann.page.get_by_role("button", name="Why red/alpha").click()
    flipped = ann.page.get_by_role("dialog").get_by_role("region", name="Rows that flipped")
    flipped.wait_for()
    assert ann.page.get_by_text("Against version 1: 1 of 1 row worse, 0 better").is_visible()
    row = flipped.locator("tbody tr").inner_text().split("\t")
    assert row == ["1", "other", "no", "right", "wrong"]
    assert serious(ann) == []


def test_the_gpu_hours_of_a_team_stand_beside_its_quota(site: Site, visit: Visits) -> None:
    quotas = site.service.settings.teams["red"].model_copy(update={"gpu_hours_a_week": 40.0})
    teams = {**site.service.settings.teams, "red": quotas}
    site.service.sources.settings = site.service.settings.model_copy(update={"teams": teams})
    ann = visit()
    ann.log_in("viewer")
    table = ann.page.get_by_role("region", name="Shares and quotas of teams")
    table.get_by_role("columnheader", name="GPU-hours a week").wait_for()
    heads = table.get_by_role("columnheader").all_inner_texts()
    at = heads.index("GPU-hours a week")
    assert heads[at + 1] == "of quota"
    for team, quota in (("red", "40"), ("blue", "none")):
        cells = (
            table.get_by_role("row").filter(has=ann.page.get_by_role("rowheader", name=team, exact=True)).locator("td")
        )
        used = site.client.ask(ListTeams())["teams"][team]["gpu_hours_a_week"]
        assert cells.nth(at - 1).inner_text() == f"{used:.2f}"
        assert cells.nth(at).inner_text() == quota


def test_cancel_and_preempt_do_what_they_say(site: Site, visit: Visits) -> None:
    hold_training(site)
    ann = visit()
    ann.log_in("admin")
    for title in ("red/one", "blue/two", "red/three"):
        submit(site, title)
    ann.page.get_by_role("button", name="Preempt red/one").first.click()
    site.wait_for("red/one", "training", attempt=2)
    ann.page.get_by_role("button", name="Cancel blue/two").first.click()
    asked = ann.page.get_by_role("dialog", name="Cancel blue/two?")
    assert "What it has trained so far is thrown away." in asked.inner_text()
    assert site.client.ask(ShowTask(reference="blue/two"))["state"] == "training"  # asked, and not done yet
    asked.get_by_role("button", name="Cancel blue/two").click()
    site.wait_for("blue/two", "cancelled")
    ann.page.get_by_role("button", name="Retry blue/two").wait_for()
    # Who asked is the token's name, never what the browser says of itself.
    told = [event["text"] for event in site.client.ask(ShowTask(reference="blue/two"))["events"]]
    assert any("by admin-of-all" in text for text in told)


def test_a_cell_opens_with_the_keyboard_and_says_why(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("viewer")
    ann.open("Matrix")
    matrix = ann.page.get_by_role("application", name=re.compile("^Matrix of scores"))
    matrix.focus()
    ann.page.keyboard.press("Home")
    told = ann.page.locator("#cell")
    found = site.client.ask(ShowMatrix())
    column = [task["title"] for task in found["tasks"]].index("red/alpha")
    at_birth = found["news"][0][column][1]
    assert (
        told.inner_text() == f"red/alpha under version 1: {at_birth:.4f}, 0 since birth, measured"
    )  # the worst is first
    ann.page.keyboard.press("End")
    newest = next(score for t, score, _ in found["news"][3] if t == column)
    moved = f"−{at_birth - newest:.4f} since birth"
    assert newest < at_birth
    assert told.inner_text() == f"red/alpha under version 4: {newest:.4f}, {moved}, measured"
    ann.page.keyboard.press("Enter")
    dialog = ann.page.get_by_role("dialog", name="red/alpha under version 4")
    dialog.get_by_text("the gate let it pass").wait_for()
    text = dialog.inner_text()
    assert f"{newest:.4f}, measured on 100 rows" in text
    assert f"from {at_birth:.4f} in version 1" in text
    assert re.search(r"Drift\s+at most \d\.\d\de[-+]\d+ of its update's norm, from version 3 to 4", text)
    assert "blue/delta" in text
    ann.page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert matrix.evaluate("box => box === document.activeElement")


def test_the_slider_puts_the_worst_task_of_that_version_first_and_all_can_be_copied(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("viewer")
    ann.open("Matrix")
    slider = ann.page.get_by_role("slider")
    slider.focus()
    ann.page.keyboard.press("ArrowLeft")
    table = ann.page.get_by_role("region", name="Scores under version 3")
    table.wait_for()
    first = [row.split("\t")[0] for row in table.locator("tbody tr").all_inner_texts()]
    # One that lost, those that stay as they are by birth, and last the one that is not there yet.
    assert first == ["red/alpha", "blue/beta", "red/gamma", "blue/delta"]
    ann.page.get_by_role("button", name="Copy as CSV").click()
    ann.page.get_by_text("4 tasks copied as CSV").wait_for()
    head, *lines = ann.page.evaluate("navigator.clipboard.readText()").splitlines()
    assert head == "task,born in,base,own adapter,version 1,version 2,version 3,version 4"
    cells = {line.split(",")[0]: line.split(",")[1:] for line in lines}
    assert set(cells) == {*FIRST}
    assert cells["blue/delta"][0] == "4"
    assert cells["blue/delta"][3:6] == ["", "", ""]
    assert float(cells["red/alpha"][3]) == site.client.ask(ShowMatrix())["news"][0][0][1]
    ann.page.get_by_role("button", name="Copy as LaTeX").click()
    ann.page.get_by_text("4 tasks copied as LaTeX").wait_for()
    copied = ann.page.evaluate("navigator.clipboard.readText()").splitlines()
    made = latex_text(site.client.ask(ShowScores())).splitlines()
    assert sorted(copied) == sorted(made)  # the page has its own order of the tasks


def test_main_is_rolled_back_after_a_look_and_forward_again(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("maintainer")
    ann.open("Versions")
    ann.page.get_by_role("button", name="Move main here, to version 2").click()
    dialog = ann.page.get_by_role("dialog", name="Move main to version 2")
    dialog.get_by_text("red/gamma").wait_for()
    assert dialog.get_by_role("listitem").all_inner_texts() == ["red/gamma", "blue/delta"]
    assert site.plant.state.refs["main"] == 4  # a look changes nothing
    dialog.get_by_label("Reason").fill("tried out")
    dialog.get_by_role("button", name="Move main to version 2").click()
    dialog.wait_for(state="hidden")
    assert site.plant.state.refs["main"] == 2
    ann.page.get_by_role("row", name=re.compile("^2 .*main ")).wait_for()
    site.wait_for("red/gamma", "parked")
    ann.page.get_by_role("button", name="Move main here, to version 4").click()
    dialog = ann.page.get_by_role("dialog", name="Move main to version 4")
    dialog.get_by_role("button", name="Move main to version 4").click()
    dialog.wait_for(state="hidden")
    assert site.plant.state.refs["main"] == 4
    assert [row["version"] for row in site.client.ask(ListVersions()) if "main" in row["refs"]] == [4]


def test_main_is_held_where_it_is_rolled_back_to_and_released(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("maintainer")
    ann.open("Versions")
    ann.page.get_by_role("button", name="Move main here, to version 3").click()
    ann.page.get_by_label("Hold main there").check()
    ann.page.get_by_role("button", name="Move main to version 3").click()
    ann.page.get_by_text("main is held by maintainer-of-all: no reason given").wait_for()
    held = site.plant.state.held
    assert held is not None
    assert held.actor == "maintainer-of-all"
    ann.page.get_by_role("button", name="Release main").click()
    ann.page.get_by_text("main is held").wait_for(state="hidden")
    assert site.plant.state.held is None


def test_a_task_is_removed_after_a_look_and_what_is_left_can_be_collected(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("maintainer", "red")
    ann.open("Versions")
    asks = ann.page.get_by_role("form", name="Remove a task")
    asks.get_by_label("Task").select_option("red/gamma")
    assert [one.strip() for one in asks.get_by_label("Task").inner_text().split()] == ["red/alpha", "red/gamma"]
    asks.get_by_role("button", name="See what that would do").click()
    dialog = ann.page.get_by_role("dialog", name="Remove red/gamma")
    dialog.get_by_text("4, after version 2").wait_for()
    assert "instead of" in dialog.inner_text()
    assert site.plant.state.refs["main"] == 4  # a look changes nothing
    dialog.get_by_label("Reason").fill("no licence")
    dialog.get_by_role("button", name="Remove red/gamma").click()
    dialog.wait_for(state="hidden")
    assert site.plant.held() == ["blue/beta", "blue/delta", "red/alpha"]
    moves = ann.page.get_by_role("region", name="Moves of main")
    moves.get_by_role("row").filter(has_text="no licence").get_by_text("maintainer-of-red").wait_for()
    assert "blue/" not in ann.page.get_by_role("main").inner_text()
    site.client.ask(Expire(versions=(3, 4)))
    ann.page.reload()
    left = site.client.ask(ShowStorage())
    assert left["garbage_objects"] > 0
    ann.page.get_by_text(f"{left['garbage_objects']} objects, ").wait_for()
    ann.page.get_by_text("2 of them expired").wait_for()


def test_a_version_that_waits_is_refused_with_a_reason(site: Site, visit: Visits) -> None:
    site.client.ask(Hold(reason="audit"))
    submit(site, "red/late")
    site.wait_for("red/late", "evaluating")
    ann = visit()
    ann.log_in("maintainer", "red")
    ann.open("Versions")
    ann.page.get_by_role("button", name="Refuse version 5").click()
    dialog = ann.page.get_by_role("dialog", name="Refuse version 5")
    dialog.get_by_role("button", name="Refuse version 5").click()
    dialog.get_by_role("alert").wait_for()  # without a reason it is not
    dialog.get_by_label("Reason").fill("slower")
    dialog.get_by_role("button", name="Refuse version 5").click()
    dialog.wait_for(state="hidden")
    assert site.wait_for("red/late", "rejected")["reason"] == "maintainer-of-red refused it: slower"
    assert site.plant.state.refs["main"] == 4


def test_a_rejected_version_stands_beside_the_line_of_main_with_the_gates_reason(site: Site, visit: Visits) -> None:
    site.plant.cluster.score = lambda title, held: 0.2 if title == "red/bad" else loses(title, held)
    submit(site, "red/bad")
    site.wait_for("red/bad", "rejected")
    site.publish("red/good")
    ann = visit()
    ann.log_in("viewer")
    ann.open("Versions")
    rejected = ann.page.get_by_role("row").filter(has=ann.page.get_by_role("rowheader", name="5", exact=True))
    rejected.get_by_text("rejected").wait_for()
    versions = {row["version"]: row for row in site.client.ask(ListVersions())}
    assert versions[5]["reason"] in rejected.inner_text()
    assert versions[5]["reason"]
    assert (versions[5]["parent"], versions[6]["parent"]) == (4, 4)
    dots = {row.get_by_role("rowheader").inner_text().split()[0]: row.locator(".dot").evaluate("dot => dot.style.left")
            for row in ann.page.locator("tbody tr").all() if row.locator(".dot").count()}  # fmt: skip
    assert dots == {"6": "8px", "5": "24px", "4": "8px", "3": "8px", "2": "8px", "1": "8px"}
    ann.page.screenshot(path=kept("versions-rejected"), full_page=True)


def test_a_team_is_paused_and_goes_on(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("maintainer", "red")
    assert ann.page.get_by_role("button", name="Pause team blue").count() == 0
    ann.page.get_by_role("button", name="Pause team red").click()
    ann.page.get_by_text("Team red is paused by maintainer-of-red").wait_for()
    submit(site, "red/one")
    row = ann.page.get_by_role("region", name="Tasks that wait").get_by_role("row", name="red/one")
    row.get_by_text("paused").first.wait_for()
    ann.page.get_by_role("button", name="Resume team red").click()
    site.wait_for("red/one", "published")
    ann.page.get_by_text("Team red is paused").wait_for(state="hidden")


def compared(ann: Visit) -> Any:
    """The dialog that compares version 1 with version 3."""
    ann.log_in("viewer")
    ann.open("Versions")
    for version in (1, 3):
        ann.page.get_by_label(f"Mark version {version}").check()
    ann.page.get_by_role("button", name="Compare").click()
    return ann.page.get_by_role("dialog", name="From version 1 to version 3")


def test_two_versions_are_compared(site: Site, visit: Visits) -> None:
    dialog = compared(visit())
    dialog.get_by_role("row", name="red/alpha").wait_for()
    assert "blue/beta, red/gamma" in dialog.inner_text()


def test_how_far_a_task_moved_is_shown_of_one_that_was_revised_since(site: Site, visit: Visits) -> None:
    document = site.document("red/alpha", revises=True)
    for kind in ("train_file", "eval_file"):
        new = [{"text": f"{kind}: another text {i}", "label": LABELS[i % 2]} for i in range(6)]
        document["data"][kind] = str(write_rows(site.folder / "data" / f"{kind}.jsonl", new))
    revised = site.client.ask(Submit(task=TaskSpec.model_validate(document), by="ann"))
    site.wait_for(revised["task_id"], "published")
    row = compared(visit()).get_by_role("row", name="red/alpha")
    assert re.fullmatch(r"\d\.\d\de[-+]\d+", row.get_by_role("cell").last.inner_text())


def test_a_tab_that_is_looked_at_again_asks_nothing_twice(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("viewer")
    ann.page.wait_for_load_state("networkidle")
    asked = ann.page.evaluate("""() => {
        const asked = []
        window.fetch = url => { asked.push(url.pathname + url.search); return new Promise(() => {}) }
        for (let turn = 0; turn < 3; turn++) document.dispatchEvent(new Event("visibilitychange"))
        return asked
    }""")
    assert "/v1/whoami" in asked
    assert len(asked) == len({*asked})


def test_one_task_shows_its_life_its_log_and_its_loss_while_it_trains(site: Site, visit: Visits) -> None:
    hold_training(site)
    ann = visit()
    ann.log_in("submitter", "red")
    submit(site, "red/one")
    ann.page.get_by_role("link", name="red/one").first.click()
    ann.page.get_by_role("heading", name="red/one").wait_for()
    ann.page.get_by_role("img", name="loss by step. loss: from 0.5000 to 0.5000").wait_for()
    ann.page.get_by_label("Training log").get_by_text("a line of the log").wait_for()
    # Ctrl-F5 in the middle of it: all is asked for anew, and nothing is missing or doubled.
    ann.page.context.new_cdp_session(ann.page).send("Page.reload", {"ignoreCache": True})
    ann.page.get_by_role("img", name="loss by step. loss: from 0.5000 to 0.5000").wait_for()
    files = site.client.ask(ShowTask(reference="red/one"))["spec"]["data"]
    for kind in ("train_file", "eval_file"):
        ann.page.locator("dd").get_by_text(files[kind], exact=True).wait_for()
    assert "is fine-tuning its adapter (attempt 1)" in ann.page.locator(".why").inner_text()
    site.plant.cluster.hold = lambda order: False
    site.plant.cluster.release()
    ann.page.get_by_text("main holds it since version 5").wait_for()
    assert [text.split()[2] for text in ann.page.get_by_role("listitem").all_inner_texts()] == [
        "submitted", "Claimed", "TrainingDone", "MergeBegun", "Merged", "Judged",
    ]  # fmt: skip
    told = [event["text"] for event in site.client.pages(ReadEvents(reference="red/one")) if event["kind"] == "log"]
    ann.page.get_by_label("Training log").get_by_text(told[-1]).wait_for()
    lines = ann.page.get_by_label("Training log").inner_text().strip().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == told
    with ann.page.expect_download() as download:
        ann.page.get_by_role("button", name="Export as a PEFT adapter").click()
    assert download.value.suggested_filename == "red-one.zip"
    assert Path(download.value.path()).read_bytes()[:2] == b"PK"


# --- who may -----------------------------------------------------------------------------------------------------


def test_a_viewer_sees_no_button_that_changes_anything_and_the_server_refuses_it_anyway(
    site: Site, visit: Visits
) -> None:
    hold_training(site)
    submit(site, "red/one")
    ann = visit()
    ann.log_in("viewer", "red")
    ann.page.get_by_role("region", name="Tasks that run").get_by_role("row", name="red/one").wait_for()
    seen = set(ann.page.get_by_role("button").all_inner_texts())
    ann.open("Versions")
    ann.page.get_by_role("region", name="Versions").wait_for()
    seen |= set(ann.page.get_by_role("button").all_inner_texts())
    ann.page.goto(f"{site.url}/#/task/red/one")
    ann.page.get_by_role("heading", name="red/one").wait_for()
    seen |= set(ann.page.get_by_role("button").all_inner_texts())
    assert seen == {"Log out", "Compare the two that are marked"}
    for path, body in (("cancel/red/one", {}), ("rollback/1", {}), ("tokens", {"name": "x", "role": "admin"})):
        asked = f"""fetch("v1/" + {json.dumps(path)}, {{method: "POST", body: {json.dumps(json.dumps(body))},
            headers: {{authorization: "Bearer " + sessionStorage.getItem("onebasis-token")}}}}).then(r => r.status)"""
        assert ann.page.evaluate(asked) == 403, path
    assert site.plant.state.refs["main"] == 4


def test_a_team_sees_its_own_tasks_alone(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("admin", "red")
    for name in ("Now", "Matrix", "Versions", "Admin"):
        ann.open(name)
        ann.page.wait_for_load_state("networkidle")
        assert "blue" not in ann.page.content(), name
    ann.open("Matrix")
    ann.page.get_by_text("2 tasks of other teams not shown").wait_for()
    ann.page.goto(f"{site.url}/#/task/blue/beta")
    assert "there is no such task" in ann.page.get_by_role("alert").inner_text()


# --- size --------------------------------------------------------------------------------------------------------

TASKS_EACH, VERSIONS = 2, 500


def many_versions() -> Any:
    """A log of 500 versions, each of which brings two tasks and moves one earlier task in fifty."""
    chance, there = random.Random(1), list[str]()
    versions, scores = [], {}
    for number in range(1, VERSIONS + 1):
        new = [f"task-{number:03d}-{k}" for k in range(TASKS_EACH)]
        moved = {task: 1.0 for task in there if chance.random() < 0.02}
        versions.append(tables.version(number, number - 1, new, moved))
        scores[number] = dict.fromkeys(new, 0.8) | {task: 0.8 + chance.gauss(0, 0.01) for task in moved}
        there += new
    return tables.state(versions, scores)


def test_a_thousand_tasks_under_500_versions_are_drawn_and_sorted(
    site: Site, visit: Visits, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The log is what a service of years would have; all that is made of it is real.
    state = many_versions()
    versions = site.service.versions()
    monkeypatch.setattr(versions._store, "refresh", lambda: state)
    ann = visit()
    ann.log_in("viewer")
    ann.open("Matrix")
    ann.page.get_by_text("1,000 tasks × 500 versions").wait_for()
    table = ann.page.get_by_role("region", name="Scores under version 500")
    worst = min(
        (change, column)
        for column, change in enumerate(changes(site.client.ask(ShowMatrix())))
    )  # fmt: skip
    shown = table.locator("tbody tr").first.inner_text().split("\t")
    assert shown[5] == f"−{-worst[0]:.4f}"
    assert table.locator("tbody tr").count() == 50
    slider = ann.page.get_by_role("slider")
    slider.focus()
    for _ in range(30):
        ann.page.keyboard.press("ArrowLeft")
    ann.page.get_by_role("region", name="Scores under version 470").wait_for()
    ann.page.get_by_label("Cells").select_option("with numbers")
    matrix = ann.page.get_by_role("application")
    matrix.focus()
    ann.page.keyboard.press("End")
    ann.page.keyboard.press("PageDown")
    assert "under version 500: 0." in ann.page.locator("#cell").inner_text()
    ann.page.screenshot(path=kept("matrix-1000x500"))


def changes(answer: dict[str, Any]) -> list[float]:
    """Each task's change since its birth under the newest version."""
    first, last = dict[int, float](), dict[int, float]()
    for row in answer["news"]:
        for column, score, _ in row:
            first.setdefault(column, score)
            last[column] = score
    return [last[column] - first[column] for column in sorted(first)]


# --- for everybody -----------------------------------------------------------------------------------------------

PAGES = {
    "now": ("Newest tasks", "Tasks that run", "Shares and quotas of teams", "Workers of pool default"),
    "matrix": ("Scores under version 4",),
    "versions": ("Versions, newest first", "Remove a task", "Moves of main, newest first", "Can be collected"),
    "admin": ("Teams, as the settings have them", "Tokens", "The newest 100 rows of the audit log", "Settings"),
    "task/red/alpha": ("Scores under every version", "Training log", "Evaluation rows, kept"),
}
"""Where each page is, and what it has by these names once its answers are there."""


def kept(name: str) -> Path:
    PICTURES.mkdir(exist_ok=True)
    return PICTURES / f"{name}.png"


def serious(tab: Visit) -> list[str]:
    """What axe-core finds that keeps people from using the page."""
    tab.page.evaluate(AXE.read_text())
    found = tab.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_is_for_everybody_asks_nobody_else_and_is_kept_as_a_picture(
    site: Site, visit: Visits, scheme: str
) -> None:
    keep_results(site)
    hold_training(site)
    for title in ("red/one", "blue/two", "red/three"):
        submit(site, title)
    ann = visit(color_scheme=scheme)
    ann.page.goto(site.url)
    ann.page.get_by_label("Token").wait_for()
    assert serious(ann) == []
    ann.page.screenshot(path=kept(f"login-{scheme}"))
    ann.log_in("admin")
    for name, parts in PAGES.items():
        ann.page.goto(f"{site.url}/#/{name}")
        for part in parts:
            ann.page.get_by_label(part, exact=True).or_(ann.page.get_by_text(part, exact=True)).first.wait_for()
        ann.page.screenshot(path=kept(f"{name.partition('/')[0]}-{scheme}"), full_page=True)
        assert serious(ann) == [], name
    ann.open("Versions")
    ann.page.get_by_role("button", name="Move main here, to version 2").click()
    ann.page.get_by_label("Reason").wait_for()
    ann.page.screenshot(path=kept(f"rollback-{scheme}"))
    assert serious(ann) == []
    ann.page.keyboard.press("Escape")
    ann.open("Matrix")
    ann.page.get_by_role("button", name="Why red/alpha").click()
    ann.page.get_by_role("dialog").get_by_text("Verdict").wait_for()
    ann.page.get_by_role("dialog").get_by_role("region", name="Rows that flipped").wait_for()
    ann.page.screenshot(path=kept(f"why-{scheme}"))
    assert serious(ann) == []
    assert ann.origins == {site.url}
    assert ann.complaints == []


def test_the_page_is_used_with_the_keyboard_alone(site: Site, visit: Visits) -> None:
    ann = visit()
    ann.log_in("admin")
    ann.page.reload()
    ann.page.get_by_role("heading", name="Now", exact=True).wait_for()
    ann.page.keyboard.press("Tab")
    assert ann.page.evaluate("document.activeElement.textContent") == "To the content"
    for _ in range(3):
        ann.page.keyboard.press("Tab")
    assert ann.page.evaluate("document.activeElement.textContent") == "Versions"
    ann.page.keyboard.press("Enter")
    ann.page.get_by_role("heading", name="Versions", exact=True).wait_for()
    ann.page.wait_for_function("document.activeElement.id === 'content'")  # a screen reader goes on there
    assert ann.page.title() == "Versions · onebasis"
