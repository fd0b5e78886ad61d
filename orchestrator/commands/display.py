"""What people see in a terminal: tables and messages made from the service's JSON values. Decides nothing."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.table import Table

from configs.errors import row_of
from orchestrator.scheduling.estimate import duration
from subspace_store.commands.terminal import TELL_SECONDS, console, counted, decimals, errors, note, shown

Json = dict[str, Any]

COLOURS = {
    "queued": "cyan", "training": "yellow", "merging": "yellow", "refining": "yellow",
    "evaluating": "yellow", "published": "green", "replaced": "dim",
    "rejected": "red", "parked": "red", "cancelled": "dim", "candidate": "yellow", "rolled back": "dim",
    "removed": "dim", "expired": "dim", "empty": "dim",
}  # fmt: skip
WHO_CAN = {
    "team": "its team can change that",
    "platform": "the people who run the service can change that",
    "nobody": "it ends by itself",
}
"""Sentence for those who can end what a task waits for, by `orchestrator.scheduling.reasons.Who`."""
AT_WORK = ("training", "refining")
ENDED = ("published", "replaced", "rejected", "parked", "cancelled")
DROPPED_FIRST = ("id", "MB", "rows/s", "version", "starts in", "in main", "tokens/s", "own", "loss")
"""Columns of the task table, in the order in which a narrow terminal omits them: `team/name` is a name too."""
NOTE_WIDTH = 24
"""Least width of the last column, if its text is that long."""


def unknown_tasks(count: int, status: Json) -> str:
    """That `main` holds tasks that the task database does not know, and what one can do."""
    return (
        f"main (version {status['main']}) holds {counted(count, 'task')} that the task database does not know: it was "
        "lost, or is another one. They stay in main and can be exported, but are not scored any more: restore the "
        "database from a backup; `onebasis version` shows them"
    )


def status(answer: Json) -> None:
    """`onebasis status` and the end of `onebasis up`."""
    state = "[green]up[/green]" if answer["running"] else "[red]down[/red] (`onebasis up` starts it)"
    if not answer["running"] and answer.get("leadership"):
        state = "[yellow]down here[/yellow], and led by another control plane"
    alarms, counts = answer.get("alarms", ()), answer["tasks"]
    if alarms:
        state += f", [red]with {counted(len(alarms), 'alarm')}[/red]"
    in_states = ", ".join(f"{count} {name}" for name, count in (counts or {}).items()) or "none yet"
    bases: list[Json] = answer.get("base_models") or [answer]
    if len(bases) == 1:
        console.print(f"onebasis is {state}: base model {shown(bases[0]['base_model'])}, main is {_main(bases[0])}")
    else:
        console.print(f"onebasis is {state}: {counted(len(bases), 'base model')}")
    _print_alarms(alarms)
    _print_leadership(answer.get("leadership"))
    for base in bases:
        _print_hold(base["held"], f" --base-model {base['base_model']}" if len(bases) > 1 else "")
    _print_pauses(answer.get("paused"))
    if gone := answer.get("gone_from_main"):
        in_states += f" ({gone:,} of the published ones main no longer holds; the next `onebasis up` parks them)"
    console.print(f"  tasks    {in_states if counts is not None else 'unknown'}", soft_wrap=True)
    for team, codes in answer.get("waiting", {}).items():
        reasons = ", ".join(f"{count:,} {code}" for code, count in codes.items())
        console.print(f"  waiting  {shown(team)}: {reasons}", soft_wrap=True)
    for name, count in (answer.get("left_base_models") or {}).items():
        console.print(
            f"  [yellow]warning[/yellow]  {shown(name)} is no longer among the base models: {counted(count, 'task')} of"
            " it stay as they are, and none goes on until it is back",
            soft_wrap=True,
        )
    for late in answer.get("late", ()):
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(late["at"]))
        what = "was missed" if late["outlook"] == "missed" else late["outlook"]
        console.print(f"  [yellow]warning[/yellow]  {shown(late['title'])}: its deadline {at} {what}", soft_wrap=True)
    for base in bases:
        if len(bases) > 1:
            console.print(f"  {shown(base['base_model'])}: main is {_main(base)}", soft_wrap=True)
        if unknown := base.get("not_in_database"):
            console.print(f"  [yellow]{unknown_tasks(unknown, base)}[/yellow]", soft_wrap=True)
        console.print(f"  store    {shown(base['storage'])}", soft_wrap=True)
        if (footprint := base.get("footprint")) and footprint["tasks"]:
            numbers = sum(footprint[f"{part}_numbers"] for part in ("basis", "coefficient", "private"))
            console.print(
                f"  stored   {size_text(4 * numbers)} for {counted(footprint['tasks'], 'task')}; as separate LoRAs "
                f"{size_text(4 * footprint['separate_numbers'])} (`onebasis capacity`)",
                soft_wrap=True,
            )
    console.print(f"  mlflow   {shown(answer['mlflow'])}", soft_wrap=True)
    if serving := answer.get("serving"):
        console.print(f"  answers  {_serving(serving)}", soft_wrap=True)
    for worker, what in answer.get("workers", {}).items():
        console.print(f"  {shown(worker)} {shown(what)}", soft_wrap=True)
    for name, pool in answer.get("pools", {}).items():
        console.print(f"  pool     {shown(name)}: {_pool(pool)}", soft_wrap=True)
    _print_drains(answer.get("drains", ()))
    if left := answer.get("left_running"):
        console.print(
            f"  [yellow]still running[/yellow]: {shown(', '.join(left))} (`onebasis down` ends them, `onebasis up` goes"
            " on with them)",
            soft_wrap=True,
        )
    for doubt in answer.get("in_doubt", ()):
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(doubt["at"]))
        what, key = f"{doubt['operation']} by {doubt['actor']} since {since}", shown(doubt["op_key"])
        console.print(
            f"  [yellow]IN DOUBT[/yellow] {shown(what)}: nobody knows whether it was done. Ask again with "
            f"--op-key {key}, or `onebasis store withdraw {key}"
            f"{' --base-model ' + doubt['base_model'] if doubt.get('base_model') else ''}`",
            soft_wrap=True,
        )
        _print_rows("outcome-unknown")


def _serving(serving: Json) -> str:
    """What answers over HTTP, in a line."""
    parts = [f"{shown(serving['url'])}: {serving['state']}"]
    for name, replicas in serving["base_models"].items():
        versions = ", ".join(f"version {replica['version']}" for replica in replicas) or "none ready"
        parts.append(f"{shown(name)} by {counted(len(replicas), 'replica')} ({versions})")
        parts += [f"[yellow]{shown(replica['trouble'])}[/yellow]" for replica in replicas if replica["trouble"]]
        troubles = dict.fromkeys(replica["canary_trouble"] for replica in replicas if replica.get("canary_trouble"))
        parts += [f"[yellow]no canary: {shown(trouble)}[/yellow]" for trouble in troubles]
    parts += [f"{shown(name)}: {canary(said)}" for name, said in (serving.get("canary") or {}).items()]
    return "; ".join([*parts, *([shown(serving["message"])] if serving.get("message") else [])])


def canary(said: Json) -> str:
    """How another version answered its share of the requests, beside main's."""
    sides = (("main", said["main"]), ("canary", said["canary"]))
    times = " against ".join(
        "–" if side["p50_seconds"] is None else f"{1000 * side['p50_seconds']:.0f} ms" for _, side in reversed(sides)
    )
    rows = sum(task["rows"] for task in said["tasks"].values())
    agreed = sum(task["agreed"] for task in said["tasks"].values())
    asked = said["canary"]["requests"]
    of_all = counted(asked + said["main"]["requests"], "request")
    text = f"canary version {said['version']} answered {asked} of {of_all}, {times} (median)"
    text += f"; it agreed with version {said['main_version']} on {agreed} of {counted(rows, 'row')}"
    worst = sorted(said["tasks"].items(), key=lambda item: item[1]["agreed"] / max(1, item[1]["rows"]))
    if rows > agreed:
        text += ", least in " + ", ".join(f"{shown(t)} ({n['agreed']} of {n['rows']})" for t, n in worst[:3])
    return text + (f"; could not answer {said['failed']}" if said["failed"] else "")


