"""What gives up its worker goes on from its checkpoint: asked for by a person, or because the service ends."""

from __future__ import annotations

from tests.acceptance.conftest import Site


def steps_done(site: Site, title: str, state: str) -> int:
    task = site.ask("task", title)
    return int(task["progress"].get("step", 0)) if task["state"] == state else 0


def test_a_preempted_task_goes_on_from_its_checkpoint(site: Site) -> None:
    title = "payments/gives-way"
    site.run("submit", str(site.task_file("gives-way", steps=60)))
    site.wait("training steps", lambda: steps_done(site, title, "training") >= 5)
    assert site.ask("preempt", title)["state"] in ("training", "queued")

    task = site.wait_for_state(title, "published")
    told = task["training"]
    assert (told["preemptions"], told["lost_machines"], told["own_bugs"], task["attempt"]) == (1, 0, 0, 2)
    assert told["steps"] == 60
    assert told["resumed_from"] >= 5


def test_a_service_that_ends_while_it_refines_goes_on_with_the_refinement(site: Site) -> None:
    title = "payments/refined"
    site.run("submit", str(site.task_file("refined", steps=10, method={"refine_epochs": 15})))
    site.wait("refinement steps", lambda: steps_done(site, title, "refining") >= 2)
    site.run("down")
    task = site.ask("task", title)  # read without a running service
    assert (task["state"], task["worker"], task["training"]["preemptions"]) == ("refining", "", 1)
    site.run("up", "--config", "settings.yaml")

    task = site.wait_for_state(title, "published")
    assert task["training"]["unrefined"] == ""
    assert task["training"]["refined_seconds"] > 0
    versions = {version["version"]: version for version in site.ask("versions")}
    refined = versions[task["version"]]
    assert (refined["added"], refined["refined"]) == ([], [title])
    assert title in versions[refined["parent"]]["added"]
    assert any("went on from step" in event["text"] for event in task["events"] if event["kind"] == "TrainingDone")
    site.run("store", "verify", "--deep")
