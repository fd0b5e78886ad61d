"""Whether a service can run here, and go on running: each thing that it needs, looked at by itself.

Works before the first `up`, while the service runs and when it is down. Nothing of a service is changed: a database is
not migrated, a store gets scratch objects that are removed again. Whether a bucket keeps its promises is
subspace_store/doctor.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from configs import places
from configs.document import without_password
from configs.errors import InvalidInput, OnebasisError
from configs.settings import BaseModelSettings, Settings
from orchestrator.api.client import Client
from orchestrator.api.requests import Health
from orchestrator.ray_head import ADDRESS_FILE, TOKEN_FILE, ray_environment
from orchestrator.signs_of_life import Life, left_behind, life_of, ray_processes, ray_trouble, stopped, title_of
from orchestrator.tasks.database import look
from orchestrator.tasks.tables import HEAD
from subspace_store.commands.state_folder import SERVICE_FILE, SETTINGS_FILE, running_server, service_identity
from subspace_store.doctor import examine
from subspace_store.log.store_format import check_format
from subspace_store.log.version_log import other_owner
from subspace_store.storage.opening import open_storage
from subspace_store.storage.protocol import Clocked, Storage

if TYPE_CHECKING:
    from urllib.request import Request

GIGABYTE = 10**9
FREE_LITTLE = 10 * GIGABYTE
"""Free disk below which there is a warning: a merge of a 7B model's tasks writes about a gigabyte, checkpoints more."""
FREE_NONE = GIGABYTE
"""Free disk below which nothing should be started: Ray itself warns at 5 % and stops spilling objects."""
FILES_MIN = 1024
FILES_ENOUGH = 8192
"""Open files that one process may have. Ray raises the soft limit to the hard one; a raylet opens some for each worker,
and an HTTP connection is one."""
SKEW_SECONDS = 5.0
"""Difference of two clocks that is told: scheduled starts and pins are off by it."""
SKEW_SECONDS_MAX = 600.0
"""Difference that is refused: S3 servers take no request that is 15 minutes off."""
PROBE_SECONDS = 120.0
"""Longest wait for torch and Ray: a cold disk takes half a minute to import them."""
ANSWER_SECONDS = 5.0
TOLD_PACKAGES = ("torch", "ray", "transformers", "peft", "deepspeed", "mlflow")
"""Packages whose versions are told even if all is well."""


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One check."""

    about: str
    verdict: Verdict
    what: str
    """The observation, with its numbers."""
    todo: str = ""
    """Next step; empty where nothing is to be done."""


Findings = Iterator[Finding]


def examine_service(settings: Settings, state_dir: Path) -> Findings:
    """Look at everything that a service with these settings needs, the quick things first.

    Yields:
        At least one finding for each check, without a password. A check that breaks is a finding itself, and the others
        go on.

    Cost:
        Some 100 small requests and 17 MiB to each store; a process that imports torch and Ray, 5 to 30 s.
    """
    for finding in _found(settings, state_dir.resolve()):  # processes are known by its full path
        yield replace(finding, what=without_password(finding.what))


def _found(settings: Settings, state_dir: Path) -> Findings:
    for about, check in _checks(settings, state_dir):
        try:
            yield from check()
        except OnebasisError as error:
            yield Finding(about, Verdict.FAILED, error.sentence, error.todo)
        except Exception as error:
            what = f"could not be examined: {type(error).__name__}: {error}"
            yield Finding(about, Verdict.FAILED, what, "mend what it says, then examine again")


def _checks(settings: Settings, state_dir: Path) -> list[tuple[str, Callable[[], Findings]]]:
    bases = [
        (f"storage of {base.name}", lambda base=base: examine_storage(settings, base, state_dir))
        for base in settings.bases
    ]
    return [
        ("versions", versions),
        ("open files", open_files),
        ("state folder", lambda: state_folder(state_dir)),
        ("disk", lambda: free_disk(settings, state_dir)),
        ("processes", lambda: processes(settings, state_dir)),
        ("ports", lambda: ports(settings, state_dir)),
        ("base model", lambda: base_models(settings)),
        ("database", lambda: database(settings)),
        ("MLflow", lambda: mlflow(settings)),
        *bases,
        ("Ray", lambda: ray_and_gpus(settings, state_dir)),
    ]


# --- this installation, this machine -----------------------------------------------------------------------------


def versions() -> Findings:
    """Python, onebasis and every package that it needs, against what it was tested with."""
    try:
        own, needs = metadata.version("onebasis"), metadata.requires("onebasis") or []
    except metadata.PackageNotFoundError:
        what = "onebasis is not installed as a package, so that nothing says which versions it needs"
        yield Finding("versions", Verdict.WARNING, what, "install it: pip install .")
        return
    wrong, found = [], {}
    for need in map(Requirement, needs):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found[need.name] = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(found[need.name], prereleases=True):
            wrong.append(f"{need.name} is {found[need.name]}, and has to be {need.specifier}")
    if wrong:
        todo = "install onebasis again, with the versions of its constraints.txt"
        yield Finding("versions", Verdict.FAILED, "; ".join(wrong), todo)
        return
    python = ".".join(map(str, sys.version_info[:3]))
    told = ", ".join(f"{name} {found[name]}" for name in TOLD_PACKAGES if name in found)
    what = f"onebasis {own}, Python {python}, {told}; {len(found)} packages are as they have to be"
    yield Finding("versions", Verdict.OK, what)


def open_files() -> Findings:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    many = "any number" if most == sys.maxsize else f"{most:,}"
    what = f"a process may open {many} of them ({soft:,} before it asks for more)"
    todo = "raise the hard limit: LimitNOFILE=65536 in a systemd unit, or /etc/security/limits.conf"
    if most < FILES_MIN:
        yield Finding("open files", Verdict.FAILED, what, todo)
    elif most < FILES_ENOUGH:
        yield Finding("open files", Verdict.WARNING, what, todo)
    else:
        yield Finding("open files", Verdict.OK, what)


def state_folder(state_dir: Path) -> Findings:
    """Whether the service's own folder can be written to, by its owner alone."""
    if not state_dir.exists():
        parent = _nearest(state_dir)
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding("state folder", Verdict.OK, f"{state_dir} will be made at the first `onebasis up`")
        else:
            todo = "let this user write there, or choose another state_dir"
            yield Finding("state folder", Verdict.FAILED, f"{parent} cannot be written to", todo)
        return
    if not os.access(state_dir, os.R_OK | os.W_OK | os.X_OK):
        todo = "run as the user who owns the folder"
        yield Finding("state folder", Verdict.FAILED, f"{state_dir} cannot be read and written by this user", todo)
        return
    about = state_dir.stat()
    if about.st_uid != os.getuid():
        what = f"{state_dir} belongs to the user {about.st_uid}, and this one is {os.getuid()}"
        yield Finding("state folder", Verdict.WARNING, what, "run the service as one user, always the same")
    elif about.st_mode & 0o077:
        todo = "`onebasis up` takes the right away; tokens that were there may have been read"
        yield Finding("state folder", Verdict.WARNING, f"others may look into {state_dir}", todo)
    else:
        yield Finding("state folder", Verdict.OK, f"{state_dir}, for its owner alone")


