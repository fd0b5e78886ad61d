"""The settings of one onebasis service: one YAML file, checked, frozen, every unit in the name.

A function gets its section, never everything. Secrets are not settings: S3 credentials come from boto3's usual
chain, a Postgres password from its own file or environment.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from configs import places
from configs.document import Name, Section, read_document
from configs.errors import InvalidInput, NotFound
from configs.log_lines import LogFormat
from configs.places import Located, absolute


class BaseModelSettings(Section):
    """A base model whose subspace this service keeps."""

    name: Name
    """What task files call it, and the folder of its store below `storage.url`: it cannot be changed later."""
    source: Annotated[str, Located(places.model)]
    """Where the weights are: a folder, a hub id, or `package:NAME/FOLDER` inside an installed Python package."""
    weights_sha256: str = Field(
        pattern="^[0-9a-f]{64}$",
        description='write `weights_sha256: "…"` below `base_model:`, the 64 hexadecimal digits of the digest of the '
        "weights, in quotes; if you do not know it, write 64 zeros: `onebasis up` then says which it is",
    )
    """sha256 of `model.safetensors`; of a model in several files, the sha256 of the text of their digests in the order
    of the file names. A worker refuses other weights, since a subspace belongs to one base model, to the bit. If the
    value is wrong, the message has the right one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the base weights in memory. The LoRA's own numbers are always float32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Whether bitsandbytes keeps the base weights in 4 or 8 bits; needs a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """Where the base weights are kept. `auto`: on the GPU if there is one. `cpu`: in host memory, mapped from the file
    once per machine; each task copies to the GPU what it needs (with ZeRO-3, its share)."""
    general_text: Annotated[str | None, Located(places.absolute)] = None
    """Text in UTF-8, plain or `.gz`, that no task is about, on the control plane's machine. Whenever a task of kind
    `causal_lm` is scored, its first 4,096 tokens show what the base model loses by the task. None: not measured."""


class StorageSettings(Section):
    """Where versions are stored. The log there is the truth about them."""

    url: Annotated[str, Located(places.storage)] = "file:.onebasis/store"
    """Address of the store: `file:FOLDER`, `s3://BUCKET/PREFIX` or, in tests, `memory:NAME`."""
    endpoint_url: str | None = None
    """Address of an S3 server that is not AWS."""
    region: str | None = None
    """Region of the bucket; default: what boto3's chain finds (AWS_DEFAULT_REGION, the profile)."""
    path_style: bool | None = None
    """Whether requests name the bucket in the path instead of the host name; default: true if there is an
    `endpoint_url`."""
    sse: Literal["AES256", "aws:kms"] | None = None
    """Server-side encryption that every write asks for; default: the bucket's own setting."""
    sse_kms_key_id: str | None = None
    """Key for `aws:kms`; default: the account's own."""

    @model_validator(mode="after")
    def _parts_fit(self) -> StorageSettings:
        if self.sse_kms_key_id and self.sse != "aws:kms":
            raise ValueError("sse_kms_key_id needs sse: aws:kms")
        return self


