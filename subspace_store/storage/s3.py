"""Storage in an S3 bucket, Amazon's or any server that honours `If-None-Match: *`. The only file with boto3.

Credentials come from boto3's usual chain (environment, profile, instance role), never from settings. The object
holds an address; the connection is made at first use and does not go along when the object is sent to another process.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from configs.errors import (
    Corrupt,
    InvalidInput,
    NotFound,
    NotWritten,
    OnebasisError,
    StoreFull,
    StoreReadOnly,
    Unavailable,
)
from subspace_store.storage.protocol import check_head, check_key

CONFLICT_TRIES = 5
"""Number of attempts: S3 answers 409 when two conditional writes of one key run at once, and asks to try again."""

PART = 8 * 2**20
"""Bytes of one part of a large object, as in Amazon's own tools; S3 takes 5 MiB to 5 GiB, and 10,000 parts."""

THREADS = 8
"""Number of parts of one object that are sent or read at once."""

ALONE = 2 * PART
"""Most bytes that the first request reads; the rest of a larger object is read in parts."""

CUT_TRIES = 3
"""Number of cut (incomplete) answers after which the connection counts as away."""

ABSENT = frozenset({"NoSuchKey", "404"})
BEYOND = frozenset({"InvalidRange", "416"})
TAKEN = frozenset({"PreconditionFailed", "412"})
BUSY = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})
FORBIDDEN = frozenset(
    {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
)
UNREADY = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "500", "502", "503", "504"})
FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage", "507"})
"""Codes of Ceph and MinIO for a quota or a disk that is full."""
READ_ONLY = frozenset({"AccessDenied", "403", "Forbidden", "MethodNotAllowed", "405"})
"""Codes that refuse a write. Reading with the same credentials may be allowed."""
UNPROVEN = frozenset({408, 409, 429})
"""Status codes among the 4xx that do not prove that nothing was stored."""
MISADDRESSED = frozenset({"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "InvalidBucketName"})


class S3Storage:
    """Objects below one prefix of one bucket.

    Args:
        url: `s3://BUCKET/PREFIX`; the prefix may be empty.
        endpoint_url: Address of a server that is not Amazon's.
        region: Region of the bucket; None asks boto3's chain.
        path_style: Whether the bucket stands in the path of requests; None is yes if there is an `endpoint_url`.
        sse: Encryption that every write asks for: `AES256` or `aws:kms`.
        sse_kms_key_id: Key for `aws:kms`; None is the account's own.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        path_style: bool | None = None,
        sse: str | None = None,
        sse_kms_key_id: str | None = None,
    ) -> None:
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not self.bucket:
            raise InvalidInput("the address names no bucket", url, "write s3://BUCKET/PREFIX")
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.endpoint_url = endpoint_url
        self.region = region
        styles = {True: "path", False: "virtual", None: "path" if endpoint_url else "auto"}
        self.addressing_style = styles[path_style]
        encryption = {"ServerSideEncryption": sse, "SSEKMSKeyId": sse_kms_key_id}
        self.encryption = {name: value for name, value in encryption.items() if value}
        # Makes an equal object in another process.
        self._again = functools.partial(
            type(self),
            url,
            endpoint_url=endpoint_url,
            region=region,
            path_style=path_style,
            sse=sse,
            sse_kms_key_id=sse_kms_key_id,
        )
        self._connection: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[functools.partial[S3Storage], tuple[()]]:
        return self._again, ()

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def read(self, key: str) -> bytes:
        return bytes(self._fetch(key, 0, None))

    def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
        return memoryview(self._fetch(key, start, size))

    def write(self, key: str, content: bytes) -> None:
        with self._refusals(key, is_write=True):
            self._client().put_object(Bucket=self.bucket, Key=self._name(key), Body=content, **self.encryption)

    @contextlib.contextmanager
    def stream(self, key: str, head_size: int) -> Iterator[_Upload]:
        upload = _Upload(self, key, head_size)
        try:
            yield upload
        finally:
            upload.close()

    def create(self, key: str, content: bytes) -> bool:
        name = self._name(key)
        with self._refusals(key, is_write=True):
            for attempt in range(CONFLICT_TRIES):
                try:
                    # One small put, never a multipart upload: some servers ignore the condition there.
                    self._client().put_object(
                        Bucket=self.bucket, Key=name, Body=content, IfNoneMatch="*", **self.encryption
                    )
                    return True
                except ClientError as error:
                    code = _code(error)
                    if code in TAKEN:
                        return False
                    if code not in BUSY:
                        raise
                time.sleep(0.05 * 2**attempt)
        raise Unavailable(f"the server answered 409 {CONFLICT_TRIES} times", self._address(key), "try again")

    def keys(self, prefix: str, after: str = "") -> list[str]:
        where = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        start = {"StartAfter": self.prefix + after} if after else {}
        with self._refusals(prefix):
            pages = list(self._client().get_paginator("list_objects_v2").paginate(**where, **start))
            names = [item["Key"] for page in pages for item in page.get("Contents", [])]
            # Every whole answer has this field; boto3 takes one that was cut in its headers for an empty list.
            if not all("IsTruncated" in page for page in pages):
                raise _cut(self._address(prefix))
        # Sorted here too: directory buckets of S3 list in no order and know no StartAfter.
        return sorted(key for name in names if (key := name.removeprefix(self.prefix)) > after)

    def clock(self) -> float:
        with self._refusals(""):
            answer = self._client().list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def delete(self, key: str) -> None:
        with self._refusals(key):
            self._client().delete_object(Bucket=self.bucket, Key=self._name(key))

    def abandon(self, prefix: str, idle_seconds: float = 0.0) -> int:
        where = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        with self._refusals(prefix):
            pages = list(self._client().get_paginator("list_multipart_uploads").paginate(**where))
            if not all("IsTruncated" in page for page in pages):
                raise _cut(self._address(prefix))
            # Checked again here: a server that ignores the prefix also lists uploads of other stores.
            uploads = [u for page in pages for u in page.get("Uploads", []) if u["Key"].startswith(where["Prefix"])]
            uploads = [u for u in uploads if not idle_seconds or self._idle_seconds(u) >= idle_seconds]
            for upload in uploads:
                try:
                    self._client().abort_multipart_upload(
                        Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                except ClientError as error:
                    if _code(error) != "NoSuchUpload":  # its writer ended it meanwhile
                        raise
        return len(uploads)

    def _idle_seconds(self, upload: Mapping[str, Any]) -> float:
        """For how long nothing was added to an upload, by the server's clock and this machine's."""
        where = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        times = [upload["Initiated"]]
        with contextlib.suppress(ClientError):  # its writer ended it meanwhile
            pages = self._client().get_paginator("list_parts").paginate(**where)
            times += [part["LastModified"] for page in pages for part in page.get("Parts", [])]
        return time.time() - max(float(at.timestamp()) for at in times)

    def download(self, key: str, file: BinaryIO, bytes_max: int) -> bool:
        """Write one state of an object to an empty file, however large it is, in pieces as they come.

        Returns:
            False where it has more bytes than that; then nothing is written.

        Raises:
            NotFound, Unavailable: There is no such object; the server is away.
        """
        with self._refusals(key):
            for _ in range(CUT_TRIES):
                answer = self._client().get_object(Bucket=self.bucket, Key=self._name(key))
                if (size := answer["ContentLength"]) > bytes_max:
                    answer["Body"].close()
                    return False
                file.seek(0)
                file.truncate()
                with contextlib.suppress(BotoCoreError):
                    for piece in answer["Body"].iter_chunks(PART):
                        file.write(piece)
                    if file.tell() == size:
                        return True
        raise Unavailable(f"the answer was cut {CUT_TRIES} times", self._address(key), "try again")

    def _fetch(self, key: str, start: int, size: int | None) -> bytes | bytearray:
        """Part of an object: by one request if it is small, else by several at once that all see the same object."""
        with self._refusals(key):
            for _ in range(CONFLICT_TRIES):
                try:
                    return self._ranges(key, start, size)
                except ClientError as error:
                    if _code(error) in BEYOND:
                        return b""
                    if _code(error) not in TAKEN:
                        raise
        raise Unavailable(f"was replaced {CONFLICT_TRIES} times while it was read", self._address(key), "try again")

    def _ranges(self, key: str, start: int, size: int | None) -> bytes | bytearray:
        # At least one byte is asked for, so that an absent object is noticed.
        first, total, etag = self._range(key, start, ALONE if size is None else max(1, min(size, ALONE)))
        end = total if size is None else min(total, start + size)
        if end - start <= len(first):
            return first[: end - start]
        content = bytearray(end - start)
        content[: len(first)] = first

        def fill(begin: int) -> None:
            part, _, _ = self._range(key, begin, min(PART, end - begin), IfMatch=etag)
            content[begin - start : begin - start + len(part)] = part

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, range(start + len(first), end, PART)))
        return content

    def _range(self, key: str, start: int, size: int, **condition: str) -> tuple[bytes, int, str]:
        """The bytes of one range, all that the object has there; the object's size; its ETag."""
        for _ in range(CUT_TRIES):
            answer = self._client().get_object(
                Bucket=self.bucket, Key=self._name(key), Range=f"bytes={start}-{start + size - 1}", **condition
            )
            total = answer.get("ContentRange", "").rpartition("/")[2]
            if not total.isdecimal() and answer["ResponseMetadata"]["HTTPStatusCode"] == 206:
                continue  # cut in its headers
            if not total.isdecimal():
                raise Unavailable("the server does not answer ranges", self._address(key), "use another S3 server")
            # boto3 asks again for an answer that does not come, but not for one that is cut.
            with contextlib.suppress(BotoCoreError):
                content: bytes = answer["Body"].read()
                if len(content) == min(size, int(total) - start):
                    return content, int(total), answer["ETag"]
        raise Unavailable(f"the answer was cut {CUT_TRIES} times", self._address(key), "try again")

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
                        max_pool_connections=4 * THREADS,
                        # Every body goes with its sha256 in the signature, over https too, and the server compares.
                        # The newer checksums that boto3 would add by default change how a body is framed, which
                        # servers before 2025 (Ceph 16) store or refuse, and double the work.
                        request_checksum_calculation="when_required",
                        response_checksum_validation="when_required",
                        s3={
                            "addressing_style": self.addressing_style,
                            "payload_signing_enabled": True,
                        },
                    ),
                )
            return self._connection

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _address(self, key: str) -> str:
        at = f" at {self.endpoint_url}" if self.endpoint_url else ""
        return f"s3://{self.bucket}/{self.prefix}{key}{at}"

    @contextlib.contextmanager
    def _refusals(self, key: str, is_write: bool = False) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError) as error:
            told = _translated(error, self._address(key), self.bucket)
            raise (_as_refused(told, error) if is_write else told) from error
        except (KeyError, ValueError) as error:
            # boto3 takes an answer that was cut in its headers for whole: a field is missing, or half a date or number.
            raise _cut(self._address(key)) from error