def free_disk(settings: Settings, state_dir: Path) -> Findings:
    """Room where the service, Ray, the caches of models and a store in a folder write."""
    kind, _, folder = settings.storage.url.partition(":")
    wanted = {
        "the state folder": state_dir,
        "temporary files, Ray's too": Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()),
        "the cache of models": Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"),
    } | ({"the store": Path(folder)} if kind == "file" else {})
    disks: dict[int, list[str]] = {}
    for words, path in wanted.items():
        disks.setdefault(_nearest(path).stat().st_dev, []).append(f"{words} ({path})")
    for there in disks.values():
        path = _nearest(Path(there[0].rpartition(" (")[2][:-1]))
        usage = shutil.disk_usage(path)
        what = f"{usage.free / GIGABYTE:.1f} of {usage.total / GIGABYTE:.0f} GB are free for {', '.join(there)}"
        todo = "make room, or move these folders to a larger disk"
        little = usage.free < FREE_LITTLE
        verdict = Verdict.FAILED if usage.free < FREE_NONE else Verdict.WARNING if little else Verdict.OK
        yield Finding("disk", verdict, what, "" if verdict is Verdict.OK else todo)


def processes(settings: Settings, state_dir: Path) -> Findings:
    """Whether the service runs, what it says of itself, and what is left of one that does not."""
    server = running_server(state_dir)
    if left := left_behind(state_dir):
        named = ", ".join(f"{title_of(process)} (pid {process.pid})" for process in left)
        yield Finding("processes", Verdict.WARNING, f"left of an earlier service: {named}", "`onebasis down` ends them")
    if still := stopped(ray_processes(state_dir)):
        named = ", ".join(f"{title_of(process)} (pid {process.pid})" for process in still)
        yield Finding("processes", Verdict.FAILED, f"stands still: {named}", "`onebasis up` replaces it")
    if server is None and (state_dir / ADDRESS_FILE).exists() and not ray_trouble(state_dir):
        what = "its Ray runs, and its control plane does not"
        yield Finding("service", Verdict.WARNING, what, "`onebasis up` starts it, `onebasis down` ends the rest")
        return
    if server is None:
        what = "it does not run" if (state_dir / SETTINGS_FILE).exists() else "none has run here"
        yield Finding("service", Verdict.OK, what)
        return
    if (life := life_of(server)) is not Life.RUNS:
        yield Finding("service", Verdict.FAILED, f"its control plane (pid {server}) {life}", "`onebasis up`")
        return
    if settings.ray.address == "local" and (trouble := ray_trouble(state_dir)):
        yield Finding("service", Verdict.FAILED, f"Ray does not work: {trouble}", "`onebasis up`")
    health = Client(state_dir, lambda _: None).ask(Health())
    for alarm in health["alarms"]:
        yield Finding("service", Verdict.WARNING, f"{alarm['code']}: {alarm['what']}", alarm["todo"])
    if not health["alarms"]:
        what = f"it runs (pid {server}), with {health['workers_ready']} workers ready and no alarm"
        yield Finding("service", Verdict.OK, what)


