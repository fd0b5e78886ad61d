"""The Helm chart's generated files: `make chart` writes them, with the Helm that `make check-deploy` installs.

values.schema.json   from the schema of the settings, and from what values.yaml has
kubernetes/onebasis.yaml   the chart with the example's values, for those who use no Helm, and for tests that have none
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.settings import Settings
from configs.yaml_file import read_yaml
from tests.docs.pages import ROOT

DEPLOY = ROOT / "configs/deploy"
CHART = DEPLOY / "helm/onebasis"
VALUES, SCHEMA = CHART / "values.yaml", CHART / "values.schema.json"
EXAMPLE = DEPLOY / "helm/example.yaml"
RENDERED = DEPLOY / "kubernetes/onebasis.yaml"
NAME = "onebasis"
"""Name of the release, and of the namespace, in the rendered file."""

FREE = frozenset({"resources", "annotations", "labels", "nodeSelector", "tolerations", "env"}) | {
    "modelVolume",
    "volumes",
    "volumeMounts",
}
"""Values that are Kubernetes' own, at any depth: the chart hands them on as they are."""
OWN_SETTINGS = ("state_dir", "ray")
"""Settings that the chart writes itself."""
NEEDED_SETTINGS = ("server", "storage", "database_url", "mlflow")
"""Settings whose defaults are files and ports of one machine."""
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def values() -> dict[str, Any]:
    """The values of the chart."""
    found: dict[str, Any] = read_yaml(VALUES).values
    return found


def example() -> dict[str, Any]:
    """The values of the example, and the chart's where it has none."""
    return merged(values(), read_yaml(EXAMPLE).values)


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm adds values to values: mappings key by key, all else as a whole."""
    both = {key: merged(one[key], new) for key, new in other.items() if isinstance(new, dict) and one.get(key)}
    return {**one, **other, **both}


def schema() -> dict[str, Any]:
    """The schema of values: every key that values.yaml has and no other, each of the type that it has there; of the
    settings, what the settings themselves say, without what the chart writes and with what has no default in a pod."""
    settings = Settings.model_json_schema()
    definitions = settings.pop("$defs")
    for name in OWN_SETTINGS:
        del settings["properties"][name]
    settings["required"] = [*settings["required"], *NEEDED_SETTINGS]
    whole = _of(values())
    whole["properties"]["settings"] = settings
    return {"$defs": definitions, **whole}


def _of(value: Any, name: str = "") -> dict[str, Any]:
    """The schema of one value, by the value that is there."""
    made: dict[str, Any] = {"type": _TYPES[type(value)]}
    if name in FREE:
        return made
    if isinstance(value, dict):
        made["properties"] = {key: _of(one, key) for key, one in value.items()}
        made["additionalProperties"] = False
    elif isinstance(value, list) and value:
        made["items"] = {**_of(value[0]), "required": [key for key in value[0] if key not in FREE]}
    elif isinstance(value, list):
        made["items"] = {"type": "string"}
    return made


def sources() -> Iterator[Path]:
    """The files that the rendered one is made of."""
    yield EXAMPLE
    yield from (path for path in sorted(CHART.rglob("*")) if path.is_file() and path.name != "NOTES.txt")


def digest() -> str:
    """SHA-256 of all of them, with their names."""
    whole = hashlib.sha256()
    for path in sources():
        content = path.read_bytes()
        whole.update(f"{path.relative_to(DEPLOY).as_posix()} {len(content)}\n".encode() + content)
    return whole.hexdigest()


def rendered(given: Mapping[str, Any], release: str = NAME) -> str:
    """The chart with these values as Helm makes it, one document after another. Needs helm_python."""
    import helm_python

    with helm_python.Chart.load(str(CHART)) as chart:
        files: dict[str, str] = chart.render(dict(given), name=release, namespace=NAME)
    text = "\n---\n".join(files[name] for name in sorted(files) if name.endswith(".yaml"))
    written = [line.rstrip() for line in text.splitlines() if line.strip()]
    documents = [part.strip() for part in "\n".join(written).split("---\n")]
    return "\n---\n".join(part for part in documents if part) + "\n"


def head() -> str:
    """The first lines of the rendered file."""
    return (
        "# The chart in ../helm/onebasis with ../helm/example.yaml, for those who use no Helm. Made by: make chart\n"
        f"# from {digest()}\n"
        f"# kubectl create namespace {NAME}; kubectl apply --namespace {NAME} --filename onebasis.yaml\n"
        "# after a change of the image and of settings.yaml, as docs/deployment.md says.\n"
    )


def schema_text() -> str:
    """The schema as its file has it."""
    return json.dumps(schema(), indent=1, sort_keys=True) + "\n"


def write() -> None:
    """Write both anew."""
    SCHEMA.write_text(schema_text())
    RENDERED.write_text(head() + rendered(read_yaml(EXAMPLE).values))
    print(f"written: {SCHEMA.relative_to(ROOT)}, {RENDERED.relative_to(ROOT)}")