class _Upload:
    """The upload of one object: by one put if it is small, else in parts that are sent while more is appended.

    The parts that hold the head are kept until `finish`. Besides them, memory holds at most THREADS parts that are
    being sent and one that is being filled.
    """

    def __init__(self, storage: S3Storage, key: str, head_size: int) -> None:
        self.storage, self.key, self.head_size = storage, key, head_size
        self.target = {"Bucket": storage.bucket, "Key": storage._name(key)}
        self.size = head_size
        self.kept = bytearray(head_size)
        self.kept_parts = max(1, -(-head_size // PART))
        self.filled = bytearray()
        self.upload_id = ""
        self.parts: dict[int, Future[str]] = {}
        self.travelling: set[Future[str]] = set()
        self.pool = ThreadPoolExecutor(THREADS)

    def append(self, content: bytes | memoryview) -> None:
        rest = memoryview(content).cast("B")
        self.size += len(rest)
        while rest:
            room = self.kept_parts * PART - len(self.kept)
            taken = rest[: room or PART - len(self.filled)]
            if room:
                self.kept += taken
            else:
                self.filled += taken
            rest = rest[len(taken) :]
            if len(self.filled) == PART:
                self._send_filled()

    def finish(self, head: bytes) -> None:
        self.kept[: self.head_size] = check_head(head, self.head_size)
        if self.size <= PART:
            self.storage.write(self.key, bytes(self.kept))
            return
        if self.filled:
            self._send_filled()
        for number in range(self.kept_parts):
            if part := self.kept[number * PART : (number + 1) * PART]:
                self._send(number + 1, part)
        with self.storage._refusals(self.key, is_write=True):
            self._complete()
        with self.storage._refusals(self.key):
            stored = self.storage._client().head_object(**self.target)["ContentLength"]
        if stored != self.size:
            where = self.storage._address(self.key)
            raise Corrupt(f"has {stored} bytes after {self.size} were written", where, "look at the server's disks")

    def close(self) -> None:
        # A part that arrives after the end of its upload would stay for ever, so those on their way are waited for.
        self.pool.shutdown(cancel_futures=True)
        if self.upload_id:
            with contextlib.suppress(ClientError, BotoCoreError):
                self.storage._client().abort_multipart_upload(**self.target, UploadId=self.upload_id)

    def _send_filled(self) -> None:
        self._send(self.kept_parts + len(self.parts) + 1, self.filled)
        self.filled = bytearray()

    def _send(self, number: int, part: bytearray) -> None:
        with self.storage._refusals(self.key, is_write=True):
            if not self.upload_id:
                answer = self.storage._client().create_multipart_upload(**self.target, **self.storage.encryption)
                self.upload_id = answer["UploadId"]
            while len(self.travelling) == THREADS:
                done, self.travelling = wait(self.travelling, return_when=FIRST_COMPLETED)
                for arrived in done:
                    arrived.result()  # raises what went wrong
        self.parts[number] = self.pool.submit(self._put, number, part)
        self.travelling.add(self.parts[number])

    def _put(self, number: int, part: bytearray) -> str:
        answer = self.storage._client().upload_part(
            **self.target, UploadId=self.upload_id, PartNumber=number, Body=part
        )
        return str(answer["ETag"])

    def _complete(self) -> None:
        parts = [{"PartNumber": number, "ETag": self.parts[number].result()} for number in sorted(self.parts)]
        try:
            self.storage._client().complete_multipart_upload(
                **self.target, UploadId=self.upload_id, MultipartUpload={"Parts": parts}
            )
        except ClientError as error:
            # boto3 asks again when the reply was lost, and then the upload is over: is the object there?
            if _code(error) != "NoSuchUpload" or self.key not in self.storage.keys(self.key):
                raise
        self.upload_id = ""


def _cut(where: str) -> Unavailable:
    return Unavailable("the answer was cut", where, "try again")


def _code(error: ClientError | BotoCoreError) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _as_refused(told: OnebasisError, error: ClientError | BotoCoreError) -> OnebasisError:
    """Our error for a write: where it is certain that nothing was stored, one that says so."""
    code = _code(error)
    if not isinstance(told, Unavailable) or not _is_certain(error, code):
        return told
    if code in FULL:
        todo = "make space there, or raise the quota; then ask again"
        return StoreFull(f"the server has no space left ({code})", told.where, todo)
    if code in READ_ONLY:
        todo = f"let these credentials write there (s3:PutObject); {told.todo}"
        return StoreReadOnly(f"the server refuses these credentials to write ({code})", told.where, todo)
    return NotWritten(told.what, told.where, told.todo)


def _is_certain(error: ClientError | BotoCoreError, code: str) -> bool:
    """Whether a write with this error has certainly stored nothing and will not later: the server refused the first
    request that was sent for it, or none was sent."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return True
    facts = error.response.get("ResponseMetadata", {}) if isinstance(error, ClientError) else {}
    if not code or code in UNREADY or code in BUSY or facts.get("RetryAttempts", 0):
        return False
    status = facts.get("HTTPStatusCode", 400)
    return code in FULL or (400 <= status < 500 and status not in UNPROVEN)


def _translated(error: ClientError | BotoCoreError, where: str, bucket: str) -> OnebasisError:
    """Our error for one of boto3's, by what the reader should do.

    Expired credentials or a missing bucket are not a mistake in the task: they are `Unavailable`, so that the work is
    done once a person has corrected them, and the outcome of a write counts as unknown.
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
    if code in UNREADY:
        return Unavailable(f"the server is busy or broken: {error}", where, "try again later")
    if code:
        return Unavailable(f"the server refuses: {error}", where, "check the section storage of the settings")
    return Unavailable(f"the object storage did not answer: {error}", where, "check the address, then try again")