def ports(settings: Settings, state_dir: Path) -> Findings:
    """Whether what the service listens at is free, or its own."""
    asked = {"server.port": (settings.server.host, settings.server.port)}
    if settings.serving is not None:
        asked["serving.port"] = (settings.serving.host, settings.serving.port)
    runs = running_server(state_dir) is not None
    for name, (host, port) in asked.items():
        if not port:
            yield Finding("ports", Verdict.OK, f"{name} is 0: a free one is taken at {host}")
        elif runs:
            with contextlib.suppress(OSError), socket.create_connection((host, port), ANSWER_SECONDS):
                yield Finding("ports", Verdict.OK, f"{name}: something answers at {host}:{port}")
                continue
            todo = f"look into {state_dir / 'logs/control-plane.log'}"
            yield Finding("ports", Verdict.WARNING, f"{name}: nothing answers at {host}:{port}", todo)
        else:
            try:
                socket.create_server((host, port)).close()
                yield Finding("ports", Verdict.OK, f"{name}: {host}:{port} is free")
            except OSError as error:
                what = f"{name}: cannot listen on {host}:{port}: {error.strerror}"
                yield Finding("ports", Verdict.FAILED, what, f"set {name} to another one")


def base_models(settings: Settings) -> Findings:
    """Whether there are weights where the settings say; their digests are checked by the worker that loads them."""
    for base in settings.bases:
        about, source = f"base model {base.name}", base.source
        if source.startswith("package:"):
            package, _, inner = source.removeprefix("package:").partition("/")
            spec = importlib.util.find_spec(package)
            roots = (spec.submodule_search_locations or []) if spec else []
            there = any((Path(root) / inner / "config.json").exists() for root in roots)
        elif places.is_local(source):
            there = (Path(source) / "config.json").exists()
        else:
            cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub"
            there = any(cache.glob(f"models--{source.replace('/', '--')}/snapshots/*/config.json"))
            if not there:
                todo = "nothing, if this machine may download it; else name a folder"
                yield Finding(about, Verdict.WARNING, f"{source} is not in the cache {cache} yet", todo)
                continue
        if there:
            yield Finding(about, Verdict.OK, f"{source} is there")
        else:
            todo = "correct base_model.source, or put a model's files there"
            yield Finding(about, Verdict.FAILED, f"{source} has no config.json", todo)


# --- what it asks -------------------------------------------------------------------------------------------------