def _served(served: Json) -> str:
    """What callers get who ask for a task over HTTP: each revision by how many replicas, and why some are behind."""
    by: dict[str, list[Json]] = {}
    for replica in served["replicas"]:
        revision = replica["revision"]
        says = "not held" if replica["task_id"] is None else "revision " + ("?" if revision is None else str(revision))
        by.setdefault(f"{says} by version {replica['version']}", []).append(replica)
    parts = [f"{what}: {counted(len(replicas), 'replica')}" for what, replicas in by.items()]
    parts += [
        f"[yellow]replica {replica['pid']} keeps version {replica['version']}: {shown(replica['trouble'])}[/yellow]"
        for replica in served["replicas"]
        if replica["trouble"]
    ]
    if not served["replicas"]:
        parts = [shown(served["message"] or f"by nobody: what answers is {served['state']}")]
    return "; ".join(parts)


def serving(answer: Json) -> None:
    """`onebasis serve`."""
    if (url := answer["serving"]) is None:
        note("nothing answers over HTTP any more")
        return
    console.print(f"{shown(url)}/v1/predict, /v1/models, /v1/chat/completions, /v1/completions", soft_wrap=True)
    note(
        "callers send a token (`onebasis token create`); `onebasis status` shows the replicas, `serve --end` ends them"
    )


