"""A real service that answers: by its workers, and over HTTP by Ray Serve, while versions move and processes die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml

from configs.settings import BaseModelSettings, StorageSettings
from configs.task_spec import TaskSpec
from orchestrator.ray_head import TOKEN_FILE, ray_environment
from subspace_store import SubspaceReader, open_storage
from tests.acceptance.conftest import ROOT, Site
from tests.moto_server import free_port
from tests.workers.tiny_bases import save_llama
from workers.base_model import load_base_model
from workers.evaluation import adapted_model, generate
from workers.features import collator
from workers.rows.task_data import CompletionRow, TextRow
from workers.weights import weights_digest

TEXTS = ("The capital of France is Paris.", "The colour of grass is green.", "Paris", "green of grass")
TRAINING = {"learning_rate": 0.05, "max_steps": 6, "per_device_train_batch_size": 4}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
PATIENCE_SECONDS = 300
"""A crowded machine starts Ray Serve and loads a base model."""


class Served(Site):
    """A site whose tasks are published one after another: INTENTS, PROMPTS, CHATS."""

    port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return str(json.loads((self.folder / ".onebasis/server.json").read_text())["token"])

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={"Authorization": f"Bearer {self.token}"}, timeout=60)

    def predicted(self, task: str, *inputs: Any, **more: Any) -> Any:
        """What /v1/predict answers."""
        reply = self.post("/v1/predict", {"task": task, "inputs": list(inputs), **more})
        assert reply.status_code == 200, reply.text
        return reply.json()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=0, timeout=60)

    def reader(self) -> SubspaceReader:
        return SubspaceReader.open(open_storage(StorageSettings(url=f"file:{self.folder}/.onebasis/store"), "tiny"))

    def base(self) -> Any:
        source = str(self.folder / "tiny")
        digest = weights_digest(self.folder / "tiny")
        return load_base_model(BaseModelSettings(name="tiny", source=source, weights_sha256=digest))

    def spec(self, title: str) -> TaskSpec:
        return TaskSpec.model_validate(self.task(title)["spec"])

    def probabilities(self, title: str, version: int, texts: tuple[str, ...] = TEXTS) -> list[list[float]]:
        """Those of the task's exported adapter."""
        spec, store, base = self.spec(title), self.reader(), self.base()
        adapter = store.adapter(self.task(title)["task_id"], version)
        batch = collator(base, spec)([TextRow(text, None, 0) for text in texts])
        batch.pop("labels")
        with torch.inference_mode():
            found: list[list[float]] = adapted_model(base, adapter, spec).eval()(**batch).logits.softmax(-1).tolist()
        return found


INTENTS, PROMPTS, CHATS = "payments/intents", "talk/prompts", "talk/chats"