class SubspaceSettings(Section):
    """How adapters are merged."""

    variant: Literal["canonical", "paper"] = "canonical"
    """Form of the merge. `paper`, for comparison, stacks the raw factors B and A as Share does, unweighted, and keeps
    rank_fixed (or rank_max) directions."""
    energy_ratio_min: float = Field(0.98, gt=0, le=1)
    """Share of its delivered energy that every task keeps in every module, whatever is merged later."""
    rank_max: int = Field(64, ge=1)
    """Most directions of a shared basis, per module and side. Lowered later, it makes no stored basis smaller."""
    share: Literal["if-it-pays", "always"] = "if-it-pays"
    """When the directions of a new task join the shared basis. `if-it-pays`: where that stores fewer numbers than
    keeping what the basis lacks as the task's private part, so that a store is hardly larger than separate adapters
    that are truncated to the same promise; `always`: up to rank_max, as Share does."""
    seed_directions: int = Field(32, ge=0)
    """Directions, per module and side, until it has which the basis takes those of the first tasks whether that pays or
    not: later tasks are trained in them. For `if-it-pays`."""
    renew_tasks: int = Field(64, ge=0)
    """Number of tasks whose sizes `auto` found at which each module gets a renewed basis beside the first: the leading
    directions of all tasks that are there, in which later tasks are trained. No task moves. 0: never. For
    `if-it-pays`. A dozen tasks make as good a basis; but it takes as many numbers as three LoRAs of rank 8, and what
    it saves, measured at some 3 % of a LoRA for each later task, has to come to that."""
    renew_directions: int = Field(24, ge=1)
    """Directions of a renewed basis, per module and side. `auto` trains in no basis of fewer than 24."""
    beyond_rank_max: Literal["private", "drop"] = "private"
    """What happens where rank_max leaves a task less than it was promised. `private`: the rest of its update is kept
    beside the basis, for this task alone, and no earlier task loses anything; `drop`, for comparison: it is lost."""
    rank_fixed: int | None = Field(None, ge=1)
    """Exact number of directions (the paper's form), instead of energy_ratio_min and rank_max; what it leaves out is
    lost."""
    weighting: Literal["equal", "energy"] = "equal"
    """Weight of each task in a merge. `equal` divides each task by its norm, so that a small update is protected as
    well as a large one; `energy` does not."""


DEFAULT_POOL = "default"
"""Name of the pool that `workers:` describes."""
WORKER = "worker"
"""First part of the names of the default pool's workers, so that no other pool may have it."""


class WorkerShape(Section):
    """What one worker of a pool is: a warm Ray actor, or a gang of them, with one task at a time."""

    cpus: float = Field(1, gt=0)
    """CPUs that Ray reserves for each rank; torch uses the same number of threads."""
    gpus: float = Field(0, ge=0, le=1)
    """GPUs for each rank; a fraction is allowed only with ranks: 1."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory that Ray reserves for each rank, in 10⁹ bytes: where it places workers, not a limit. Default: none."""
    ranks: int = Field(1, ge=1, le=1024)
    """Processes that train one task together: every worker is a gang of this size."""
    placement: Literal["PACK", "SPREAD"] = "PACK"
    """Whether Ray puts the ranks of a gang on as few machines as possible (PACK) or on as many (SPREAD)."""
    heartbeat_seconds: float = Field(1.0, gt=0)
    """Time between two questions to a worker for a sign of life."""
    lease_seconds: float = Field(60.0, gt=0)
    """Time without an answer after which a worker is replaced."""

    @model_validator(mode="after")
    def _ranks_have_whole_gpus(self) -> Self:
        if self.ranks > 1 and self.gpus % 1:
            raise ValueError("the ranks of a gang cannot share a GPU: NCCL refuses it. Set gpus to 0 or 1")
        return self


class WorkerSettings(WorkerShape):
    """The training workers where all of them are alike: one pool, named `default`, of a fixed size."""

    count: int = Field(2, ge=1, le=1000)

    @property
    def pool(self) -> PoolSettings:
        """The same as a pool."""
        shape = {name: getattr(self, name) for name in WorkerShape.model_fields}
        return PoolSettings(min=self.count, max=self.count, **shape)


class PoolSettings(WorkerShape):
    """A pool: workers that are all alike, as many as the tasks that wait for them need."""

    base_model: Name | None = None
    """Name of the base model that its workers load; default: the only one."""
    min: int = Field(0, ge=0, le=1000)
    """Workers that are always there, their base model loaded."""
    max: int = Field(ge=1, le=1000)
    """Most workers. While tasks wait that the pool could take, Ray is asked for more workers, and an autoscaler sees
    that."""
    idle_seconds: float = Field(300.0, ge=0)
    """Time without work after which a worker beyond `min` ends, so that Ray's autoscaler can release its machine."""

    @model_validator(mode="after")
    def _min_is_no_more_than_max(self) -> PoolSettings:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, and max {self.max}: set min to {self.max} or less")
        return self