def _main(base: Json) -> str:
    return "unknown" if base["main"] is None else f"version {base['main']}"


def _print_hold(held: Json | None, option: str) -> None:
    """That `main` is held. option: What `release` needs to know which `main` is meant."""
    if held is None:
        return
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(held["time"]))
    reason = shown(held["reason"] or "no reason given")
    console.print(
        f"  [yellow]main is held[/yellow] by {shown(held['actor'])} since {since}: {reason}"
        f" (`onebasis store release{option}` lets it move)",
        soft_wrap=True,
    )
    _print_rows("held")


def reloaded(answer: Json) -> None:
    """What `onebasis reload` took."""
    taken = ", ".join(map(shown, answer["taken"])) or "nothing: these are the settings that it runs with"
    note(f"taken: {taken}")


def _pool(pool: Json) -> str:
    """A pool in one line: its workers by what they do, and how many there may be."""
    counts = [f"{pool[state]} {state}" for state in ("busy", "warm", "starting", "drained") if pool[state]]
    ranks = f", {pool['ranks']} ranks each" if pool["ranks"] > 1 else ""
    size = str(pool["min"]) if pool["min"] == pool["max"] else f"{pool['min']} to {pool['max']}"
    return f"{', '.join(counts) or 'no worker'} (of {size}{ranks})"


def _print_drains(drains: Sequence[Json]) -> None:
    for drain in drains:
        what = f"machine {drain['what']}" if drain["is_node"] else drain["what"]
        option = "--node " if drain["is_node"] else ""
        console.print(
            f"  [yellow]{shown(what)} is drained[/yellow] by {shown(drain['by'])} for "
            f"{duration(time.time() - drain['at'])}: {shown(drain['reason'] or 'no reason given')} "
            f"(`onebasis drain --undo {option}{shown(drain['what'])}` takes it back)",
            soft_wrap=True,
        )


def workers(answer: Json) -> None:
    """`onebasis workers`."""
    if not answer["running"]:
        note("the service is not running; `onebasis up` starts it")
        return
    if "pools" not in answer:
        note("this control plane stands by, and the one that leads knows what the workers do: ask there")
        _print_leadership(answer.get("leadership"))
        return
    for name, pool in answer["pools"].items():
        base = f", base model {pool['base_model']}" if pool["base_model"] else ""
        console.print(f"[bold]{shown(name)}[/bold]  {_pool(pool)}{shown(base)}", soft_wrap=True)
        for worker, one in pool["workers"].items():
            where = f"  on {', '.join(one['machines'])}" if one["machines"] else ""
            console.print(f"  {shown(worker)}  {shown(one['does'])}{shown(where)}", soft_wrap=True)
    _print_drains(answer["drains"])


def drained(answer: Json) -> None:
    """`onebasis drain`."""
    what = f"machine {answer['what']}" if answer["is_node"] else answer["what"]
    if (drain := answer["drain"]) is None:
        note(f"{what}: {'tasks are given there again' if answer['is_new'] else 'was not drained'}")
        return
    if answer.get("given_back"):
        note(f"{what}: all its places are given back")
        return
    does = "ends first" if drain["lets_end"] else "writes a checkpoint and waits in the queue again"
    note(f"{what}: gets nothing new; what trains there {does}, then its place is given back")
    for worker, text in answer["workers"].items():
        note(f"  {worker}: {text}")


def _print_leadership(leadership: Json | None) -> None:
    """Which control plane leads, and which stand by; nothing where there can be one alone."""
    if leadership is None:
        return
    if (leader := leadership["leader"]) is None:
        console.print("  [yellow]no control plane leads[/yellow]: the next one does within ten seconds", soft_wrap=True)
    else:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(leader["since"]))
        here = " (this one)" if leadership["role"] == "leads" else ""
        console.print(
            f"  leads    {shown(leader['name'])}{here} since {since} ({shown(leader['url'])})", soft_wrap=True
        )
    for member in leadership["standing_by"]:
        console.print(f"  stands by  {shown(member['name'])} ({shown(member['url'])})", soft_wrap=True)


def _print_pauses(paused: Json | None) -> None:
    """What is paused: the service, teams. None: not known."""
    found = [("the service", "--service", paused["service"])] if paused else []
    found += [(f"team {team}", f"--team {team}", pause) for team, pause in (paused or {}).get("teams", {}).items()]
    for what, option, pause in found:
        if pause is not None:
            console.print(
                f"  [yellow]{shown(what)} is paused[/yellow] by {shown(pause['by'])} for "
                f"{duration(time.time() - pause['at'])}: {shown(pause['reason'] or 'no reason given')} "
                f"(`onebasis resume {shown(option)}` lets it go on)",
                soft_wrap=True,
            )


