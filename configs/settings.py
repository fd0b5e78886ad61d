"""The settings of one onebasis service: one YAML file, checked, frozen, every unit in the name.

A function gets its section, never everything. Secrets are not settings: S3 credentials come from boto3's usual
chain, a Postgres password from its own file or environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs import places
from configs.document import Name, Section, read_document
from configs.places import Located


class BaseModelSettings(Section):
    """The one base model whose subspace this service keeps."""

    name: Name
    """What task files call it."""
    source: Annotated[str, Located(places.model)]
    """A folder, a hub id, or `package:NAME/FOLDER` for weights inside an installed Python package."""
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of `model.safetensors` (with shards: of their digests' text, in the order of their names). A worker
    refuses other weights: a subspace belongs to one base model, to the bit. A wrong one is answered with the right."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the base weights in memory. LoRA's own numbers are float32 whatever this says."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Base weights in 4 or 8 bits by bitsandbytes; needs a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto`: the GPU when there is one. `cpu`: the weights stay in host memory, mapped from the file once per
    machine, and each task takes to the GPU what it needs (ZeRO-3: its share)."""


class StorageSettings(Section):
    """Where versions live. The log is the truth about them."""

    url: Annotated[str, Located(places.storage)] = "file:.onebasis/store"
    """`file:FOLDER`, `s3://BUCKET/PREFIX` or, in tests, `memory:NAME`."""
    endpoint_url: str | None = None
    """Address of an S3 server that is not AWS."""
    region: str | None = None
    """Of the bucket; default: what boto3's chain finds (AWS_DEFAULT_REGION, the profile)."""
    path_style: bool | None = None
    """Whether the bucket stands in the path of requests, not in the host name; default: yes if there is an
    `endpoint_url`."""
    sse: Literal["AES256", "aws:kms"] | None = None
    """Server-side encryption asked for with every write; default: what the bucket does by itself."""
    sse_kms_key_id: str | None = None
    """Key for `aws:kms`; default: the account's own."""

    @model_validator(mode="after")
    def _parts_fit(self) -> StorageSettings:
        if self.sse_kms_key_id and self.sse != "aws:kms":
            raise ValueError("sse_kms_key_id needs sse: aws:kms")
        return self


class SubspaceSettings(Section):
    """How adapters are merged (design.md 3.3)."""

    variant: Literal["canonical", "paper"] = "canonical"
    """`paper` stacks the raw factors B and A as Share does, unweighted, and keeps rank_fixed (or rank_max) directions:
    for comparison."""
    energy_ratio_min: float = Field(0.98, gt=0, le=1)
    """Every task keeps this share of its delivered energy in every module, unless rank_max binds."""
    rank_max: int = Field(64, ge=1)
    """Most directions per module and side."""
    rank_fixed: int | None = Field(None, ge=1)
    """Exactly this many directions (the paper's form) instead of the two above."""
    weighting: Literal["equal", "energy"] = "equal"
    """`equal` divides each task by its norm, so a small update is protected as well as a large one."""


class WorkerSettings(Section):
    """The training workers: warm Ray actors, one task each at a time."""

    count: int = Field(2, ge=1, le=1000)
    cpus: float = Field(1, gt=0)
    """CPUs that Ray reserves for each rank; torch uses as many threads."""
    gpus: float = Field(0, ge=0, le=1)
    """GPUs for each rank; a part of one only where it is a worker's only rank."""
    ranks: int = Field(1, ge=1, le=1024)
    """Processes that work on one task together: every worker is a gang of this many."""
    placement: Literal["PACK", "SPREAD"] = "PACK"
    """Whether Ray puts a gang's ranks on as few or on as many machines as it can."""
    heartbeat_seconds: float = Field(1.0, gt=0)
    lease_seconds: float = Field(60.0, gt=0)
    """A worker that leaves a question unanswered for this long is replaced."""

    @model_validator(mode="after")
    def _ranks_have_whole_gpus(self) -> WorkerSettings:
        if self.ranks > 1 and self.gpus % 1:
            raise ValueError("the ranks of a gang cannot share a GPU: NCCL refuses it. Set gpus to 0 or 1")
        return self


class RaySettings(Section):
    """The Ray cluster."""

    address: str = "local"
    """`local` starts one on this machine's loopback; else HOST:PORT of a running head."""
    auth_token_path: Annotated[str | None, Located(places.absolute)] = None
    """Token file of a running cluster. A local one gets a token of its own."""


class TeamSettings(Section):
    """A team that may submit tasks."""

    weight: float = Field(1.0, gt=0)
    """Share of the cluster in comparison with the other teams."""
    queued_max: int = Field(1000, ge=1)
    """Tasks that may wait at once."""


class GateSettings(Section):
    """When a merged version may move `main`. Differences of scores on the same frozen rows."""

    drop_max: float = Field(0.03, ge=0)
    """An earlier task may lose at most this much against its score at birth."""
    merge_gap_max: float = Field(0.05, ge=0)
    """A new task may lose at most this much against its own adapter before merging."""
    drift_min: float = Field(1e-4, ge=0)
    """A task whose relative drift since its last evaluation is below this keeps its score, unmeasured."""


class FailureSettings(Section):
    """How often a task is tried again, by whose fault it was. A user's mistake is never retried."""

    lost_machines_max: int = Field(5, ge=0)
    own_bugs_max: int = Field(1, ge=0)


class MlflowSettings(Section):
    """The mirror that people look at."""

    tracking_uri: Annotated[str, Located(places.database_or_folder)] = "sqlite:///.onebasis/mlflow.db"
    artifact_location: Annotated[str | None, Located(places.unless_address)] = None
    """Where plots go; default: beside a local database."""
    experiment: str = "onebasis"


class ServerSettings(Section):
    """The HTTP API of the control plane."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    """0 takes a free one; it is written to the state folder."""


class Settings(Section):
    """One service: one base model, one subspace, its teams and its machines."""

    state_dir: Annotated[str, Located(places.absolute)] = ".onebasis"
    """Folder for the service's own files (database, logs, addresses). As every relative path here it starts from where
    `onebasis up` runs; `~` is the home folder."""
    base_model: BaseModelSettings
    teams: dict[Name, TeamSettings] = Field(min_length=1)
    data_roots: Annotated[tuple[str, ...], Located(places.absolute)] = (".",)
    """Folders from which task files may name data and adapters. Default: where `onebasis up` runs."""
    database_url: Annotated[str, Located(places.database)] = "sqlite:///.onebasis/tasks.db"
    storage: StorageSettings = StorageSettings()
    subspace: SubspaceSettings = SubspaceSettings()
    workers: WorkerSettings = WorkerSettings()
    ray: RaySettings = RaySettings()
    gate: GateSettings = GateSettings()
    failures: FailureSettings = FailureSettings()
    mlflow: MlflowSettings = MlflowSettings()
    server: ServerSettings = ServerSettings()


def read_settings(path: Path, root: Path | None = None) -> Settings:
    """Read a settings file and make its relative paths absolute.

    Args:
        root: Folder that relative paths start from; default: where the command runs. A worker runs elsewhere.

    Raises:
        InvalidInput: Missing file, bad YAML, unknown key (with its path and the nearest right one) or value.
    """
    return places.located(read_document(path, Settings), (root or Path.cwd()).resolve())
