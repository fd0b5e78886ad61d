"""The page of the deployment: its commands are those of the program, and what it names is in the files."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.configs.deploy import chart
from tests.configs.deploy.files import COMPOSE, RELEASE, compose, manifests
from tests.docs import command_lines
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/deployment.md"
TEXT = "\n".join(block.text for block in blocks(PAGE, "sh"))
LINES = [shlex.split(line, comments=True) for line in re.sub(r"\\\n\s*", " ", TEXT).splitlines()]


def test_every_command_of_onebasis_on_the_page_is_one_with_the_options_that_it_has() -> None:
    found = command_lines.onebasis(TEXT)
    prose = re.sub(r"^```.*?^```", "", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE).replace("\n", " ")
    whole = [words for words in re.findall(r"`([^`]+)`", prose) if " --" in words]
    found += command_lines.onebasis("\n".join(whole))
    named = {" ".join(arguments[:2]) if arguments[0] in ("token", "store") else arguments[0] for arguments in found}
    assert {"up", "status", "doctor", "login", "submit", "backup", "pause", "resume", "token create"} <= named
    with pytest.raises(Exception, match="No such option"):
        command_lines.onebasis("kubectl exec deploy/onebasis -- onebasis status --no-such-option")


def test_what_kubectl_is_asked_for_is_what_the_chart_makes() -> None:
    there = {f"{one['kind'].lower()}/{one['metadata']['name']}" for one in manifests()}
    there |= {name.replace("deployment/", "deploy/") for name in there}
    containers = {
        container["name"]
        for one in manifests()
        if one["kind"] == "Deployment"
        for container in one["spec"]["template"]["spec"]["containers"]
    }
    asked = [line for line in LINES if line[:1] == ["kubectl"]]
    assert len(asked) > 8
    for line in asked:
        named = [word for word in line[: line.index("--") if "--" in line else None] if "/" in word]
        named += ["/".join(line[line.index("delete") + 1 :][:2])] if "delete" in line else []
        assert set(named) <= there, line
        if "--container" in line:
            assert line[line.index("--container") + 1] in containers


def test_the_secrets_that_are_made_are_those_that_are_read() -> None:
    made = {
        line[line.index("generic") + 1]: line[-1].removeprefix("--from-file=").partition("=")[0]
        for line in LINES
        if "generic" in line
    }
    given = chart.example()
    postgres, s3, prometheus = (
        given["secrets"]["postgres"],
        given["secrets"]["s3"],
        given["serviceMonitor"]["tokenSecret"],
    )
    assert made == {postgres: "password", s3: "credentials", prometheus: "token"}
    templates = "".join(path.read_text() for path in (chart.CHART / "templates").iterdir())
    assert "name: {{ .Values.secrets.postgres }}, key: password}" in templates
    assert "value: /etc/onebasis/s3/credentials}" in templates
    assert "name: {{ .Values.serviceMonitor.tokenSecret }}, key: token}" in templates


def test_every_file_that_a_command_takes_is_there() -> None:
    for word in (word for line in LINES for word in line):
        if word.startswith(("configs/", "examples/")) and "secrets" not in word:
            assert (ROOT / word).exists(), word
    services = {line[line.index("exec") + 1] for line in LINES if line[:2] == ["docker", "compose"] and "exec" in line}
    assert services <= compose()["services"].keys()
    assert str(COMPOSE.relative_to(ROOT)) in TEXT
    assert set(re.findall(r"onebasis:(\d[\d.]*)", TEXT)) == {RELEASE}