def _print_alarms(alarms: Sequence[Json]) -> None:
    for alarm in alarms:
        since = duration(time.time() - alarm["since"])
        console.print(f"  [red]ALARM[/red] {shown(alarm['text'])}, for {since}", soft_wrap=True)


Sending = Callable[[int, int], contextlib.AbstractContextManager[Callable[[int], None]]]
"""What shows that files are sent: is given their number and bytes, and makes a context, in which it is told of bytes
that have come."""


@contextlib.contextmanager
def sending(files: int, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show on stderr how far files are sent, and how fast: a bar in a terminal, else a line now and then."""
    if not files:
        yield lambda more: None
        return
    started = told_at = time.monotonic()
    come = 0
    what = f"{counted(files, 'file')}, {size_bytes / 1e6:,.1f} MB"

    def rate() -> str:
        seconds = max(time.monotonic() - started, 1e-3)
        return f"{come / 1e6 / seconds:,.1f} MB/s"

    if errors.is_terminal:
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress("sending", *columns, console=errors, transient=True) as bar:
            line = bar.add_task("", total=size_bytes)

            def draw(more: int) -> None:
                nonlocal come
                come += more
                bar.update(line, completed=come)

            yield draw
    else:

        def say(more: int) -> None:
            nonlocal come, told_at
            come += more
            if time.monotonic() > told_at + TELL_SECONDS:
                told_at = time.monotonic()
                note(f"sending {what}: {come / 1e6:,.1f} MB, {rate()}")

        yield say
    note(f"sent {what}, {rate()}")


@contextlib.contextmanager
def silent_sending(files: int, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show nothing: with --json only JSON is printed."""
    yield lambda more: None


def submitted(answer: Json) -> None:
    """`onebasis submit`."""
    for warning in answer["warnings"]:
        errors.print(f"[yellow]warning:[/yellow] {shown(warning)}", soft_wrap=True)
    if said := _deadline(answer):
        errors.print(f"[yellow]warning:[/yellow] {shown(said)}", soft_wrap=True)
    if answer.get("dry_run"):
        known = "" if answer["is_new"] else " (known already)"
        console.print(
            f"{shown(answer['title'])} is fine{known}: {counted(answer['train_rows'], 'training row')},"
            f" {counted(answer['eval_rows'], 'evaluation row')}"
        )
        _print_outlook(answer)
        return
    known = "" if answer["is_new"] else " (known already: nothing was submitted twice)"
    console.print(f"{shown(answer['exact_title'])} is task {answer['task_id']}, {coloured(answer['state'])}{known}")


def _print_outlook(answer: Json) -> None:
    """What a task would meet that is not submitted yet."""
    if "why" not in answer:
        return
    console.print(f"  pool       {shown(answer['pool'])}", soft_wrap=True)
    console.print(f"  now        {shown(answer['why'])}", soft_wrap=True)
    if (end := answer["end"]) is not None:
        earliest, latest = duration(end["earliest"]), duration(end["latest"])
        console.print(f"  trained    between {earliest} and {latest} from now, in four of five cases")
    if (places := answer["cost_place_seconds"]) is not None:
        gpus = "" if answer["cost_gpu_seconds"] is None else f", {answer['cost_gpu_seconds']:,.0f} GPU-seconds"
        console.print(
            f"  cost       about {places:,.0f} place-seconds{gpus}: {duration(answer['length_seconds'])} long"
        )
    if answer["runs_too_long"]:
        errors.print(f"[yellow]warning:[/yellow] {shown(answer['runs_too_long'])}", soft_wrap=True)


def _deadline(row: Json) -> str:
    """What is to be said of a task's deadline; empty where it will be met."""
    told = row.get("deadline")
    if told is None or told["outlook"] in ("met", "unknown"):
        return ""
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(told["at"]))
    return f"deadline {at} {'was' if told['outlook'] == 'missed' else ''} {told['outlook']}".replace("  ", " ")


def submitted_file(result: Json) -> None:
    """One file of `onebasis submit` with several."""
    if (error := result.get("error")) is None:
        submitted(result)
        return
    where = "" if error["where"] == result["file"] else f"{result['file']}: "
    errors.print(f"[red]error:[/red] {shown(where)}{shown(error['text'])}", soft_wrap=True)
    errors.print(f"  see {row_of(error['code'])}", style="dim", markup=False, soft_wrap=True)