class RaySettings(Section):
    """The Ray cluster."""

    address: str = "local"
    """`local`: start a cluster on this machine; else HOST:PORT of a running cluster's head."""
    auth_token_path: Annotated[str | None, Located(places.absolute)] = None
    """Token file of a running cluster. A local cluster gets a token of its own."""
    adds_machines: bool = False
    """Whether an autoscaler adds machines while workers wait for room. Else pools that share machines make room for
    each other: what a task that is next needs is reserved for it."""


class AddressSettings(Section):
    """An address that this service calls over HTTP, and the secret that it signs with."""

    url: str = Field(pattern=r"^https?://[^\s/?#@]+([/?][^\s#]*)?$")
    """Where it is posted to; redirects are not followed. The host alone is ever shown: the rest may be a secret."""
    private: bool = False
    """Whether that may be this machine or a private network; a public address has to begin with https."""
    secret_env: str | None = Field(None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable of the control plane that holds the secret: `whsec_` and 24 to 64 bytes in base64."""
    secret_file: Annotated[str | None, Located(places.absolute)] = None
    """File that holds the secret, instead; it is read each time, so it can be changed at any moment."""

    @property
    def host(self) -> str:
        """What of the URL may be shown."""
        return urlsplit(self.url).netloc

    @model_validator(mode="after")
    def _is_signed_and_sealed(self) -> Self:
        if (self.secret_env is None) == (self.secret_file is None):
            raise ValueError("needs exactly one of secret_env and secret_file: what is sent is signed")
        if self.url.startswith("http:") and not self.private:
            raise ValueError(
                "url has to begin with https, or private has to be true: this machine, or a private network"
            )
        return self


Subscription = Literal["ended", "published", "rejected", "parked", "rolled-back", "held", "alarm"]
"""A kind of event. `ended` is every end of a task: published, rejected, parked and cancelled."""


class WebhookSettings(AddressSettings):
    """Who is told of events over HTTP, in the form that Standard Webhooks defines."""

    events: tuple[Subscription, ...] = Field(min_length=1)
    """Kinds of events: `ended` (every end of a task), `published`, `rejected`, `parked` of tasks; `rolled-back` and
    `held` of `main`; for the service as a whole also `alarm`."""


class BucketSettings(Section):
    """A part of a bucket from which task files may name data and adapters."""

    url: str = Field(pattern="^s3://[^/]")
    """`s3://BUCKET/PREFIX`: what lies below it may be named. The control plane reads it, with the credentials that
    boto3's usual chain finds: they decide what else there could be read."""
    endpoint_url: str | None = None
    """Address of an S3 server that is not AWS."""
    region: str | None = None
    """Region of the bucket; default: what boto3's chain finds."""
    path_style: bool | None = None
    """As for `storage`."""

    @field_validator("url")
    @classmethod
    def _names_a_part_of_a_bucket(cls, url: str) -> str:
        try:
            return places.in_bucket(url)
        except InvalidInput as error:
            raise ValueError(f"{error.what}: {error.todo}") from error


class TeamSettings(Section):
    """A team that may submit tasks."""

    weight: float = Field(1.0, gt=0)
    """Share of the cluster, relative to the weights of the other teams."""
    data_roots: Annotated[tuple[str, ...] | None, Located(absolute)] = None
    """Folders from which its task files may name data and adapters, instead of those of the service."""
    data_buckets: tuple[BucketSettings, ...] | None = None
    """Parts of buckets that they may name, instead of those of the service."""
    queued_max: int = Field(1000, ge=1)
    """Most tasks of the team that may wait at the same time."""
    places: int | None = Field(None, ge=1)
    """Quota of places at once; a place is room for one rank, a worker in a pool whose `ranks` is 1. The team borrows
    what others leave idle, and gives it back when a team within its quota wants it: what was started last writes a
    checkpoint and waits again. Default: no quota."""
    place_hours_a_week: float | None = Field(None, gt=0)
    """Quota of hours of places in a week, on average: older use counts less, by half for every seven days. Beyond it
    the team borrows. Default: no quota."""
    gpu_hours_a_week: float | None = Field(None, gt=0)
    """Quota of hours of GPUs in a week, in the same way; half a GPU for an hour is half an hour. Default: no quota."""
    webhooks: dict[Name, WebhookSettings] = Field(default_factory=dict)
    """Name to who is told what happens to the team's tasks, and to `main`."""

    @model_validator(mode="after")
    def _alarms_are_the_services(self) -> Self:
        for name, hook in self.webhooks.items():
            if "alarm" in hook.events:
                raise ValueError(f"webhooks.{name}.events: alarms are the service's: write the webhook beside teams")
        return self


class PrePublishSettings(Section):
    """What is asked before a version that passed the gate is published. It may refuse it, with a reason."""

    command: tuple[str, ...] | None = Field(None, min_length=1)
    """Program, as an absolute path or found in PATH, and its arguments; no shell. It is handed a JSON document on its
    standard input, and answers by its exit code (0: publish, 3: refuse) or by JSON on its last line:
    `{"publish": false, "reason": "…"}`."""
    http: AddressSettings | None = None
    """Address, instead, that the document is posted to; it answers in JSON."""
    timeout_seconds: float = Field(60.0, gt=0, le=3600)
    """Longest wait for the answer."""
    on_failure: Literal["refuse", "publish"] = "refuse"
    """What becomes of the version where there is no answer: what is asked is not there, fails, says nothing that can be
    read, or is late."""

    @model_validator(mode="after")
    def _one_is_asked(self) -> Self:
        if (self.command is None) == (self.http is None):
            raise ValueError("needs exactly one of command and http")
        return self


class GateSettings(Section):
    """When a merged version may move `main`. Differences of scores on the same frozen rows."""

    drop_max: float = Field(0.03, ge=0)
    """Largest loss of an earlier task against its score at birth."""
    merge_gap_max: float = Field(0.05, ge=0)
    """Largest loss of a new task against its own adapter before merging."""
    error_max: float = Field(0.25, ge=0)
    """Largest error at birth of a new task that has no score: where nothing was measured, geometry decides."""
    min_gain: float | None = None
    """Least gain of a new task's score over the base model alone, and over always giving the most frequent label; below
    it the version is not published. None: such a task is published with a warning."""
    general_loss_max: float | None = Field(None, ge=0)
    """Most that the base model may lose by a new task, in nats for each token of `base_model.general_text`, which it
    needs; above it the version is not published. Nor where an earlier task that was below it would rise above it. None:
    it is measured and shown only."""
    drift_min: float = Field(1e-4, ge=0)
    """Smallest relative drift since its last evaluation at which a task is scored again; below it keeps its score."""
    canary_requests_min: int | None = Field(None, ge=1)
    """Requests that the canary answers by a version before it is published: of each task of which it brings a revision;
    of all tasks together where it brings none. Needs `serving.canary` with version `candidate`. None: none."""
    canary_seconds_max: float = Field(3600.0, gt=0)
    """Longest wait for them, since the version was merged; then it is published without."""
    pre_publish: PrePublishSettings | None = None
    """Who else is asked before a version is published, last of all; None: nobody."""


class FailureSettings(Section):
    """How often a task is tried again, by cause. A mistake in the task itself is never retried."""

    lost_machines_max: int = Field(5, ge=0)
    """Most attempts of a task that may end because its machine was lost."""
    worker_deaths_max: int = Field(3, ge=0)
    """Most attempts of a task that may end because the process that did it died (an exit, a signal, memory) while its
    machine went on. A machine that is lost with all that ran there is not counted here."""
    own_bugs_max: int = Field(1, ge=0)
    """Most attempts of a task that may end with an internal error."""


class MlflowSettings(Section):
    """The MLflow server or database that mirrors tasks, scores and curves for people."""

    tracking_uri: Annotated[str, Located(places.database_or_folder)] = "sqlite:///.onebasis/mlflow.db"
    artifact_location: Annotated[str | None, Located(places.unless_address)] = None
    """Folder or address for plots; default: beside a local database."""
    experiment: str = "onebasis"


class TracingSettings(Section):
    """Where traces of tasks go."""

    endpoint: str | None = Field(None, pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$")
    """Address of an OpenTelemetry collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318`; `/v1/traces` is
    added unless it ends so. Headers that it asks for, such as a token, are taken from the control plane's environment,
    OTEL_EXPORTER_OTLP_HEADERS. None: there are no traces."""


RoleName = Literal["viewer", "submitter", "maintainer", "admin"]
"""A role, as orchestrator/api/access.py explains them."""


class MainRule(Section):
    """Who may move `main`, or hold it."""

    role: RoleName = "maintainer"
    """Least role."""
    teams: tuple[Name, ...] | None = None
    """Teams in which the role counts; who has a role for all teams has it in these too. Default: any team."""


class MainSettings(Section):
    """Who may do what moves `main`, which all teams share."""

    publish: MainRule = Field(default_factory=lambda: MainRule(role="submitter"))
    """Bring tasks that are published when they pass the gate; remove tasks, compact."""
    rollback: MainRule = Field(default_factory=MainRule)
    """Move `main` to another version; refuse one that waits to be published."""
    hold: MainRule = Field(default_factory=MainRule)
    """Hold `main`, and release it."""


class TlsSettings(Section):
    """The certificate of the HTTP API."""

    cert_file: Annotated[str, Located(places.absolute)]
    """Certificate in PEM, with those between it and its authority behind it."""
    key_file: Annotated[str, Located(places.absolute)]
    """Its private key in PEM, not encrypted."""


class ServerSettings(Section):
    """The HTTP API of the control plane."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    """TCP port; 0 takes a free one. The port is written to the state folder."""
    tls: TlsSettings | None = None
    """Certificate; without one the API speaks plain HTTP."""
    behind_proxy: bool = False
    """Whether a proxy in front of it speaks TLS with everybody who is on another machine."""
    requests_per_second: float | None = Field(50.0, gt=0)
    """Most requests of one token, on average; ten times as many at once. Does not count for the owner of the state
    folder. None: any number."""
    upload_bytes_max: int = Field(2 * 2**30, ge=1)
    """Most bytes of one file that is sent with a task file."""
    upload_team_bytes_max: int = Field(20 * 2**30, ge=1)
    """Most bytes of files that a team sent and that are there; what was not used for a day is deleted."""


class GroupSettings(Section):
    """What the members of one group of the identity provider may do."""

    role: RoleName
    team: Name | None = None
    """Team in which they have it; default: all teams."""


class OidcSettings(Section):
    """Bearer tokens that an identity provider signs (OpenID Connect), beside the service's own."""

    issuer: str = Field(pattern="^https?://[^\\s?#]+$")
    """Address of the provider, exactly as its tokens have it in `iss`; below it, its keys are found
    (`/.well-known/openid-configuration`). With https, but on this machine."""
    audience: str = Field(min_length=1)
    """What its tokens for this service have in `aud`."""
    name_claim: str = "sub"
    """Claim that is the name of who asks, in every record: choose one that people cannot change themselves."""
    groups_claim: str = "groups"
    """Claim that lists groups."""
    groups: dict[str, GroupSettings] = Field(min_length=1)
    """Name of a group to what its members may do. Who is in none of them is refused."""

    @model_validator(mode="after")
    def _keys_come_over_https(self) -> Self:
        host = urlsplit(self.issuer).hostname or ""
        if self.issuer.startswith("http:") and host not in LOOPBACK:
            raise ValueError("issuer has to begin with https: who answers there says who may do everything here")
        return self


LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine for itself."""


class CanarySettings(Section):
    """A share of the requests that another version answers than `main`'s, to be compared on what is really asked."""

    version: Literal["candidate"] | int = "candidate"
    """Version: `candidate`, whichever waits for its verdict, or a number."""
    share: float = Field(0.05, gt=0, le=1)
    """Share of the requests, chosen by their keys."""
    shadow: float = Field(1.0, ge=0, le=1)
    """Share of those that `main`'s version answers, too, when nobody waits: by these the two are compared."""


class ServingSettings(Section):
    """What answers over HTTP, beside the control plane: a Ray Serve application (`onebasis serve`)."""

    host: str = "127.0.0.1"
    """Address of the machine's interface; `0.0.0.0` for all of them."""
    port: int = Field(8001, ge=1, le=65535)
    proxies: Literal["HeadOnly", "EveryNode"] = "EveryNode"
    """Machines that listen, of those that have a replica or a door."""
    replicas_min: int = Field(1, ge=1)
    """Processes that answer for each base model, at least; more are started while many requests wait."""
    replicas_max: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    """CPUs of a replica: what Ray reserves for it on a cluster, and the number of its threads."""
    gpus: float = Field(0, ge=0)
    rows_max: int = Field(64, ge=1)
    """Rows of a batch, and requests at once for which one replica is enough."""
    waiting_max: int = Field(512, ge=1)
    """Most requests at once of a replica. As many again wait before it; further ones are told to ask again (503)."""
    canary: CanarySettings | None = None
    """Another version that answers a share of the requests; None: none does."""

    @property
    def url(self) -> str:
        """Address on the machine that is asked."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    @model_validator(mode="after")
    def _bounds_fit(self) -> ServingSettings:
        if self.replicas_max < self.replicas_min:
            raise ValueError("replicas_max is less than replicas_min")
        return self


def _is_loopback(host: str) -> bool:
    """Whether an address is heard on this machine alone."""
    with contextlib.suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


class Settings(Section):
    """One service: its base models, each with a subspace of its own, its teams and its machines."""

    state_dir: Annotated[str, Located(places.absolute)] = ".onebasis"
    """Folder for the service's own files (database, logs, addresses). Relative paths in this file start from the folder
    where `onebasis up` runs; `~` is the home folder."""
    base_model: BaseModelSettings | None = None
    """The base model, where there is one; instead of `base_models`."""
    base_models: tuple[BaseModelSettings, ...] = ()
    """The base models, each as `base_model` would be: each has a store, branches and scores of its own. Teams, gate and
    the rules of merging are the same for all. Without `pools`, each has as many workers as `workers` says."""
    teams: dict[Name, TeamSettings] = Field(min_length=1)
    data_roots: Annotated[tuple[str, ...], Located(places.absolute)] = (".",)
    """Folders from which task files may name data and adapters. Default: where `onebasis up` runs."""
    data_buckets: tuple[BucketSettings, ...] = ()
    """Parts of buckets from which they may name data and adapters. Default: none."""
    log_format: LogFormat = "text"
    """Form of the lines in the logs of the control plane, the workers and the stores' writers. `json`: an object for
    each, with the ids of the request, the task and its trace."""
    database_url: Annotated[str, Located(places.database)] = "sqlite:///.onebasis/tasks.db"
    storage: StorageSettings = Field(default_factory=StorageSettings)
    subspace: SubspaceSettings = Field(default_factory=SubspaceSettings)
    workers: WorkerSettings | None = None
    """One pool of workers, named `default`; instead of `pools`."""
    pools: dict[Name, PoolSettings] = Field(default_factory=dict)
    """Name to pool of workers. Default: what `workers` says, or two workers."""
    ray: RaySettings = Field(default_factory=RaySettings)
    gate: GateSettings = Field(default_factory=GateSettings)
    failures: FailureSettings = Field(default_factory=FailureSettings)
    mlflow: MlflowSettings = Field(default_factory=MlflowSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)
    serving: ServingSettings | None = None
    """What answers over HTTP; None: nothing does."""
    main: MainSettings = Field(default_factory=MainSettings)
    webhooks: dict[Name, WebhookSettings] = Field(default_factory=dict)
    """Name to who is told of events of all teams. Those of one team are in `teams.NAME.webhooks`. Only who writes this
    file names addresses: no role over HTTP can, but for admins of all teams, by `reload`."""
    oidc: OidcSettings | None = None
    """Identity provider whose tokens are taken, too."""
    production: bool = False
    """Whether `up` refuses what is fit for trying out alone: an API without TLS, SQLite, a cluster without a token, a
    storage that fails `onebasis doctor`."""

    @model_validator(mode="after")
    def _base_models_have_names(self) -> Settings:
        if (self.base_model is None) == (not self.base_models):
            both = "exclude each other: move what is below base_model into the list base_models"
            raise ValueError(f"base_model and base_models {both}" if self.base_model else "base_model is missing")
        names = self.base_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"base_models: several are called '{twice[0]}': give each a name of its own")
        if self.gate.general_loss_max is not None and not any(base.general_text for base in self.bases):
            raise ValueError("gate.general_loss_max needs a base model with general_text, by which it is measured")
        return self

    @property
    def bases(self) -> tuple[BaseModelSettings, ...]:
        """All base models, in the order of the file."""
        return self.base_models or (() if self.base_model is None else (self.base_model,))

    @property
    def base_names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(base.name for base in self.bases)

    @property
    def cpus_at_most(self) -> int:
        """CPUs that the workers of all pools take when each pool has as many as it may."""
        return math.ceil(sum(pool.max * pool.ranks * pool.cpus for pool in self.pools.values()))

    @property
    def hooks(self) -> dict[str, tuple[str, WebhookSettings]]:
        """Name of each webhook, `TEAM/NAME` for one of a team, to its team (empty: all) and to what it is."""
        of_teams = {
            f"{team}/{name}": (team, hook) for team, its in self.teams.items() for name, hook in its.webhooks.items()
        }
        return {name: ("", hook) for name, hook in self.webhooks.items()} | of_teams

    def of_team(self, team: str) -> Settings:
        """The settings as they are for a team's submissions: with the folders and buckets that it may read."""
        own = {name: getattr(self.teams[team], name) for name in ("data_roots", "data_buckets") if team in self.teams}
        return self.model_copy(update={name: places for name, places in own.items() if places is not None})

    def base(self, name: str | None = None) -> BaseModelSettings:
        """A base model by its name; the only one, where no name is given.

        Raises:
            NotFound: No base model has this name.
            InvalidInput: No name is given, and there are several.
        """
        if name is None and len(self.bases) == 1:
            return self.bases[0]
        named = ", ".join(self.base_names)
        if name is None:
            todo = f"add --base-model: one of {named}"
            raise InvalidInput("this service has several base models", "base_model", todo)
        found = next((base for base in self.bases if base.name == name), None)
        if found is None:
            raise NotFound(f"there is no base model '{name}'", todo=f"base models of this service: {named}")
        return found

    @model_validator(mode="after")
    def _workers_are_a_pool(self) -> Settings:
        own = _alike((self.workers or WorkerSettings()).pool, self.base_names)
        pools = {name: pool.model_copy(update={"base_model": self._base_of(name, pool)}) for name, pool in
                 (self.pools or own).items()}  # fmt: skip
        if self.workers is not None and self.pools and pools != own:
            raise ValueError(f"workers and pools exclude each other: write workers as the pool '{DEFAULT_POOL}'")
        if WORKER in pools:
            raise ValueError(f"a pool cannot be called '{WORKER}': so are the workers of the pool '{DEFAULT_POOL}'")
        if without := [name for name in self.base_names if name not in {pool.base_model for pool in pools.values()}]:
            raise ValueError(f"pools: none has workers for the base model '{without[0]}': add one that names it")
        # As `setattr`, which a frozen record refuses, before anybody has the record.
        self.__dict__["pools"] = pools
        return self

    def _base_of(self, name: str, pool: PoolSettings) -> str:
        """Name of the base model that a pool's workers load."""
        if pool.base_model is None and len(self.bases) > 1:
            raise ValueError(f"pools.{name}.base_model is missing: one of {', '.join(self.base_names)}")
        if pool.base_model is not None and pool.base_model not in self.base_names:
            known = ", ".join(self.base_names)
            raise ValueError(f"pools.{name}: there is no base model '{pool.base_model}'; there are: {known}")
        return pool.base_model or self.base_names[0]

    @model_validator(mode="after")
    def _rules_name_teams_that_are_there(self) -> Settings:
        named = [(f"main.{rule}", getattr(self.main, rule).teams or ()) for rule in MainSettings.model_fields]
        for group, given in (self.oidc.groups if self.oidc else {}).items():
            named.append((f"oidc.groups.{group}", (given.team,) if given.team else ()))
        for where, teams in named:
            if strangers := [team for team in teams if team not in self.teams]:
                raise ValueError(f"{where}: there is no team '{strangers[0]}'; there are: {', '.join(self.teams)}")
        return self

    @model_validator(mode="after")
    def _production_is_fit_for_it(self) -> Settings:
        if not self.production:
            return self
        missing = [
            words
            for words, is_there in (
                ("server.tls, or server.behind_proxy: true", self.server.tls or self.server.behind_proxy),
                ("database_url of a Postgres", self.database_url.startswith("postgresql")),
                (
                    "ray.auth_token_path, the token of the cluster",
                    self.ray.address == "local" or self.ray.auth_token_path,
                ),
                (
                    "serving.host on loopback, or server.behind_proxy: true, since what answers speaks no TLS",
                    self.serving is None or self.server.behind_proxy or _is_loopback(self.serving.host),
                ),
            )
            if not is_there
        ]
        if missing:
            raise ValueError(f"production: true needs {'; '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _a_canary_that_is_waited_for_answers(self) -> Settings:
        gate, canary = self.gate, self.serving.canary if self.serving is not None else None
        if gate.canary_requests_min is None:
            if gate.canary_seconds_max != GateSettings.model_fields["canary_seconds_max"].default:
                raise ValueError("gate.canary_seconds_max has no meaning without gate.canary_requests_min: set both")
        elif canary is None:
            where = "serving" if self.serving is None else "serving.canary"
            raise ValueError(
                f"gate.canary_requests_min is {gate.canary_requests_min}, and nothing answers them: {where} is not "
                "set. Set serving.canary (`onebasis serve --canary candidate`), or leave the gate's out"
            )
        elif canary.version != "candidate":
            raise ValueError(
                f"gate.canary_requests_min waits for the version that is judged, and serving.canary.version is "
                f"{canary.version}: it has to be candidate"
            )
        return self

    @model_validator(mode="after")
    def _a_quota_has_room_for_a_task(self) -> Settings:
        name, smallest = min(self.pools.items(), key=lambda named: named[1].ranks)
        for team, settings in self.teams.items():
            if settings.places is not None and settings.places < smallest.ranks:
                raise ValueError(
                    f"teams.{team}.places is {settings.places}, and a task takes {smallest.ranks} (the ranks of pool "
                    f"'{name}'): none of the team's would ever be within its quota"
                )
            if settings.gpu_hours_a_week is not None and not any(pool.gpus for pool in self.pools.values()):
                raise ValueError(
                    f"teams.{team}.gpu_hours_a_week is {settings.gpu_hours_a_week:g}, and no pool has GPUs: it would "
                    "never count. Set place_hours_a_week, or the pools' gpus"
                )
        return self


def _alike(pool: PoolSettings, base_models: Sequence[str]) -> dict[str, PoolSettings]:
    """A pool of the same shape for each base model: `default` for the first one, those of the others named as they are.
    So workers keep their names when a service gets a second base model."""
    first, *others = base_models
    if taken := [name for name in others if name in (DEFAULT_POOL, WORKER)]:
        raise ValueError(f"base_models: only the first may be called '{taken[0]}', since pools are named as they are")
    names = {DEFAULT_POOL: first} | {name: name for name in others}
    return {name: pool.model_copy(update={"base_model": base}) for name, base in names.items()}


def read_settings(path: Path, root: Path | None = None) -> Settings:
    """Read a settings file and make its relative paths absolute.

    Args:
        root: Folder that relative paths start from; default: where the command runs. A worker runs elsewhere.

    Raises:
        InvalidInput: Missing file, bad YAML, unknown key (with its path and the nearest right one) or value.
    """
    return places.located(read_document(path, Settings), (root or Path.cwd()).resolve())