def write_tasks(folder: Path) -> None:
    rows = {
        "intents": [{"text": text, "label": n % 2} for n, text in enumerate(TEXTS * 6)],
        "prompts": [{"prompt": text[:9], "completion": text[9:]} for text in TEXTS[:2] * 8],
        "chats": [
            {"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}]}
            for text in TEXTS[:2] * 8
        ],
    }
    facts: dict[str, dict[str, Any]] = {
        "intents": {"kind": "sequence_classification", "data": {"label_names": ["cities", "colours"]}},
        "prompts": {"kind": "causal_lm", "data": {"max_new_tokens": 12}},
        "chats": {"kind": "causal_lm", "data": {"messages_column": "messages", "max_new_tokens": 12}},
    }
    for title, of_task in zip((INTENTS, PROMPTS, CHATS), facts, strict=True):
        file = f"{of_task}.jsonl"
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows[of_task]))
        data = {"train_file": file, "eval_file": file, "eval_is_train": True, "max_length": 32}
        document = {
            "team": title.partition("/")[0],
            "name": of_task,
            "base_model": "tiny",
            "training": TRAINING,
            "lora": LORA,
            "method": {"name": "lora"},
        } | facts[of_task] | {"data": data | facts[of_task]["data"]}  # fmt: skip
        (folder / f"{of_task}.yaml").write_text(yaml.safe_dump(document))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    site = Served(tmp_path_factory.mktemp("served"))
    (site.folder / "tiny").mkdir()
    save_llama(site.folder / "tiny", chat=True, initializer_range=0.6)
    digest = weights_digest(site.folder / "tiny")
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs/local.yaml").read_text()) | {
        "base_model": {"name": "tiny", "source": str(site.folder / "tiny"), "weights_sha256": digest},
        "teams": {"payments": {}, "talk": {}},
        "gate": {"drop_max": 100.0, "merge_gap_max": 100.0},
        "workers": {"count": 1, "cpus": 0.5},
        # Later merges take from earlier tasks, so that the versions answer differently.
        "subspace": {"rank_max": 3, "beyond_rank_max": "drop"},
    }
    (site.folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    write_tasks(site.folder)
    try:
        site.run("up", "--config", "settings.yaml")
        for name in ("intents", "prompts", "chats"):
            site.run("submit", f"{name}.yaml", "--wait")
        site.port = free_port()
        site.run("serve", "--port", str(site.port))
        yield site
    finally:
        site.run("down")


def test_a_worker_answers_as_the_exported_adapter(served: Served) -> None:
    texts = [part for text in TEXTS for part in ("--text", text)]
    for options, version in ((), 3), (("--version", "1"), 1):
        found = served.ask("predict", INTENTS, *texts, *options)
        assert (found["task"], found["version"]) == (INTENTS, version)
        expected = served.probabilities(INTENTS, version)
        for answer, row in zip(found["answers"], expected, strict=True):
            assert list(answer["probabilities"].values()) == pytest.approx(row, abs=1e-5)
    (first, *_), (now, *_) = served.probabilities(INTENTS, 1), served.probabilities(INTENTS, 3)
    assert first != pytest.approx(now, abs=1e-3)  # or a rollback could not be told from none
    rows = served.ask("predict", INTENTS, "--rows", "intents.jsonl")
    assert [answer["label"] for answer in rows["answers"][:4]] == [
        answer["label"] for answer in served.ask("predict", INTENTS, *texts)["answers"]
    ]
    said = served.run("predict", INTENTS, "--text", "", expect=2)
    assert "column 'text' is empty" in said


def test_what_is_asked_over_http_names_its_version(served: Served) -> None:
    for version in (1, 3):
        found = served.predicted(INTENTS, *TEXTS, version=version)
        assert found["version"] == version
        expected = served.probabilities(INTENTS, version)
        for answer, row in zip(found["answers"], expected, strict=True):
            assert list(answer["probabilities"].values()) == pytest.approx(row, abs=1e-5)
    reply = served.post("/v1/predict", {"task": INTENTS, "inputs": [TEXTS[0], {"txt": "a"}]})
    assert reply.headers["x-onebasis-version"] == "3"
    first, second = reply.json()["answers"]
    assert first["label"] in ("cities", "colours")
    assert "'txt', which the task does not read" in second["error"]["what"]
    refused = httpx.post(f"{served.url}/v1/predict", json={"task": INTENTS, "inputs": "a"})
    assert (refused.status_code, refused.json()["what"]) == (401, "missing or wrong token")
    for body, status in (({"task": "payments/none", "inputs": "a"}, 404), ({"task": INTENTS}, 422), ([], 422)):
        assert served.post("/v1/predict", body).status_code == status
    assert httpx.get(f"{served.url}/v2").status_code == 404


def test_openais_own_client(served: Served) -> None:
    client = served.client()
    assert sorted(model.id for model in client.models.list()) == sorted((INTENTS, PROMPTS, CHATS))
    assert client.models.retrieve(CHATS).owned_by == "talk"
    with pytest.raises(openai.NotFoundError, match="main holds no such task"):
        client.models.retrieve("talk/nothing")
    base, store = served.base(), served.reader()

    def alone(title: str, row: CompletionRow) -> str:
        spec = served.spec(title)
        model = adapted_model(base, store.adapter(served.task(title)["task_id"], 3), spec).eval()
        return generate(model, base, [row], spec)[0]

    asked = "The capit"
    whole = client.chat.completions.create(model=CHATS, messages=[{"role": "user", "content": asked}])
    chat = CompletionRow((("user", asked), ("assistant", "?")), True)
    assert whole.choices[0].message.content == alone(CHATS, chat)
    assert whole.system_fingerprint == "version 3"
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 12
    stream = client.chat.completions.create(
        model=CHATS,
        messages=[{"role": "user", "content": asked}],
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == alone(CHATS, chat)
    assert {piece.system_fingerprint for piece in pieces} == {"version 3"}
    assert pieces[-2].choices[0].finish_reason in ("stop", "length")
    assert pieces[-1].usage == whole.usage
    two = client.completions.create(model=PROMPTS, prompt=[asked, "green"], max_tokens=5)
    assert [choice.index for choice in two.choices] == [0, 1]
    expected = alone(PROMPTS, CompletionRow((("user", asked), ("assistant", "?")), False))
    assert expected.startswith(two.choices[0].text)
    with pytest.raises(openai.NotFoundError, match="main holds no such task"):
        client.completions.create(model="talk/none", prompt="a")
    with pytest.raises(openai.BadRequestError, match="has learnt from prompts and completions"):
        client.chat.completions.create(model=PROMPTS, messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="'n' is not supported"):
        client.completions.create(model=PROMPTS, prompt="a", n=2)
    with pytest.raises(openai.BadRequestError, match="has learnt from prompts and completions"):
        list(client.chat.completions.create(model=PROMPTS, messages=[{"role": "user", "content": "a"}], stream=True))
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_canary_answers_its_share_and_comes_and_goes_without_a_restart(served: Served) -> None:
    (before,) = served.status()["serving"]["base_models"]["tiny"]
    served.run("serve", "--canary", "1", "--share", "0.5")

    def compares() -> bool:
        return "tiny" in served.status()["serving"].get("canary", {})

    served.wait("the canary", compares)
    expected = {version: served.probabilities(INTENTS, version, TEXTS[:1])[0] for version in (1, 3)}
    versions: dict[str, set[int]] = {f"caller-{n}": set() for n in range(20)}
    with httpx.Client(headers={"Authorization": f"Bearer {served.token}"}, timeout=60) as client:
        for key in list(versions) * 2:
            body = {"task": INTENTS, "inputs": TEXTS[0]}
            reply = client.post(f"{served.url}/v1/predict", json=body, headers={"x-onebasis-key": key})
            found = reply.json()
            assert list(found["answers"][0]["probabilities"].values()) == pytest.approx(
                expected[found["version"]], abs=1e-5
            )
            versions[key].add(found["version"])
    assert all(len(of_caller) == 1 for of_caller in versions.values())
    mine = [key for key, of_caller in versions.items() if of_caller == {1}]
    assert 3 <= len(mine) <= 17
    chat = [{"role": "user", "content": "a"}]
    said = served.client().completions.create(model=PROMPTS, prompt="a", user=mine[0])
    assert said.system_fingerprint == "version 3"  # the canary's version does not hold it
    assert served.client().chat.completions.create(model=CHATS, messages=chat, user=mine[0]).system_fingerprint
    served.wait(
        "all of them compared",
        lambda: served.status()["serving"]["canary"]["tiny"]["tasks"][INTENTS]["rows"] == 2 * len(mine),
    )
    shown = served.run("status")
    assert "canary version 1 answered" in shown
    assert "no canary" not in shown
    told = served.ask("task", INTENTS)["served"]["replicas"]
    assert [(one["version"], one["revision"], one["trouble"]) for one in told] == [(3, 1, "")]
    assert served.run("serve", "--share", "2", expect=2).count("canary.share")
    served.run("serve", "--canary", "none")
    served.wait("no canary", lambda: not compares())
    (after,) = served.status()["serving"]["base_models"]["tiny"]
    assert after["pid"] == before["pid"]


def test_a_token_asks_its_own_teams_tasks(served: Served) -> None:
    made = served.ask("token", "create", "reader", "--role", "viewer", "--team", "payments")
    headers = {"Authorization": f"Bearer {made['token']}"}

    def ask(task: str) -> httpx.Response:
        body = {"task": task, "inputs": TEXTS[0]}
        return httpx.post(f"{served.url}/v1/predict", json=body, headers=headers, timeout=60)

    assert ask(INTENTS).status_code == 200
    others, nobodys = ask(PROMPTS), ask("talk/nothing")
    assert (others.status_code, nobodys.status_code) == (404, 404)
    assert others.text.replace("prompts", "nothing") == nobodys.text
    listed = httpx.get(f"{served.url}/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == [INTENTS]


def test_a_rollback_under_load_drops_and_mixes_nothing(served: Served) -> None:
    expected = {version: served.probabilities(INTENTS, version, TEXTS[:1])[0] for version in (1, 3)}
    stop, replies, wrong = threading.Event(), list[tuple[float, int]](), list[str]()

    def ask() -> None:
        with httpx.Client(headers={"Authorization": f"Bearer {served.token}"}, timeout=60) as client:
            while not stop.is_set():
                reply = client.post(f"{served.url}/v1/predict", json={"task": INTENTS, "inputs": TEXTS[0]})
                if reply.status_code != 200:
                    wrong.append(reply.text)
                    continue
                found = reply.json()
                said = list(found["answers"][0]["probabilities"].values())
                if said != pytest.approx(expected[found["version"]], abs=1e-5):
                    wrong.append(reply.text)
                replies.append((time.monotonic(), found["version"]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    served.wait("answers by version 3", lambda: any(version == 3 for _, version in replies))
    served.run("rollback", "1")
    moved = time.monotonic()
    served.wait("answers by version 1", lambda: any(at > moved and version == 1 for at, version in replies))
    assert served.post("/v1/predict", {"task": CHATS, "inputs": "a"}).status_code == 404
    served.run("rollback", "3")
    back = time.monotonic()
    served.wait("answers by version 3 again", lambda: any(at > back and version == 3 for at, version in replies))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert Counter(version for _, version in replies).keys() == {1, 3}


def test_killed_replicas_and_a_killed_control_plane(served: Served) -> None:
    (replica,) = served.status()["serving"]["base_models"]["tiny"]
    os.kill(replica["pid"], signal.SIGKILL)

    def answers() -> bool:
        reply = served.post("/v1/predict", {"task": INTENTS, "inputs": TEXTS[0]})
        assert reply.status_code in (200, 503), reply.text
        return reply.status_code == 200

    served.wait("another replica", answers, PATIENCE_SECONDS)
    token = served.token
    served.kill_control_plane()
    assert answers()
    headers = {"Authorization": f"Bearer {token}"}
    served.run("up")
    served.wait("the token of the new control plane", lambda: served.post("/v1/predict", {}).status_code == 422, 120)
    assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code in (200, 401)
    assert answers()


def test_nothing_answers_when_it_was_ended(served: Served) -> None:
    assert served.ask("serve", "--end")["serving"] is None
    assert served.status()["serving"] == {}
    with pytest.raises(httpx.ConnectError):
        served.post("/v1/predict", {"task": INTENTS, "inputs": "a"})
    said = served.run("serve", "--port", str(served.port))
    assert f"{served.url}/v1/predict" in said
    assert served.predicted(INTENTS, TEXTS[0])["version"] == 3


def test_it_moves_to_another_port_and_refuses_one_that_is_taken(served: Served) -> None:
    before, served.port = served.port, free_port()
    served.run("serve", "--port", str(served.port))
    assert served.predicted(INTENTS, TEXTS[0])["version"] == 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{before}/alive")
    with socket.create_server(("127.0.0.1", before)):
        said = served.run("serve", "--port", str(before), expect=5)
    assert f"http://127.0.0.1:{before}: something else listens there" in said
    assert served.predicted(INTENTS, TEXTS[0])["version"] == 3  # what answered before still does
    assert served.status()["serving"]["url"] == served.url  # and a refused address is not kept


def test_a_version_is_published_when_its_canary_has_answered_what_the_gate_asks_for(served: Served) -> None:
    served.run("serve", "--canary", "candidate", "--share", "1")
    settings = yaml.safe_load((served.folder / ".onebasis/settings.yaml").read_text())
    settings["gate"] |= {"canary_requests_min": 6, "canary_seconds_max": 900}
    (served.folder / "trial.yaml").write_text(yaml.safe_dump(settings))
    served.run("reload", "--config", "trial.yaml")
    refused = served.run("serve", "--canary", "none", expect=2)
    assert "gate.canary_requests_min is 6, and nothing answers them" in refused.replace("\n", " ")
    document = yaml.safe_load((served.folder / "intents.yaml").read_text())
    (served.folder / "more.yaml").write_text(yaml.safe_dump(document | {"name": "more"}))
    served.run("submit", "more.yaml")
    served.wait("its canary", lambda: (served.task("payments/more")["wait"] or {}).get("code") == "canary")
    assert "and its canary has answered 0 of 6 requests" in served.task("payments/more")["why"]
    served.wait("answers by the candidate", lambda: served.predicted(INTENTS, TEXTS[0])["version"] == 4)
    for _ in range(3):
        assert served.predicted(INTENTS, TEXTS[0])["version"] == 4
    served.wait("what was asked to be counted", lambda: "answered 4 of 6" in served.task("payments/more")["why"])
    served.wait("the task to say so", lambda: served.task(INTENTS)["served"]["canary"]["requests"] == 4)
    assert "canary version 4 answered 4 of 4 requests" in served.run("scores").replace("\n", " ")
    for _ in range(2):
        served.predicted(INTENTS, TEXTS[0])
    events = served.wait_for_state("payments/more", "published")["events"]
    assert "the canary answered 6 of 6 requests" in events[-1]["text"]


def environments(served: Served, names: list[str]) -> list[dict[str, str | None]]:
    """Variables of each replica's process, as Ray has it tell them."""
    script = f"""
import json, ray
ray.init(address="auto", namespace="serve", log_to_driver=False, configure_logging=False)
names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "#answers-tiny#" in one["name"]]
look = lambda _: {{name: __import__("os").environ.get(name) for name in {names!r}}}
print(json.dumps([ray.get(ray.get_actor(name).__ray_call__.remote(look)) for name in names]))
"""
    state = served.folder / ".onebasis"
    address = json.loads((state / "ray.json").read_text())["address"]
    joined = os.environ | ray_environment(state / TOKEN_FILE) | {"RAY_ADDRESS": address}
    done = subprocess.run([sys.executable, "-c", script], env=joined, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, str | None]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_two_replicas_have_their_threads_follow_main_and_do_without_each_other(served: Served) -> None:
    settings = yaml.safe_load((served.folder / ".onebasis/settings.yaml").read_text())
    settings["serving"] |= {"replicas_min": 2, "replicas_max": 2, "cpus": 2, "canary": None}
    settings["gate"] = {name: value for name, value in settings["gate"].items() if not name.startswith("canary_")}
    (served.folder / "two.yaml").write_text(yaml.safe_dump(settings))
    served.run("reload", "--config", "two.yaml")

    def replicas() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = served.status()["serving"]["base_models"]["tiny"]
        return found

    served.wait("two replicas", lambda: len(replicas()) == 2, PATIENCE_SECONDS)
    expected = {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    assert environments(served, list(expected)) == [expected] * 2
    for version in (1, 4):
        served.run("rollback", str(version))
        served.wait("both to follow", lambda version=version: [one["version"] for one in replicas()] == [version] * 2)
        assert f"by version {version}: 2 replicas" in served.run("task", INTENTS)
    stop, statuses = threading.Event(), list[int]()

    def ask() -> None:
        while not stop.is_set():
            # So many rows that whichever replica is killed has begun some.
            statuses.append(served.post("/v1/predict", {"task": INTENTS, "inputs": TEXTS * 128}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    served.wait("answers", lambda: len(statuses) > 20)
    os.kill(replicas()[0]["pid"], signal.SIGKILL)
    before = len(statuses)
    served.wait("answers by the other one", lambda: len(statuses) > before + 40, PATIENCE_SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    assert {*statuses} == {200}  # what the killed one had begun, the other one answered