def tasks(answer: Sequence[Json]) -> None:
    """`onebasis tasks`."""
    if not answer:
        console.print("no tasks yet; `onebasis submit TASK.yaml`")
        return
    console.print(_task_table(answer))
    if any(row["local_score"] is not None for row in answer):
        console.print("own: score with the own adapter, before merging; in main: score in main now")
    if problem := next((row["main_score_problem"] for row in answer if row.get("main_score_problem")), ""):
        errors.print(f"[yellow]main's scores are not known:[/yellow] {shown(problem)}", soft_wrap=True)


def task(answer: Json) -> None:
    """`onebasis task`."""
    console.print(f"[bold]{shown(answer['exact_title'])}[/bold]  {answer['task_id']}  {coloured(answer['state'])}")
    console.print(f"  {shown(answer['why'])}", soft_wrap=True)
    if wait := answer.get("wait"):
        since = f"for {duration(time.time() - wait['since'])}; " if wait["since"] is not None else ""
        console.print(f"  {since}{WHO_CAN[wait['who']]}", style="dim", soft_wrap=True)
    _print_rows(*answer["trouble"], *([wait["code"]] if wait else []))
    _print_alarms(answer.get("alarms", ()))
    if answer["progress"]:
        console.print(f"  progress   {shown(_progress(answer))}")
    if answer["local_score"] is not None:
        own, base = score_text(answer["local_score"]), score_text(answer["base_score"])
        rows = counted(answer["eval_rows"], "row")
        console.print(f"  {answer['metric']:10} {own} own adapter · {base} same head without adapter · {rows}")
    if others := [f"{name} {decimals(value)}" for name, value in answer["metrics"].items() if name != answer["metric"]]:
        console.print(f"  also       {' · '.join(others)} own adapter", soft_wrap=True)
    if (result := answer["result"]) is not None:
        console.print(
            f"  in main    {score_text(result['score_under_main'])} now (version {result['main']}) · "
            f"{score_text(result['score_at_birth'])} at birth (version {result['version']})"
        )
    for part in answer["scores_of_rows"]:
        console.print(
            f"  rows of @{part['revision']:<2} {score_text(part['under_main'])} in main now · "
            f"{score_text(part['own'])} own adapter · {score_text(part['main_before'])} main before this revision · "
            f"{score_text(part['first'])} when they were new",
            soft_wrap=True,
        )
    if (served := answer.get("served")) is not None:
        console.print(f"  served     {_served(served)}", soft_wrap=True)
        if one := served.get("canary"):
            asked = f"version {one['version']} answered {counted(one['requests'], 'request')} of it"
            alike = f"it agreed with version {one['main_version']} on {one['agreed']} of {counted(one['rows'], 'row')}"
            console.print(f"  canary     {asked}; {alike}", soft_wrap=True)
    if said := _deadline(answer):
        console.print(f"  [yellow]warning[/yellow]    {shown(said)}", soft_wrap=True)
    for warning in answer["warnings"]:
        console.print(f"  [yellow]warning[/yellow]    {shown(warning)}", soft_wrap=True)
    _print_training(answer["training"])
    for one in answer["revisions"] if len(answer["revisions"]) > 1 else ():
        since = f"since version {one['version']}" if one["state"] == "published" else ""
        console.print(
            f"  revision {one['revision']:<3} {one['task_id']}  {coloured(one['state'])}  {since}".rstrip(),
            soft_wrap=True,
        )
    for event in answer["events"]:
        text = event["text"]
        for warning in answer["warnings"]:  # those are above
            text = text.replace(f"; {warning}", "").replace(f" · {warning}", "")
        console.print(f"  {_clock(event['at'])}  {event['kind']:16} {shown(text)}", soft_wrap=True)


PREEMPTED = {
    "waiting": "its ranks give up their places, and no step is lost",
    "loading": "it stops after its next step and writes a checkpoint",
    "scoring": "it is being scored, stops after this batch and writes no checkpoint; what was trained is kept, and it "
    "goes on with scoring",
    "saving": "it is trained and scored, its adapter is being stored, and it does not stop any more",
}
"""What becomes of a preempted task, by the phase that its worker reported last."""


def preempted(answer: Json) -> None:
    """`onebasis preempt`."""
    does = PREEMPTED.get(answer["progress"].get("phase", "loading"), "it stops after this step and writes a checkpoint")
    note(f"{answer['title']}: {answer['state']}" + (f": {does}" if answer["state"] in AT_WORK else ""))


def paused(answer: Json) -> None:
    """`onebasis pause`."""
    pause, what = answer["paused"], _paused_or_resumed(answer)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(pause["at"]))
    note(f"{what}: paused by {pause['by']} since {since}: {pause['reason'] or 'no reason given'}")