def database(settings: Settings) -> Findings:
    """Whether the task database answers, and whose tables it has."""
    seen = look(settings.database_url)
    took = f"it answers in {1000 * seen.round_trip_seconds:.1f} ms"
    if seen.revision is None:
        yield Finding("database", Verdict.OK, "it has no tables yet: the first `onebasis up` makes them")
    elif seen.is_newer:
        what = f"it has tables of revision {seen.revision}, and this release knows those up to {HEAD}"
        todo = "use the release that wrote them, or a newer one; or restore a backup that this release made"
        yield Finding("database", Verdict.FAILED, what, todo)
    elif seen.revision != HEAD:
        what = f"{took}; its tables are of revision {seen.revision}, and this release's of {HEAD}"
        yield Finding("database", Verdict.WARNING, what, "`onebasis upgrade` brings them up to date, and keeps a copy")
    else:
        yield Finding("database", Verdict.OK, f"{took}; its tables are of revision {HEAD}, as this release's")
    if seen.clock_skew_seconds is not None:
        yield _clock("the database", seen.clock_skew_seconds)


def _clock(whose: str, skew_seconds: float) -> Finding:
    ahead = "ahead of" if skew_seconds > 0 else "behind"
    what = f"that of {whose} is {abs(skew_seconds):.1f} s {ahead} this machine's"
    todo = "set the clocks: run chrony or systemd-timesyncd on both"
    off = abs(skew_seconds)
    verdict = Verdict.FAILED if off > SKEW_SECONDS_MAX else Verdict.WARNING if off > SKEW_SECONDS else Verdict.OK
    return Finding("clock", verdict, what, "" if verdict is Verdict.OK else todo)


def mlflow(settings: Settings) -> Findings:
    """Whether MLflow can be reached. Nothing waits for it, so that it never fails the service."""
    uri = settings.mlflow.tracking_uri
    todo = "start it, or correct mlflow.tracking_uri; tasks go on without it, and it is brought up to date later"
    if uri.startswith(("http://", "https://")):
        from urllib.error import URLError
        from urllib.request import urlopen

        try:
            with urlopen(_health_of(uri), timeout=ANSWER_SECONDS) as answer:
                yield Finding("MLflow", Verdict.OK, f"{uri} answers: {answer.read(40).decode(errors='replace')}")
        except (URLError, OSError) as error:
            yield Finding("MLflow", Verdict.WARNING, f"{uri} does not answer: {error}", todo)
    elif re.match(r"[a-z]+(\+\w+)?://", uri):
        try:
            seen = look(uri)
        except OnebasisError as error:
            yield Finding("MLflow", Verdict.WARNING, error.sentence, todo)
            return
        there = seen.round_trip_seconds > 0
        what = (
            f"its database answers in {1000 * seen.round_trip_seconds:.1f} ms" if there else "its database will be made"
        )
        yield Finding("MLflow", Verdict.OK, what)
    else:
        yield Finding("MLflow", Verdict.OK, f"{uri}: not examined")


def _health_of(uri: str) -> Request:
    """What asks an MLflow server how it is: a name and a password in its address are sent as MLflow sends them."""
    from urllib.parse import unquote, urlsplit
    from urllib.request import Request

    login, _, host = (place := urlsplit(uri)).netloc.rpartition("@")
    asked = Request(place._replace(netloc=host, path=f"{place.path.rstrip('/')}/health").geturl())
    if login:
        asked.add_header("Authorization", f"Basic {b64encode(unquote(login).encode()).decode()}")
    return asked


def examine_storage(settings: Settings, base: BaseModelSettings, state_dir: Path) -> Findings:
    """Whether a base model's store is in a place that keeps a store's promises, and is this service's."""
    about, storage = f"storage of {base.name}", open_storage(settings.storage, base.name)
    with _no_folder_left(storage):
        for check in examine(storage):
            verdict = Verdict.OK if check.ok else Verdict.FAILED
            yield Finding(about, verdict, f"{check.name}: {check.what}", check.todo)
        if isinstance(storage, Clocked):
            asked = time.time()
            theirs = storage.clock()
            yield _clock(storage.url, theirs - (asked + time.time()) / 2)
    check_format(storage, base.name, base.weights_sha256)
    if not (state_dir / SERVICE_FILE).exists():
        return  # it has no identity yet, and none is made here
    if (owner := other_owner(storage, service_identity(state_dir))) is not None:
        todo = "end that service; or take it over: `onebasis up --take-over`"
        yield Finding(about, Verdict.FAILED, f"it belongs to another service, {owner.name}", todo)


