"""The Helm chart: its generated files are those of its sources, its settings are the service's, its parts fit together.

No Helm is here: what it makes of the chart is kept as a file, with the digest of what it was made of. `make
check-deploy` makes it anew with a real Helm and compares, and has Kubernetes' own schemas check it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from configs.errors import InvalidInput
from configs.settings import Settings
from orchestrator.api.exchange import ALIVE_PATH
from tests.configs.deploy import chart
from tests.configs.deploy.files import END_SECONDS, RELEASE, manifest, manifests, pinned, settings_from
from tests.docs import command_lines

SCHEMA = json.loads(chart.SCHEMA.read_text())
SETTINGS: str = manifest("ConfigMap")["data"]["settings.yaml"]
CONTROL_PLANE: dict[str, Any] = manifest("Deployment")["spec"]["template"]["spec"]
RAY: dict[str, Any] = manifest("RayCluster")["spec"]
HEAD: dict[str, Any] = RAY["headGroupSpec"]["template"]["spec"]
WORKERS: list[dict[str, Any]] = [group["template"]["spec"] for group in RAY["workerGroupSpecs"]]
PODS = (CONTROL_PLANE, HEAD, *WORKERS)


def settings(tmp_path: Path) -> Settings:
    return settings_from(SETTINGS, tmp_path)


def test_the_generated_files_are_those_of_the_chart_as_it_is() -> None:
    todo = "the chart, its example or the settings have changed: make chart"
    assert chart.SCHEMA.read_text() == chart.schema_text(), todo
    assert chart.RENDERED.read_text().startswith(chart.head()), todo


def test_the_settings_in_the_config_map_are_read_by_the_service(tmp_path: Path) -> None:
    found = settings(tmp_path)
    assert found.production
    given = chart.example()["settings"]
    assert yaml.safe_load(SETTINGS) == {
        **given,
        "state_dir": found.state_dir,
        "ray": {"address": found.ray.address, "auth_token_path": found.ray.auth_token_path},
    }
    assert found.data_roots == ()


def test_a_misspelt_key_is_refused_by_the_service_and_by_helm_before(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="drop_mx"):
        settings_from(SETTINGS + "gate: {drop_mx: 0.1}\n", tmp_path)
    for change, said in (
        ({"settings": {"gate": {"drop_mx": 0.1}}}, "drop_mx"),
        ({"settings": {"ray": {"address": "elsewhere:6379"}}}, "'ray' was unexpected"),
        ({"settings": {"pools": {"small": {"max": "many"}}}}, "'many' is not of type 'integer'"),
        ({"ingres": {"enabled": True}}, "ingres"),
        ({"ray": {"autoscaling": "no"}}, "'no' is not of type 'boolean'"),
    ):
        with pytest.raises(jsonschema.ValidationError, match=said):
            jsonschema.validate(chart.merged(chart.example(), change), SCHEMA)


def test_the_example_has_what_the_chart_has_no_value_for() -> None:
    jsonschema.validate(chart.example(), SCHEMA)
    for name in ("teams", *chart.NEEDED_SETTINGS):
        without = chart.example()
        without["settings"] = {key: value for key, value in without["settings"].items() if key != name}
        with pytest.raises(jsonschema.ValidationError, match=f"'{name}' is a required property"):
            jsonschema.validate(without, SCHEMA)


def test_every_value_is_explained_and_used() -> None:
    templates = "".join(path.read_text() for path in sorted((chart.CHART / "templates").iterdir()))
    for name, value in chart.values().items():
        assert f".Values.{name}" in templates, name
        for inner in value if isinstance(value, dict) and name not in (*chart.FREE, "settings") else ():
            used = (f".Values.{name}.{inner}", f" .{inner}")
            assert any(one in templates for one in used), f"{name}.{inner}"


def test_the_control_plane_runs_what_the_program_has(tmp_path: Path) -> None:
    found, (own, log) = settings(tmp_path), CONTROL_PLANE["containers"]
    (text,) = own["args"]
    ((up, *options),) = command_lines.onebasis(text)
    assert (up, "--stay" in options) == ("up", True)
    config = options[options.index("--config") + 1]
    assert config in [mount["mountPath"] for mount in own["volumeMounts"]]
    (joined,) = map(command_lines.ray, command_lines.of_program("ray", text))
    assert (joined["address"], joined["num_cpus"], joined["num_gpus"]) == (found.ray.address, 0, 0)
    (port,) = own["ports"]
    assert port["containerPort"] == found.server.port
    assert found.server.host == "0.0.0.0"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = own[probe]["httpGet"]
        assert (asked["path"], asked["port"], asked["scheme"]) == (ALIVE_PATH, port["name"], "HTTP")
    assert CONTROL_PLANE["terminationGracePeriodSeconds"] >= END_SECONDS
    assert log["command"][-1] == f"{found.state_dir}/logs/control-plane.log"
    assert manifest("Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_the_cluster_is_the_one_that_the_settings_name(tmp_path: Path) -> None:
    found, name = settings(tmp_path), manifest("RayCluster")["metadata"]["name"]
    assert found.ray.address == f"{name}-head-svc:6379"  # as KubeRay names the head's service
    own = CONTROL_PLANE["containers"][0]
    secret = next(one for one in CONTROL_PLANE["volumes"] if one["name"] == "ray-token")["secret"]
    assert secret["secretName"] == name  # as KubeRay names the token's Secret, and its key:
    mount = next(one for one in own["volumeMounts"] if one["name"] == "ray-token")["mountPath"]
    assert found.ray.auth_token_path == f"{mount}/auth_token"
    assert RAY["authOptions"] == {"mode": "token"}
    assert {"name": "RAY_AUTH_TOKEN_PATH", "value": found.ray.auth_token_path} in own["env"]
    assert RAY["rayVersion"] == pinned("ray")
    for group in (RAY["headGroupSpec"], *RAY["workerGroupSpecs"]):
        options = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        command_lines.ray(["start", "--address=x:1", *options])
    assert {one["image"] for pod in PODS for one in pod["containers"]} == {own["image"]}  # one Python, one Ray


def test_no_field_of_kuberays_is_misspelt() -> None:
    # Kubernetes drops what KubeRay does not know without a word, and no registry of packages has KubeRay's schema.
    assert RAY.keys() == {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"
    }  # fmt: skip
    assert RAY["headGroupSpec"].keys() == {"rayStartParams", "template"}
    for group in RAY["workerGroupSpecs"]:
        numbers = {"replicas", "minReplicas", "maxReplicas"}
        assert group.keys() == {"groupName", "rayStartParams", "template"} | numbers
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert RAY["autoscalerOptions"].keys() == {"idleTimeoutSeconds"}


def test_ray_pods_have_room_for_a_worker_of_each_pool(tmp_path: Path) -> None:
    groups = [pod["containers"][0]["resources"]["limits"] for pod in WORKERS]
    for pool in settings(tmp_path).pools.values():
        assert any(pool.cpus <= float(limits["cpu"]) for limits in groups)
    least = sum(group["minReplicas"] for group in RAY["workerGroupSpecs"])
    assert manifest("PodDisruptionBudget")["spec"]["minAvailable"] < least


def names(part: Any, key: str) -> Iterator[Any]:
    """Values of a key, wherever it stands."""
    if isinstance(part, dict):
        yield from (value for name, value in part.items() if name == key)
    for one in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from names(one, key)


def test_every_name_leads_to_what_has_it() -> None:
    for pod in PODS:
        there = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == there
        assert pod["serviceAccountName"] == manifest("ServiceAccount")["metadata"]["name"]
    given = chart.example()
    secrets = {given["secrets"]["s3"], manifest("RayCluster")["metadata"]["name"], given["ingress"]["tlsSecret"]}
    assert {name for one in manifests() for name in names(one, "secretName")} == secrets
    assert {one["name"] for one in names(CONTROL_PLANE, "secretKeyRef")} == {given["secrets"]["postgres"]}
    assert {one["name"] for one in names(CONTROL_PLANE, "configMap")} == {manifest("ConfigMap")["metadata"]["name"]}
    claims = {one["claimName"] for one in names(CONTROL_PLANE, "persistentVolumeClaim")}
    assert claims == {manifest("PersistentVolumeClaim")["metadata"]["name"]}
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Deployment")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("Service")["spec"]["selector"].items() <= labels.items()
    (backend,) = names(manifest("Ingress"), "backend")
    assert backend["service"]["name"] == manifest("Service")["metadata"]["name"]
    ports = {port["name"] for port in CONTROL_PLANE["containers"][0]["ports"]}
    assert {port["targetPort"] for port in manifest("Service")["spec"]["ports"]} == ports


def test_no_container_may_more_than_it_has_to() -> None:
    for pod in PODS:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert "password" not in json.dumps([one for one in container.get("env", ()) if "valueFrom" not in one])


def test_the_chart_is_of_this_release() -> None:
    assert yaml.safe_load((chart.CHART / "Chart.yaml").read_text())["appVersion"] == RELEASE


def test_what_helm_adds_to_values_is_added_here_in_the_same_way() -> None:
    one = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert chart.merged(one, {"a": {"c": [2]}, "e": 3}) == {"a": {"b": 1, "c": [2]}, "d": 2, "e": 3}