def resumed(answer: Json) -> None:
    """`onebasis resume`."""
    note(f"{_paused_or_resumed(answer)}: {'no longer paused' if answer['is_new'] else 'was not paused'}")


def _paused_or_resumed(answer: Json) -> str:
    return str(answer.get("title") or (f"team {answer['team']}" if answer["team"] else "the service"))


def changed(answer: Json) -> None:
    """`onebasis cancel`, `retry`, `pause` and `resume` of many tasks."""
    for title in answer["done"]:
        note(f"{title}: {answer['change']} asked for")
    for one in answer["unchanged"]:
        note(f"{one['title']}: {one['why']}")
    for one in answer["refused"]:
        errors.print(f"[yellow]not[/yellow] {shown(one['title'])}: {shown(one['error']['text'])}", soft_wrap=True)
    counts = {name: len(answer[name]) for name in ("done", "unchanged", "refused")}
    if not any(counts.values()):
        note("no such task")
        return
    words = {"done": f"{answer['change']} asked for", "unchanged": "nothing to do", "refused": "refused"}
    note(", ".join(f"{words[name]}: {count:,}" for name, count in counts.items() if count))


def simulation(answer: Json) -> None:
    """`onebasis simulate`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = ("team", "pool", "ranks", "tasks", "mean wait", "median", "nine of ten", "longest")
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in ("team", "pool") else "right")
    for row in answer["waits"]:
        waits = [duration(row[f"{name}_seconds"]) if row["tasks"] else "" for name in ("mean", "p50", "p90", "max")]
        table.add_row(shown(row["team"]), shown(row["pool"]), str(row["ranks"]), str(row["tasks"]), *waits)
    console.print(table)
    share = answer["start_in_stated_interval"]
    back = answer["give_back_seconds_max"]
    facts = (
        ("weeks", f"{answer['weeks']:.1f}"),
        ("utilisation", "–" if answer["utilisation"] is None else f"{answer['utilisation']:.2f}"),
        ("Jain index", "– (there was nothing to share)" if answer["jain"] is None else f"{answer['jain']:.3f}"),
        (
            "preemptions",
            f"{answer['preemptions']:,}" + ("" if back is None else f", given back within {duration(back)}"),
        ),
        ("in the interval", "–" if share is None else f"{share:.0%} of the starts that were estimated"),
        ("never started", f"{answer['never_started']:,}"),
        (
            "assumed",
            f"a worker loads for {duration(answer['load_seconds'])} (--load-seconds), a checkpoint takes "
            f"{duration(answer['checkpoint_seconds'])}"
            + (
                "; there is room for all pools (--cpus)"
                if answer["machines"] is None and len(answer["pools"]) > 1
                else ""
            ),
        ),
    )
    for name, text in facts:
        console.print(f"  {name:16} {text}")
    for pool in answer["pools"] if len(answer["pools"]) > 1 else ():
        mean = "–" if pool["workers_mean"] is None else f"{pool['workers_mean']:.1f}"
        used = "–" if pool["utilisation"] is None else f"{pool['utilisation']:.0%}"
        console.print(
            f"  pool {shown(pool['pool'])}: {mean} workers on average, {pool['workers_max']} at most, {used} used"
        )


def log_line(text: str) -> None:
    """A line of `onebasis logs` that is no event."""
    console.print(f"{_clock(time.time())}  {shown(text)}", soft_wrap=True)


def log_lines(events: Sequence[Json]) -> None:
    """`onebasis logs`."""
    for event in events:
        if event["kind"] == "progress":
            text = _point_of(event["text"])
        else:
            text = event["text"] if event["kind"] == "log" else f"{event['kind']}: {event['text']}"
        console.print(f"{_clock(event['at'])}  {shown(text)}", soft_wrap=True)


TOLD_WHILE_TRAINING = ("log", "progress")
"""Kinds of events that change nothing of where a task is."""


class Places:
    """Tells when a waiting task moves in the queue, so that no place jumps without a word."""

    def __init__(self) -> None:
        self._known: dict[str, int | None] = {}

    def moved(self, row: Json, only_back: bool = False) -> str:
        """A sentence if the task's place is another one than when it was last asked for; else empty.

        Args:
            only_back: Say nothing of a task that moves on, as each one does whenever another starts.
        """
        before, now = self._known.get(row["task_id"]), row["place"]
        self._known[row["task_id"]] = now
        if before is None or now is None or now == before or (only_back and now < before):
            return ""
        why = ": tasks of higher priority, or of teams that have used the workers less, go first"
        return f"place in the queue {before} → {now}{why if now > before else ''}"


def follow(ask: Callable[[], Sequence[Json]], pause: Callable[[], None]) -> None:
    """Show tasks until all have ended: a live table in a terminal, else one line for each thing that changes.

    Args:
        pause: Returns when it is time to ask again.
    """
    places = Places()
    if console.is_terminal:
        from rich.live import Live

        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while True:
                rows = ask()
                for row in rows:
                    if said := places.moved(row, only_back=True):
                        live.console.print(f"{_clock(time.time())}  {row['title']}: {said}", markup=False)
                live.update(_task_table(rows))
                if all(row["state"] in ENDED for row in rows):
                    return
                pause()
    seen: dict[str, str] = {}
    while True:
        rows = ask()
        for row in rows:
            now = f"{row['state']} {row['progress'].get('phase', '')} {10 * _share(row) // 1:.0f}"
            if seen.get(row["task_id"]) != now:
                seen[row["task_id"]] = now
                line = f"{_clock(time.time())}  {row['title']:23} {row['state']:10} {_brief(row)}"
                console.print(line.rstrip(), markup=False, soft_wrap=True)
            if said := places.moved(row, only_back=True):
                console.print(f"{_clock(time.time())}  {row['title']:23} {said}", markup=False, soft_wrap=True)
        if all(row["state"] in ENDED for row in rows):
            return
        pause()


def follow_quietly(ask: Callable[[], Sequence[Json]], pause: Callable[[], None]) -> None:
    """As `follow`, where stdout is for JSON: only that a task is overtaken in the queue is said, on stderr."""
    places = Places()
    while True:
        rows = ask()
        for row in rows:
            if said := places.moved(row, only_back=True):
                note(f"{row['title']}: {said}")
        if all(row["state"] in ENDED for row in rows):
            return
        pause()


def _task_table(rows: Sequence[Json]) -> Table:
    """The columns that fit into the terminal; only the last one may break its lines."""
    cells: dict[str, list[str]] = {
        "id": [row["task_id"] for row in rows],
        "task": [row["exact_title"] for row in rows],
        "base model": [row["base_model"] for row in rows] if len({row["base_model"] for row in rows}) > 1 else [],
        "state": [row["state"] for row in rows],
        "step": [_step(row) for row in rows],
        "loss": [_told(row, "loss", ".3f") for row in rows],
        "rows/s": [_told(row, "samples_per_second", ",.0f") for row in rows],
        "tokens/s": [_told(row, "tokens_per_second", ",.0f") for row in rows],
        "MB": [f"{row['progress']['memory_bytes'] / 1e6:,.0f}" if _told(row, "memory_bytes") else "" for row in rows],
        "left": [_left(row) for row in rows],
        "starts in": [_starts_in(row) for row in rows],
        "own": [score_text(row["local_score"]) for row in rows],
        "in main": [score_text(row.get("main_score")) for row in rows],
        "version": [f"v{row['version']}" if row["version"] else "–" for row in rows],
        "": [_note(row) for row in rows],
    }
    widths = {name: max(map(cell_len, (name, *column))) for name, column in cells.items() if any(column)}
    widths |= {"": min(widths[""], NOTE_WIDTH)} if "" in widths else {}
    for name in DROPPED_FIRST:
        if sum(widths.values()) + 2 * (len(widths) - 1) > console.width:
            widths.pop(name, None)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in widths:
        table.add_column(name, no_wrap=bool(name), justify="left" if name in ("id", "task", "state", "") else "right")
    for index in range(len(rows)):
        texts = {name: shown(cells[name][index]) for name in widths}
        table.add_row(*(coloured(text) if name == "state" else text for name, text in texts.items()))
    return table


def _step(row: Json) -> str:
    return f"{row['progress']['step']}/{row['progress']['steps']}" if _told(row, "steps") else ""


def _left(row: Json) -> str:
    return duration(row["progress"]["seconds_left"]) if _told(row, "seconds_left") else ""


def _starts_in(row: Json) -> str:
    seconds = row.get("starts_in_seconds")
    return "" if seconds is None else duration(seconds)


def _brief(row: Json) -> str:
    """A task's progress in the 32 columns behind its name and state."""
    loss, left = _told(row, "loss", ".3f"), _left(row)
    parts = (_step(row) or _note(row), loss and f"loss {loss}", left and f"{left} left")
    return " · ".join(part for part in parts if part) if row["state"] == "training" else ""


