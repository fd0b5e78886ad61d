"""The service from outside: over HTTP when it runs, in this process when it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from configs.errors import OnebasisError, error_from_dict
from orchestrator.api.routes import ROUTES
from subspace_store.commands.state_folder import SERVER_FILE

if TYPE_CHECKING:
    from orchestrator.api.exchange import Reply

TIMEOUT_SECONDS = 150.0
SUBMIT_TIMEOUT_SECONDS = 7200.0
"""A gigabyte of rows takes minutes to check."""


class Client:
    """Calls methods of the service by name; `call("task", reference="team/name")`."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._service: Any = None

    def call(self, method: str, **arguments: Any) -> Any:
        """Call one method.

        Raises:
            OnebasisError: What the service raised, as itself; Unavailable when it went away meanwhile.
        """
        server = server_facts(self._state_dir)
        if server is not None:
            from orchestrator.api.exchange import NobodyListensError

            try:
                return _over_http(server, method, arguments)
            except NobodyListensError:
                pass  # it was killed and left its address behind: read without it
        return getattr(self._local(), method)(**arguments)

    def _local(self) -> Any:
        if self._service is None:
            from orchestrator.api.service import Service
            from subspace_store.commands.state_folder import service_settings
            from subspace_store.storage.opening import open_storage

            settings = service_settings(self._state_dir)
            storage = open_storage(settings.storage, settings.base_model.name)
            self._service = Service(settings, None, storage)
        return self._service


def server_facts(state_dir: Path) -> dict[str, Any] | None:
    """Address, token and process id of the running control plane; None when none announced itself."""
    try:
        return dict(json.loads((state_dir / SERVER_FILE).read_text()))
    except (OSError, ValueError):
        return None


def _over_http(server: dict[str, Any], method: str, arguments: dict[str, Any]) -> Any:
    verb, path = ROUTES[method]
    in_path = set(re.findall(r"{(\w+)", path))
    # Dots too: `..` in a reference would be taken for a way to another route.
    url = re.sub(r"{(\w+)(?::path)?}", lambda found: quote(str(arguments[found.group(1)])).replace(".", "%2E"), path)
    rest = {name: value for name, value in arguments.items() if name not in in_path and value is not None}
    body = next((value for value in rest.values() if isinstance(value, dict)), None)
    query = {name: value for name, value in rest.items() if not isinstance(value, dict)}
    from orchestrator.api.exchange import exchange

    answer = exchange(
        server["url"] + url,
        verb,
        query=query,
        body=body,
        token=server["token"],
        timeout_seconds=SUBMIT_TIMEOUT_SECONDS if method == "submit" else TIMEOUT_SECONDS,
    )
    if answer.is_success:
        return answer.content if answer.content_type == "application/zip" else json.loads(answer.content)
    raise _error(answer, server["url"] + url)


def _error(answer: Reply, url: str) -> OnebasisError:
    try:
        facts = json.loads(answer.content)
    except ValueError:
        facts = {}
    if "what" in facts:
        return error_from_dict(facts)
    if isinstance(facts.get("detail"), list):  # FastAPI's own check of a path or query parameter
        problems = "; ".join(f"{'.'.join(map(str, p['loc'][1:]))}: {p['msg']}" for p in facts["detail"])
        return error_from_dict({"kind": "invalid-input", "what": problems})
    return OnebasisError(f"HTTP {answer.status} from the service", url, "see its log")
