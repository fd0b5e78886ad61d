"""Settings files: those that ship are valid, relative paths start where they should."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from configs.document import without_password
from configs.errors import InvalidInput
from configs.settings import PoolSettings, Settings, read_settings
from tests.builders import SHA256

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
LEAST = {
    "base_model": {"name": "tiny", "source": "x", "weights_sha256": SHA256},
    "teams": {"red": {}},
}


def written(folder: Path, **values: object) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(LEAST | values))
    return path


def test_there_are_shipped_settings() -> None:
    assert {path.name for path in SHIPPED} >= {"local.yaml", "cluster.yaml"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_settings_are_valid(path: Path) -> None:
    assert read_settings(path).teams


def test_relative_paths_start_at_the_root_that_is_given(tmp_path: Path) -> None:
    got = read_settings(written(tmp_path, data_roots=["data", "/abs"]), root=tmp_path / "here")
    here = tmp_path / "here"
    assert got.state_dir == f"{here}/.onebasis"
    assert got.database_url == f"sqlite:///{here}/.onebasis/tasks.db"
    assert got.storage.url == f"file:{here}/.onebasis/store"
    assert got.mlflow.tracking_uri == f"sqlite:///{here}/.onebasis/mlflow.db"
    assert got.data_roots == (f"{here}/data", "/abs")


def test_a_base_models_folder_and_the_other_paths_are_found_from_anywhere(tmp_path: Path) -> None:
    # Workers and the control plane run in folders of their own.
    (tmp_path / "models/tiny").mkdir(parents=True)
    path = written(
        tmp_path,
        base_model=LEAST["base_model"] | {"source": "models/tiny"},
        ray={"address": "head:6379", "auth_token_path": "token"},
        mlflow={"artifact_location": "plots"},
    )
    got = read_settings(path, root=tmp_path)
    assert got.bases[0].source == f"{tmp_path}/models/tiny"
    assert got.ray.auth_token_path == f"{tmp_path}/token"
    assert got.mlflow.artifact_location == f"{tmp_path}/plots"


@pytest.mark.parametrize("source", ["package:some_package/model", "meta-llama/Llama-3.1-8B", "/models/tiny"])
def test_a_base_model_that_is_no_relative_folder_stays(tmp_path: Path, source: str) -> None:
    path = written(tmp_path, base_model=LEAST["base_model"] | {"source": source})
    assert read_settings(path, root=tmp_path).bases[0].source == source


def test_relative_paths_start_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_settings(path).state_dir == f"{tmp_path}/elsewhere/.onebasis"


def test_data_is_taken_from_the_folder_where_the_service_was_started_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert read_settings(written(tmp_path), root=tmp_path / "here").data_roots == (f"{tmp_path}/here",)
    assert read_settings(written(tmp_path, data_roots=["/"]), root=tmp_path / "here").data_roots == ("/",)


def test_absolute_paths_and_addresses_of_servers_stay(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        state_dir="/var/lib/x",
        database_url="postgresql+psycopg://u@h/d",
        storage={"url": "s3://bucket/prefix"},
        mlflow={"tracking_uri": "http://mlflow:5000"},
    )
    got = read_settings(path, root=tmp_path)
    assert (got.state_dir, got.database_url) == ("/var/lib/x", "postgresql+psycopg://u@h/d")
    assert (got.storage.url, got.mlflow.tracking_uri) == ("s3://bucket/prefix", "http://mlflow:5000")


def test_settings_read_again_from_what_was_written_are_the_same(tmp_path: Path) -> None:
    first = read_settings(written(tmp_path), root=tmp_path)
    path = tmp_path / "kept.yaml"
    path.write_text(yaml.safe_dump(first.model_dump(mode="json")))
    assert read_settings(path, root=Path("/somewhere/else")) == first


@pytest.mark.parametrize("team", ["../x", "Red", "", ".hidden", "a/b", "a b", "x" * 64])
def test_a_team_whose_name_is_unsafe_in_a_path_is_refused(tmp_path: Path, team: str) -> None:
    with pytest.raises(InvalidInput, match="teams"):
        read_settings(written(tmp_path, teams={team: {}}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("subspace", "energy_ratio_min", 1.01),
        ("workers", "count", 0),
        ("gate", "drop_max", -0.1),
        ("server", "port", 65536),
    ],
)
def test_a_value_out_of_range_is_named_by_its_path(tmp_path: Path, section: str, key: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=rf"{section}\.{key}: Input should be .* \(got {value}\)"):
        read_settings(written(tmp_path, **{section: {key: value}}))


def test_settings_cannot_be_changed() -> None:
    frozen = Settings.model_validate(LEAST)
    with pytest.raises(ValidationError, match="frozen"):
        frozen.state_dir = "/tmp"  # type: ignore[misc]


def test_defaults_are_those_of_the_design() -> None:
    got = Settings.model_validate(LEAST)
    assert (got.subspace.energy_ratio_min, got.subspace.rank_max, got.subspace.weighting) == (0.98, 64, "equal")
    assert (got.gate.drop_max, got.gate.merge_gap_max) == (0.03, 0.05)
    assert (got.server.host, got.server.port) == ("127.0.0.1", 0)


@pytest.mark.parametrize("sse", [{}, {"sse": "AES256"}])
def test_a_kms_key_without_kms_is_refused(tmp_path: Path, sse: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="storage: sse_kms_key_id needs sse: aws:kms"):
        read_settings(written(tmp_path, storage={"url": "s3://bucket", "sse_kms_key_id": "k", **sse}))
    kept = read_settings(written(tmp_path, storage={"url": "s3://b", "sse": "aws:kms", "sse_kms_key_id": "k"})).storage
    assert (kept.sse, kept.sse_kms_key_id) == ("aws:kms", "k")


def test_ranks_of_a_gang_do_not_share_a_gpu(tmp_path: Path) -> None:
    assert (
        read_settings(written(tmp_path, workers={"gpus": 0.5})).pools["default"].gpus == 0.5
    )  # two workers on one GPU
    assert read_settings(written(tmp_path, workers={"gpus": 1, "ranks": 4})).pools["default"].ranks == 4
    with pytest.raises(InvalidInput, match="cannot share a GPU"):
        read_settings(written(tmp_path, workers={"gpus": 0.5, "ranks": 4}))


SECRET = "postgresql+psycopg://onebasis:se/cr@t@db.internal/tasks"


@pytest.mark.parametrize(
    "text",
    [
        f"database_url: {SECRET}\n",  # what is missing is missing in the whole document
        f"database_url: [{SECRET}]\nteams: {{red: {{}}}}\n",
        f"mlflow: {{tracking_uri: 1, artifact_location: 2}}\ndatabase_url: {SECRET}\n",
        f"database_url: {SECRET} : wrong\n",
        f"database_url: {SECRET}\n  teams: [\n",
        f"{SECRET}: x\n",
    ],
)
def test_no_mistake_in_a_settings_file_shows_a_password(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read_settings(tmp_path / "settings.yaml")
    assert "se/cr" not in str(caught.value)
    assert "cr@t" not in str(caught.value)


def test_a_url_is_shown_without_its_password_and_otherwise_as_it_is() -> None:
    assert (
        without_password(f"cannot open {SECRET}.") == "cannot open postgresql+psycopg://onebasis:***@db.internal/tasks."
    )
    for plain in ("http://host:5000/a", "s3://bucket/prefix", "sqlite:////home/a.db", "u@host", "postgresql://u@h/d"):
        assert without_password(plain) == plain


@pytest.mark.parametrize("digest", ["", "weights_sha256: TODO"])
def test_without_a_digest_of_the_weights_the_message_is_the_line_to_write(digest: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"base_model:\n  name: tiny\n  source: folder\n  {digest}\nteams: {{red: {{}}}}\n")
    with pytest.raises(InvalidInput) as caught:
        read_settings(path)
    assert str(path) in str(caught.value)
    assert 'write `weights_sha256: "…"` below `base_model:`' in str(caught.value)
    assert "write 64 zeros: `onebasis up` then says which it is" in str(caught.value)


def test_a_section_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("teams: {red: {}}\n")
    with pytest.raises(InvalidInput, match="base_model is missing"):
        read_settings(tmp_path / "settings.yaml")


def test_a_quota_has_room_for_one_task_at_least(tmp_path: Path) -> None:
    read = read_settings(
        written(tmp_path, workers={"ranks": 4}, teams={"red": {"places": 4, "place_hours_a_week": 0.5}})
    )
    assert read.teams["red"].places == 4
    with pytest.raises(
        InvalidInput, match=r"teams.red.places is 3, and a task takes 4 \(the ranks of pool 'default'\)"
    ):
        read_settings(written(tmp_path, workers={"ranks": 4}, teams={"red": {"places": 3}}))


def test_a_quota_of_gpu_hours_is_refused_where_it_would_never_count(tmp_path: Path) -> None:
    teams = {"red": {"gpu_hours_a_week": 40}}
    read = read_settings(written(tmp_path, workers={"gpus": 0.5}, teams=teams))
    assert read.teams["red"].gpu_hours_a_week == 40.0
    with pytest.raises(InvalidInput, match=r"teams.red.gpu_hours_a_week is 40, and no pool has GPUs"):
        read_settings(written(tmp_path, teams=teams))


@pytest.mark.parametrize(
    ("serving", "gate", "said"),
    [
        (None, {"canary_requests_min": 50}, "nothing answers them: serving is not set"),
        ({}, {"canary_requests_min": 50}, "nothing answers them: serving.canary is not set"),
        (
            {"canary": {"version": 3}},
            {"canary_requests_min": 50},
            "canary.version is 3: it has to be candidate",
        ),
        ({"canary": {}}, {"canary_seconds_max": 60}, "canary_seconds_max has no meaning without"),
    ],
)
def test_a_canary_for_which_the_gate_would_wait_in_vain_is_refused(
    tmp_path: Path, serving: dict[str, Any] | None, gate: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_settings(written(tmp_path, serving=serving, gate=gate))
    read = read_settings(written(tmp_path, serving={"canary": {}}, gate={"canary_requests_min": 50}))
    assert (read.gate.canary_requests_min, read.gate.canary_seconds_max) == (50, 3600)


BASES = [{"name": name, "source": "x", "weights_sha256": SHA256} for name in ("tiny", "large")]


def several(tmp_path: Path, **changes: Any) -> Settings:
    """Settings with two base models."""
    whole = {key: value for key, value in LEAST.items() if key != "base_model"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(whole | {"base_models": BASES} | changes))
    return read_settings(tmp_path / "settings.yaml")


def test_base_model_is_short_for_a_list_of_one_and_several_have_workers_each(tmp_path: Path) -> None:
    one = read_settings(written(tmp_path))
    assert (one.base_names, one.base().name) == (("tiny",), "tiny")
    assert {name: pool.base_model for name, pool in one.pools.items()} == {"default": "tiny"}
    both = several(tmp_path, workers={"count": 3})
    assert both.base("large").name == "large"
    assert {name: (pool.base_model, pool.min, pool.max) for name, pool in both.pools.items()} == {
        "default": ("tiny", 3, 3),
        "large": ("large", 3, 3),
    }
    with pytest.raises(InvalidInput, match="has several base models"):
        both.base()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model": BASES[0]}, "base_model and base_models exclude each other"),
        ({"base_models": [BASES[0], BASES[0]]}, "several are called 'tiny'"),
        ({"base_models": [BASES[0], BASES[1] | {"name": "default"}]}, "only the first may be called 'default'"),
        ({"pools": {"a": {"max": 1}}}, "pools.a.base_model is missing: one of tiny, large"),
        ({"pools": {"a": {"max": 1, "base_model": "huge"}}}, "there is no base model 'huge'; there are: tiny, large"),
        ({"pools": {"a": {"max": 1, "base_model": "tiny"}}}, "none has workers for the base model 'large'"),
    ],
)
def test_what_does_not_say_which_base_model_is_meant_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidInput, match=re.escape(said)):
        several(tmp_path, **changes)


def test_workers_are_one_pool_of_a_fixed_size(tmp_path: Path) -> None:
    read = read_settings(written(tmp_path, workers={"count": 3, "cpus": 2, "lease_seconds": 7}))
    assert read.pools == {"default": PoolSettings(min=3, max=3, cpus=2, lease_seconds=7, base_model="tiny")}
    # As the state folder keeps them, with both keys, they are the same settings.
    assert Settings.model_validate(read.model_dump(mode="json")) == read
    assert read_settings(written(tmp_path)).pools == {"default": PoolSettings(min=2, max=2, base_model="tiny")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": {"count": 1}, "pools": {"small": {"max": 2}}}, "workers and pools exclude each other"),
        ({"pools": {"small": {"max": 2, "min": 3}}}, "pools.small: min is 3, and max 2: set min to 2 or less"),
        ({"pools": {"small": {}}}, "pools.small.max"),
        ({"pools": {"worker": {"max": 1}}}, "a pool cannot be called 'worker'"),
        ({"pools": {"small": {"max": 1, "rank": 2}}}, "unknown key 'pools.small.rank'"),
        ({"pools": {"wide": {"max": 1, "ranks": 2, "gpus": 0.5}}}, "cannot share a GPU"),
    ],
)
def test_pools_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_settings(written(tmp_path, **changes))


FIT = {
    "production": True,
    "server": {"behind_proxy": True},
    "database_url": "postgresql+psycopg://db.example.org/onebasis",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"server": {}}, "server.tls, or server.behind_proxy: true"),
        ({"database_url": "sqlite:///x.db"}, "database_url of a Postgres"),
        ({"ray": {"address": "head:6379"}}, "ray.auth_token_path, the token of the cluster"),
        (
            {"server": {"tls": {"cert_file": "c", "key_file": "k"}}, "serving": {"host": "0.0.0.0"}},
            "serving.host on loopback, or server.behind_proxy: true",
        ),
    ],
)
def test_production_refuses_what_is_fit_for_trying_out_alone(tmp_path: Path, changes: Any, said: str) -> None:
    assert read_settings(written(tmp_path, **FIT)).production
    tls = {"tls": {"cert_file": "cert.pem", "key_file": "key.pem"}}
    assert read_settings(written(tmp_path, **FIT | {"server": tls})).server.tls is not None
    assert read_settings(written(tmp_path, **FIT, serving={"host": "0.0.0.0"})).serving is not None
    with pytest.raises(InvalidInput, match=f"production: true needs {said}"):
        read_settings(written(tmp_path, **FIT | changes))
    read_settings(written(tmp_path, **FIT | changes | {"production": False}))


def test_a_rule_of_main_names_teams_that_are_there(tmp_path: Path) -> None:
    assert read_settings(written(tmp_path, main={"hold": {"teams": ["red"]}})).main.hold.teams == ("red",)
    with pytest.raises(InvalidInput, match=r"main.publish: there is no team 'rde'; there are: red"):
        read_settings(written(tmp_path, main={"publish": {"teams": ["rde"]}}))
