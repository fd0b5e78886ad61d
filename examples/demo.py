"""The main job, end to end, with the commands that a user types: `python examples/demo.py` (or `make demo`).

Three teams submit six real tasks at different times; they are trained, merged, scored, published; one task is exported
and scored without onebasis; `main` is rolled back to where a question is answered otherwise, and forward again.
Everything it makes stays in `.onebasis/` of the folder it runs in.
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ONEBASIS = str(Path(sys.executable).with_name("onebasis"))
STATE = Path(".onebasis")
MARK = STATE / "made-by-the-demo"
EXPORTED = STATE / "exported"

# Seconds after the service is up, and the task file. The first two find free workers; the others arrive while
# earlier ones train, are merged or are scored.
ARRIVALS = (
    (0.0, "card-orders"),
    (1.0, "charges"),
    (8.0, "relevance"),
    (14.0, "account"),
    (20.0, "top-ups"),
    (26.0, "contradiction"),
)
SHOWN = "payments/charges"
SHOWN_DATA = HERE / "data/banking_charges.eval.jsonl.gz"


def main() -> None:
    """Run the job; leave nothing running, also after Ctrl-C."""
    started = time.monotonic()
    os.environ["ONEBASIS_CONTEXT"] = "local"  # and not a service that this user has logged in to
    make_room()
    try:
        page = run_job()
    except KeyboardInterrupt:
        print("\ninterrupted: what was made so far stays in .onebasis/; `make demo` starts afresh", flush=True)
        raise SystemExit(130) from None
    except subprocess.CalledProcessError as error:
        print(f"\nthis command failed: {' '.join(error.cmd)}", flush=True)
        raise SystemExit(1) from None
    finally:
        onebasis("down", check=False)
    print(f"\nThe demo took {time.monotonic() - started:.0f} s. Next:")
    print("  source .venv/bin/activate              then, in this folder:")
    print("  onebasis scores                        the matrix above; also as a picture: .onebasis/scores.png")
    print("  onebasis task payments/charges         the life of one task")
    print("  mlflow ui --backend-store-uri sqlite:///.onebasis/mlflow.db")
    print(
        "  onebasis up                            and a task of your own: copy one of configs/tasks/; it ends with the"
    )
    print(f"                                         address of the web page (in this run: {page})")


def make_room() -> None:
    """A demo starts from nothing; an earlier demo is moved aside, anything else in .onebasis is left alone."""
    if STATE.exists() and not MARK.exists():
        sys.exit(".onebasis/ here holds a service that the demo did not make: run the demo in another folder.")
    if STATE.exists():
        onebasis("down", check=False, quiet=True)
        aside = Path(f".onebasis-{time.strftime('%Y%m%d-%H%M%S')}")
        shutil.move(STATE, aside)
        print(f"The earlier demo is in {aside}/ now; moved back to .onebasis/ it can be looked at again.")
    STATE.mkdir()
    MARK.touch()


def run_job() -> str:
    """The steps, in the order in which they are told. Returns the address at which the web page was."""
    tell("One command starts Ray, two training workers, the store and the control plane")
    onebasis("up", *settings())
    page = f"{json.loads((STATE / 'server.json').read_text())['url']}/"

    tell("Three teams submit six tasks, each at its own time")
    submissions = threading.Thread(target=submit_later, args=(time.monotonic(),), daemon=True)
    submit(ARRIVALS[0][1])
    submissions.start()
    submit(ARRIVALS[1][1])
    onebasis("tasks", "--watch")
    while submissions.is_alive():  # only if all that had arrived ended before the last arrival
        submissions.join()
        onebasis("tasks", "--watch")

    tell("Each merge made a version of the one subspace")
    onebasis("versions")

    tell("What every merge did to every task")
    onebasis("scores")

    tell("Export a task as an ordinary PEFT adapter, and score it without onebasis")
    onebasis("export", SHOWN, "-o", str(EXPORTED))
    longest = str(answer("task", SHOWN)["spec"]["data"]["max_length"])
    command = [sys.executable, str(HERE / "score_adapter.py"), str(EXPORTED), str(SHOWN_DATA), longest]
    print(f"$ python examples/score_adapter.py {EXPORTED} {SHOWN_DATA.relative_to(HERE.parent)} {longest}", flush=True)
    outside = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    inside = score_now(SHOWN)
    print(f"{outside['accuracy']:.4f} on {outside['rows']} rows; `onebasis scores` says {inside:.4f}")
    if abs(outside["accuracy"] - inside) > 1e-9:
        sys.exit("The exported adapter does not reproduce the score: please report this.")
    tell("A published task answers; roll main back to where it answered otherwise, and ask again; undo it")
    newest = next(v for v in answer("versions") if "main" in v["refs"])
    if (found := answered_otherwise(answer("scores"))) is None:
        # No merge moved a task that was there before: what a rollback then changes is which tasks there are.
        back, asked = int(newest["parent"]), question_for(newest["added"][0], 0)
    else:
        title, back = found
        asked = question_for(title, most_changed(title, back, int(newest["version"])))
    before = predicted(asked)
    onebasis("rollback", str(back), "--preview")
    onebasis("rollback", str(back))
    after = predicted(asked)
    print(what_changed(before, after, back), flush=True)
    onebasis("rollback", str(newest["version"]))
    return page


def answered_otherwise(scores: dict) -> tuple[str, int] | None:
    """A task that a later merge has moved, and the newest version before that: best of all one with another score, for
    then it answers at least one row otherwise. None: no merge moved any."""
    *earlier, now = scores["matrix"]
    found = [
        (cell["score"] != current["score"], version, task["title"])
        for version, row in zip(scores["versions"], earlier, strict=False)
        for task, cell, current in zip(scores["tasks"], row, now, strict=True)
        if cell["score"] is not None and current["score"] is not None and current["measured_at"] > version
    ]
    if not found:
        return None
    _, version, title = max(found)
    return title, version


def most_changed(title: str, then: int, now: int) -> int:
    """Number of the evaluation row that two versions answer most differently: with another label, if there is any."""
    file = answer("task", title)["spec"]["data"]["eval_file"]
    one, other = (answer("predict", title, "--rows", file, "--version", str(v))["answers"] for v in (now, then))

    def change(row: int) -> tuple[bool, float]:
        label = one[row]["label"]
        difference = one[row]["probabilities"][label] - other[row]["probabilities"][label]
        return label != other[row]["label"], abs(difference)

    return max(range(len(one)), key=change)


def what_changed(before: str, after: str, back: int) -> str:
    """What a rollback changed of an answer, by what was shown."""
    if not after:
        return f"Version {back} does not hold this task: after the rollback nobody answers."
    if before == after:
        return f"Version {back} gives the same answer, to the digits that are shown."
    (was, sure, *_), (now, how_sure, *_) = before.split("  "), after.split("  ")
    if was == now:
        return f"The answer is {was} still, and by version {back} its probability is {how_sure} instead of {sure}."
    return f"The answer changed: {was} ({sure}) before, {now} ({how_sure}) by version {back}."


def predicted(asked: list[str]) -> str:
    """Ask a task with the command that a user types; returns its answer, nothing where it has none."""
    print(f"$ onebasis {shlex.join(['predict', *asked])}", flush=True)
    done = subprocess.run([ONEBASIS, "predict", *asked], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def question_for(title: str, row: int) -> list[str]:
    """A task, and one of its evaluation rows as a question to it."""
    data = answer("task", title)["spec"]["data"]
    with gzip.open(data["eval_file"], "rt") as file:
        asked = json.loads(list(file)[row])
    pair = data["text_pair_column"]
    return [title, "--text", asked[data["text_column"]], *(["--pair", asked[pair]] if pair else [])]


def settings() -> list[str]:
    """A service takes data from below the folder it was started in; started elsewhere, it is told of the examples."""
    if HERE.is_relative_to(Path.cwd().resolve()):
        return []
    file = STATE / "demo-settings.yaml"
    file.write_text((HERE.parent / "configs/local.yaml").read_text() + f"\ndata_roots: [{json.dumps(str(HERE))}]\n")
    return ["--config", str(file)]


def submit_later(start: float) -> None:
    """The tasks that arrive while others train. Their output would tear the live table, so it is not shown."""
    for seconds, name in ARRIVALS[2:]:
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        submit(name, quiet=True)


def submit(name: str, quiet: bool = False) -> None:
    """Submit one of the example tasks."""
    onebasis("submit", str(HERE / f"tasks/{name}.yaml"), quiet=quiet, show=f"submit examples/tasks/{name}.yaml")


def score_now(title: str) -> float:
    """What `onebasis scores` says of a task under main."""
    found = answer("scores")
    column = next(i for i, task in enumerate(found["tasks"]) if task["title"] == title)
    return float(found["matrix"][-1][column]["score"])


def answer(*command: str) -> list | dict:
    """The JSON answer of a command."""
    done = subprocess.run([ONEBASIS, *command, "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def onebasis(*arguments: str, check: bool = True, quiet: bool = False, show: str = "") -> None:
    """Type a command."""
    if not quiet:
        print(f"$ onebasis {show or shlex.join(arguments)}", flush=True)
    subprocess.run([ONEBASIS, *arguments], check=check, capture_output=quiet)


def tell(text: str) -> None:
    """A heading."""
    print(f"\n── {text}", flush=True)


if __name__ == "__main__":
    main()