@contextlib.contextmanager
def _no_folder_left(storage: Storage) -> Iterator[None]:
    """A store in a folder is made by the first write: take away what trying it out made, if nothing was there."""
    folder = Path(getattr(storage, "folder", "") or ".").absolute()
    above = _nearest(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            while folder != above and folder.is_relative_to(above):
                folder.rmdir()
                folder = folder.parent


def ray_and_gpus(settings: Settings, state_dir: Path) -> Findings:
    """Whether the cluster can be joined, or one started here, and whether it has the GPUs that the pools ask for."""
    is_local, file = settings.ray.address == "local", state_dir / ADDRESS_FILE
    with contextlib.ExitStack() as undo:
        token = Path(settings.ray.auth_token_path or state_dir / TOKEN_FILE)
        if not is_local:
            address = settings.ray.address
            if not token.is_file():
                todo = "copy the token file of the cluster's head there (RAY_AUTH_TOKEN_PATH)"
                raise InvalidInput(f"{str(token)!r} is no file", "ray.auth_token_path", todo)
        elif file.exists() and not ray_trouble(state_dir):
            address = str(json.loads(file.read_text())["address"])
        else:
            address = ""
            token = Path(undo.enter_context(tempfile.TemporaryDirectory()), TOKEN_FILE)
        seen = _probed(address, token)
    if "error" in seen:
        what = f"cannot be {'joined' if address else 'started'}: {seen['error']}"
        todo = (
            f"start its head, and here `ray start --address={address} --num-cpus=0`; Python and Ray have to be of the "
            "same versions there and here"
        ) if address else (
            f"look into {state_dir / 'logs/ray.log'} and the newest folder below {tempfile.gettempdir()}/ray"
        )  # fmt: skip
        yield Finding("Ray", Verdict.FAILED, what, todo)
        return
    if address:
        cpus = seen["resources"].get("CPU", 0)
        what = f"Ray {seen['version']} at {address}: machines: {seen['nodes']}, CPUs: {cpus:.0f}"
        yield Finding("Ray", Verdict.OK, f"{what}, and of the version here")
    else:
        yield Finding("Ray", Verdict.OK, f"Ray {seen['version']} starts on this machine")
    yield from _gpus(settings, seen["torch_gpus"], seen["resources"].get("GPU", 0.0))


def _gpus(settings: Settings, torch_sees: list[str], ray_has: float) -> Findings:
    wanted = sum(pool.min * pool.ranks * pool.gpus for pool in settings.pools.values())
    what = f"Ray has {ray_has:.0f}, torch sees {len(torch_sees)} here"
    if torch_sees:
        what += f" ({', '.join(dict.fromkeys(torch_sees))})"
    if wanted > ray_has:
        todo = "lower gpus or min in the pools, or add machines; an autoscaler may do it"
        yield Finding("GPUs", Verdict.FAILED, f"{what}; the pools ask for {wanted:g} at least", todo)
    elif settings.ray.address == "local" and ray_has != len(torch_sees):
        todo = "install the torch that fits the GPU's driver, or correct CUDA_VISIBLE_DEVICES"
        yield Finding("GPUs", Verdict.WARNING, f"{what}: workers could not use all of them", todo)
    else:
        yield Finding("GPUs", Verdict.OK, f"{what}; the pools ask for {wanted:g} at least")


def _probed(address: str, token: Path) -> dict[str, Any]:
    """What machine_probe.py tells."""
    command = [sys.executable, "-m", "orchestrator.machine_probe", *([address] if address else [])]
    environment = os.environ | ray_environment(token)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS:.0f} s"}
    lines = done.stdout.splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = "".join(done.stderr.strip().splitlines()[-1:]) or "it said nothing"
        return {"error": f"the process that looks ended with {done.returncode}: {last}"}
    return found


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    found = path.absolute()
    while not found.exists():
        found = found.parent
    return found
