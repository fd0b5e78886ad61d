"""Answering as a Ray Serve application: started, changed and ended to be what the settings say."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from configs.errors import Conflict, OnebasisError, Unavailable
from configs.settings import ServingSettings, Settings
from orchestrator.api.exchange import ALIVE_PATH, NobodyListensError, NotTakenError, exchange
from subspace_store.digests import digest
from workers.serving.canary import summed

log = logging.getLogger("onebasis.serving")

AGAIN_SECONDS = 15.0
"""Wait until it is tried again to start what could not be started with the service."""
READY_SECONDS = 120.0
"""Longest wait for the replicas to have loaded their base models."""
ASK_SECONDS = 5.0
"""Longest wait for what replicas say of themselves."""

CHOOSE = "choose another port: `onebasis serve --port PORT`"
Listener = Literal["we", "somebody else", "nobody"]


class Deployment:
    """The application of one service. The process has joined Ray.

    Args:
        namespace: Ray's namespace of the service: its name tells this application from those of other services.
        token: The token of the state folder, which the control plane makes anew at each start.
        url: Address of the control plane, which knows whose the other tokens are.
    """

    def __init__(self, namespace: str, token: str, url: str) -> None:
        self._app, self._token, self._url = namespace, token, url
        self._changing = threading.Lock()
        self._trouble = ""
        """Why it could not be started when it was tried last."""

    def begin(self, settings: Callable[[], Settings], stop: threading.Event) -> None:
        """`follow` what the settings say by then, once it can be done: on a crowded machine Ray Serve may not start in
        time, and nobody else would try again."""
        while True:
            try:
                self.follow(settings())
                return
            except OnebasisError as error:
                log.error("%s", error.sentence)  # `status` shows it
            if stop.wait(AGAIN_SECONDS):
                return

    def follow(self, settings: Settings) -> None:
        """Have running what the settings say, and wait until it answers; nothing where they say nothing.

        Raises:
            Conflict: Ray Serve runs already, at another address, for somebody else.
            Unavailable: The replicas are not ready in time, or cannot be; what is wrong.
        """
        with self._changing:
            self._trouble = ""
            try:
                if settings.serving is None:
                    self._end()
                else:
                    self._start(settings, settings.serving)
            except OnebasisError as error:
                self._trouble = error.sentence
                raise

    def check(self, settings: Settings) -> None:
        """Raise what would keep it from answering there, as far as that is known before anything is changed.

        Raises:
            Conflict, Unavailable: As `follow`.
        """
        if settings.serving is None:
            return
        if others := [name for name in self._known() if name != self._app]:
            raise Conflict(
                f"Ray Serve answers for something else on this cluster: {', '.join(others)}",
                settings.ray.address,
                "end it with `serve shutdown`, or use another cluster",
            )
        if self._listener(settings.serving.url) == "somebody else":
            raise Unavailable("something else listens there", settings.serving.url, CHOOSE)

    def end(self) -> None:
        """End the application, if it runs."""
        with self._changing:
            self._end()

    def facts(self, settings: Settings) -> dict[str, Any]:
        """What answers now: address, and for each base model what its replicas say of themselves."""
        from ray import serve

        if settings.serving is None:
            return {}
        found: dict[str, Any] = {"url": settings.serving.url, "base_models": {}}
        if (status := self._known().get(self._app)) is None:
            return found | {"state": "down", "message": self._trouble or "it does not run"}
        for name in settings.base_names:
            try:
                handle = serve.get_deployment_handle(_named(name), self._app)
                found["base_models"][name] = handle.broadcast("facts").results(timeout_s=ASK_SECONDS)
                if (compared := summed(found["base_models"][name])) is not None:
                    found.setdefault("canary", {})[name] = compared
            except Exception as error:  # whatever Ray says: it is told, not needed
                found["base_models"][name] = []
                found["message"] = f"{name}: {type(error).__name__}: {error}"
        if status.message:
            found["message"] = status.message
        return found | {"state": str(status.status.value).lower()}

    def _start(self, settings: Settings, serving: ServingSettings) -> None:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.config import HTTPOptions

        self.check(settings)
        if self._known() and self._listener(serving.url) == "nobody":
            self._end()  # Ray Serve listens at another address, and takes no new one while it runs
        try:
            options = HTTPOptions(host=serving.host, port=serving.port)
            serve.start(http_options=options, proxy_location=serving.proxies)
        except (RuntimeError, OSError) as error:
            raise Unavailable(f"Ray Serve cannot listen there: {error}", serving.url, CHOOSE) from error
        except RayError as error:
            what = f"Ray Serve could not be started: {type(error).__name__}"
            raise Unavailable(what, serving.url, "it is tried again; `onebasis status` says how it goes on") from error
        failed: list[Exception] = []

        def run() -> None:
            try:
                serve.run(self._bound(settings, serving), name=self._app, route_prefix="/")
            except Exception as error:
                failed.append(error)

        waiting = threading.Thread(target=run, name="serve", daemon=True)
        waiting.start()
        waiting.join(READY_SECONDS)
        if failed or waiting.is_alive():
            status = self._known().get(self._app)
            said = status.message if status is not None and status.message else ""
            said = said or (str(failed[0]) if failed else f"its replicas are not ready after {READY_SECONDS:.0f} s")
            raise Unavailable(
                f"what answers could not be started: {said}", serving.url, "`onebasis status` says how it goes on"
            )
        if self._listener(serving.url) != "we":
            raise Unavailable("the replicas are ready, and what listens there is not this service", serving.url, CHOOSE)

    def _bound(self, settings: Settings, serving: ServingSettings) -> Any:
        from ray import serve

        from orchestrator.serving.answering import Answering
        from orchestrator.serving.door import Door
        from orchestrator.serving.lodge import Lodge, digest_of

        # On a local Ray the workers and the replicas share the machine whatever is reserved, and it was started with
        # CPUs for the workers alone.
        is_local = settings.ray.address == "local"
        reserved: dict[str, Any] = {"num_cpus": 0 if is_local else serving.cpus, "num_gpus": serving.gpus}
        replicas = {
            base.name: serve.deployment(Answering)
            .options(
                name=_named(base.name),
                version=_version(base, settings.storage, serving.cpus, serving.rows_max),
                _internal=True,
                ray_actor_options=reserved,
                max_ongoing_requests=serving.waiting_max,
                max_queued_requests=serving.waiting_max,
                autoscaling_config={
                    "min_replicas": serving.replicas_min,
                    "max_replicas": serving.replicas_max,
                    "target_ongoing_requests": serving.rows_max,
                },
                health_check_period_s=5,
                user_config={"canary": serving.canary.model_dump() if serving.canary is not None else None},
            )
            .bind(base, settings.storage, base.name, serving.cpus, serving.rows_max)
            for base in settings.bases
        }
        tls = settings.server.tls
        certificate = Path(tls.cert_file).read_text() if tls is not None else ""
        lodge = Lodge(self._url, certificate, settings.server.requests_per_second, digest_of(self._token))
        door = serve.deployment(Door).options(
            name="door",
            version=_version(settings.storage, lodge, *replicas),
            _internal=True,
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=serving.waiting_max,
            max_queued_requests=serving.waiting_max,
        )
        return door.bind(self._app, settings.storage, lodge, replicas)

    def _end(self) -> None:
        from ray import serve

        if self._app in self._known():
            serve.delete(self._app)  # waits until it is gone
            if not self._known():
                serve.shutdown()

    def _listener(self, url: str) -> Listener:
        """Who is at an address."""
        try:
            reply = exchange(f"{url}{ALIVE_PATH}", "GET", timeout_seconds=ASK_SECONDS)
            return "we" if json.loads(reply.content)["door"] == self._app else "somebody else"
        except NobodyListensError:
            return "nobody"
        except (NotTakenError, OnebasisError, ValueError, KeyError, TypeError):
            return "somebody else"

    def _known(self) -> Mapping[str, Any]:
        """Name of each application of Ray Serve on this cluster to its status."""
        from ray import serve
        from ray.serve.exceptions import RayServeException

        try:
            found: Mapping[str, Any] = serve.status().applications
            return found
        except RayServeException:  # nothing of Ray Serve runs
            return {}


def _version(*made_with: Any) -> str:
    """What a process was made with. Ray Serve leaves those alone that would be made with the same, so that a canary
    comes and goes without them; told no version, it makes them all anew, and its public API has no other way."""
    return digest(repr((metadata.version("onebasis"), *made_with)).encode())


def _named(base_model: str) -> str:
    return f"answers-{base_model}"
