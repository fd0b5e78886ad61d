"""Storage in an S3 bucket, Amazon's or any server that honours `If-None-Match: *`. The only file with boto3.

Credentials come from boto3's usual chain (environment, profile, instance role), never from settings. The object
holds an address; the connection is made at first use and left behind when the object travels to another process.
"""

from __future__ import annotations

import threading
import time
from typing import Any, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from configs.errors import InvalidInput, NotFound, OnebasisError, Unavailable
from subspace_store.storage import check_key

CONFLICT_TRIES = 5
"""S3 answers 409 when two conditional writes of one key run at once; it asks to try again."""

ABSENT = frozenset({"NoSuchKey", "404"})
TAKEN = frozenset({"PreconditionFailed", "412"})
BUSY = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})
FORBIDDEN = frozenset(
    {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
)
MISADDRESSED = frozenset({"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "InvalidBucketName"})


class S3Storage:
    """Objects below one prefix of one bucket.

    Args:
        url: `s3://BUCKET/PREFIX`; the prefix may be empty.
        endpoint_url: Address of a server that is not Amazon's.
        region: Of the bucket; None asks boto3's chain.
    """

    def __init__(self, url: str, endpoint_url: str | None = None, region: str | None = None) -> None:
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not self.bucket:
            raise InvalidInput("the address names no bucket", url, "write s3://BUCKET/PREFIX")
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.endpoint_url = endpoint_url
        self.region = region
        self._connection: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str, str | None, str | None]]:
        return S3Storage, (self.url, self.endpoint_url, self.region)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def read(self, key: str) -> bytes:
        try:
            answer = self._client().get_object(Bucket=self.bucket, Key=self._name(key))
            content: bytes = answer["Body"].read()
        except (ClientError, BotoCoreError) as error:
            self._refuse(error, key)
        return content

    def write(self, key: str, content: bytes) -> None:
        try:
            self._client().put_object(Bucket=self.bucket, Key=self._name(key), Body=content)
        except (ClientError, BotoCoreError) as error:
            self._refuse(error, key)

    def create(self, key: str, content: bytes) -> bool:
        name = self._name(key)
        for attempt in range(CONFLICT_TRIES):
            try:
                # One small put, never a multipart upload: some servers ignore the condition there.
                self._client().put_object(Bucket=self.bucket, Key=name, Body=content, IfNoneMatch="*")
                return True
            except (ClientError, BotoCoreError) as error:
                code = _code(error)
                if code in TAKEN:
                    return False
                if code not in BUSY:
                    self._refuse(error, key)
            time.sleep(0.05 * 2**attempt)
        raise Unavailable(f"the server answered 409 {CONFLICT_TRIES} times", self._address(key), "try again")

    def keys(self, prefix: str, after: str = "") -> list[str]:
        where = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        start = {"StartAfter": self.prefix + after} if after else {}
        try:
            pages = self._client().get_paginator("list_objects_v2").paginate(**where, **start)
            names = [item["Key"] for page in pages for item in page.get("Contents", [])]
        except (ClientError, BotoCoreError) as error:
            self._refuse(error, prefix)
        # Sorted here too: directory buckets of S3 list in no order and know no StartAfter.
        return sorted(key for name in names if (key := name.removeprefix(self.prefix)) > after)

    def delete(self, key: str) -> None:
        try:
            self._client().delete_object(Bucket=self.bucket, Key=self._name(key))
        except (ClientError, BotoCoreError) as error:
            self._refuse(error, key)

    def _client(self) -> Any:
        with self._lock:
            if self._connection is None:
                # A session of its own: boto3's shared default session is not safe to create clients from in threads.
                self._connection = boto3.session.Session().client(
                    "s3",
                    endpoint_url=self.endpoint_url,
                    region_name=self.region,
                    config=Config(
                        connect_timeout=5,
                        read_timeout=60,
                        retries={"mode": "standard", "total_max_attempts": 3},
                        s3={"addressing_style": "path"} if self.endpoint_url else {},
                    ),
                )
            return self._connection

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _address(self, key: str) -> str:
        at = f" at {self.endpoint_url}" if self.endpoint_url else ""
        return f"s3://{self.bucket}/{self.prefix}{key}{at}"

    def _refuse(self, error: ClientError | BotoCoreError, key: str) -> NoReturn:
        raise _translated(error, self._address(key), self.bucket) from error


def _code(error: ClientError | BotoCoreError) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _translated(error: ClientError | BotoCoreError, where: str, bucket: str) -> OnebasisError:
    """Our error for one of boto3's, by what the reader should do.

    Credentials that ran out or a bucket that vanished are no mistake of the task at hand: they are `Unavailable`, so
    that the work is done once a person has mended them, and the outcome of a write counts as unknown.
    """
    code = _code(error)
    if code in ABSENT:
        return NotFound("no such object", where)
    if code == "NoSuchBucket":
        return Unavailable("there is no such bucket", where, f"create the bucket {bucket!r} or correct storage.url")
    if code in FORBIDDEN:
        return Unavailable(
            f"the server refuses these credentials ({code})",
            where,
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE and the bucket's policy",
        )
    if code in MISADDRESSED:
        return Unavailable(f"the bucket is not at this address ({code})", where, "check storage.region and the url")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return Unavailable("no S3 credentials were found", where, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return Unavailable(f"the object storage did not answer: {error}", where, "check the address, then try again")