def _told(row: Json, name: str, form: str = "") -> str:
    """One figure of a task's progress; empty where it does not train, or has not reported it."""
    value = row["progress"].get(name) if row["state"] in AT_WORK else None
    return format(value, form) if value else ""


def _note(row: Json) -> str:
    """Where it stands in the queue, what it does beside its steps, or why it is where it is."""
    if row["state"] in AT_WORK:
        phase = row["progress"].get("phase", "")
        candidate = [row["progress"]["candidate"]] if row["progress"].get("candidate") else []
        return " · ".join([row["worker"], *candidate]) if phase in ("", "training") else str(phase)
    place = f"place {row['place']}" if row["place"] else ""
    wait = (row.get("wait") or {}).get("code", "") if row["state"] == "queued" else ""
    reason = row["reason"].split("\n")[0] if row["state"] in ("queued", "rejected", "parked", "cancelled") else ""
    gone = "main no longer holds it" if row.get("gone_from_main") else ""
    doubt = "warning: see `onebasis task`" if row.get("doubt") and row["state"] == "published" else ""
    return " · ".join(part for part in (place, wait, reason, _deadline(row), row.get("held", ""), gone, doubt) if part)


def _print_training(training: Json) -> None:
    if training["seconds"] is not None:
        start = training["submit_to_first_step_seconds"]
        resumed = f", resumed from step {training['resumed_from']}" if training["resumed_from"] else ""
        of = " of all trainings" if training["compared"] else ""
        console.print(
            f"  training   {counted(training['steps'], 'step')}{of} in {training['seconds']:.1f} s"
            + (f", first step {start:.2f} s after submission" if start is not None else "")
            + resumed
        )
    if training["method"]:
        basis = f" in the basis of version {training['basis_version']}" if training["basis_version"] else ""
        trained = training["trainable_parameters"]
        chosen = ""
        if training["asked_method"] == "auto":
            chosen = ", by auto"
            if (compared := training["compared"]) is not None:
                chosen += f", which compared {' and '.join(compared) or 'nothing'}"
        console.print(
            f"  method     {training['method']}{chosen}{basis}"
            + (f" · {counted(trained, 'number')} trained beside the head" if trained else "")
        )
    if training["refined_seconds"] is not None:
        console.print(f"  refined    its coefficients, after merging, in {training['refined_seconds']:.1f} s")
    if training["share_full"]:
        console.print("  share-full its rows are kept, to refine it again when a merge moves it: not strict")
    if training["unrefined"]:
        console.print(f"  unrefined  {shown(training['unrefined'])}", soft_wrap=True)
        _print_rows("unrefined")
    if (last := training["last_point"]) is not None:
        console.print(f"  last told  {_point(last)}", soft_wrap=True)
    if training["plot"]:
        console.print(f"  loss plot  {shown(training['plot'])}", soft_wrap=True)


def _progress(row: Json) -> str:
    progress = row.get("progress") or {}
    if row["state"] not in AT_WORK or not progress:
        return row["worker"] if row["state"] in AT_WORK else ""
    if not progress.get("steps"):
        return str(progress.get("phase", ""))
    return f"{progress['phase']} {_point(progress)}"


def _point_of(text: str) -> str:
    """A point of the curves that an event keeps, as text; unchanged where another release wrote it in another way."""
    try:
        return _point(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return text


def _point(told: Json) -> str:
    """Which training of several, step, loss, learning rate, speed, memory, end: those that were reported."""
    candidate = f"{told['candidate']}: " if told.get("candidate") else ""
    steps = f"/{told['steps']}" if told.get("steps") else ""
    forms = (
        ("loss", "loss {:z.4f}"), ("learning_rate", "learning rate {:.2e}"), ("samples_per_second", "{:,.1f} rows/s"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    )  # fmt: skip
    parts = [form.format(told[name]) for name, form in forms if told.get(name) is not None]
    memory = [size_text(told["memory_bytes"])] if told.get("memory_bytes") else []
    left = [f"{duration(told['seconds_left'])} left"] if told.get("seconds_left") is not None else []
    return " · ".join([f"{candidate}step {told['step']}{steps}", *parts, *memory, *left])


def _share(row: Json) -> float:
    progress = row.get("progress") or {}
    return progress["step"] / progress["steps"] if progress.get("steps") else 0.0


def _print_rows(*codes: str) -> None:
    """Say where to read what these codes mean and what to do."""
    if codes:
        console.print(f"  see {', '.join(map(row_of, codes))}", style="dim", markup=False, soft_wrap=True)


def coloured(state: str) -> str:
    colour = COLOURS.get(state)
    return f"[{colour}]{state}[/{colour}]" if colour else state


def score_text(value: float | None) -> str:
    return "–" if value is None else decimals(value)


def size_text(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> None:
    """A table of texts; without a row, a sentence."""
    if not rows:
        console.print(nothing)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(shown, row))
    console.print(table)
