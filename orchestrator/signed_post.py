"""One signed message to somebody else's server, and what it answered. By the standard library; see api/exchange.py.

Signed as Standard Webhooks defines (standardwebhooks.com): HMAC-SHA256 over id, time and body, in three headers.
Redirects are not followed, proxies not asked. A public host name may lead to an address inside: so what counts is the
address of the connection that was made, before anything is sent on it, unless the settings let it be private.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import os
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from standardwebhooks import Webhook

from configs.errors import InvalidInput, Unavailable
from configs.settings import AddressSettings

TIMEOUT_SECONDS = 10.0
ANSWER_BYTES_MAX = 65_536
"""Bytes of an answer that are read."""
SECRET_PREFIX = "whsec_"
SECRET_BYTES = (24, 64)


@dataclass(frozen=True)
class Answer:
    """What the other server said."""

    status: int
    content: bytes

    @property
    def is_success(self) -> bool:
        """Whether it took the message."""
        return 200 <= self.status < 300


def post(
    to: AddressSettings, message_id: str, message: dict[str, Any], timeout_seconds: float = TIMEOUT_SECONDS
) -> Answer:
    """Send a message once.

    Args:
        message_id: Names the message, at every attempt.
        message: Sent as JSON.
        timeout_seconds: Longest silence of the other server.

    Raises:
        InvalidInput: The secret is missing, or is none; or the address is a private one, and may not be.
        Unavailable: It did not answer, or not in time.
    """
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
    now = datetime.now(tz=UTC)
    headers = {
        "content-type": "application/json",
        "user-agent": "onebasis",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret_of(to)).sign(message_id, now, body),
    }
    place = urlsplit(to.url)
    kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
    try:
        connection = kind(place.hostname or "", place.port, timeout=timeout_seconds)
    except ValueError as error:  # a port that is none
        raise InvalidInput(f"is no address: {error}", to.host, "correct the url in the settings") from error
    began = time.monotonic()
    try:
        connection.connect()
        _refuse_private(connection, to)
        path = f"{place.path or '/'}{'?' if place.query else ''}{place.query}"
        connection.request("POST", path, body.encode(), headers)
        reply = connection.getresponse()
        return Answer(reply.status, reply.read(ANSWER_BYTES_MAX))
    except TimeoutError as error:
        raise Unavailable(f"no answer for {time.monotonic() - began:.0f} s", to.host) from error
    except ssl.SSLCertVerificationError as error:
        raise Unavailable(f"its certificate is not trusted: {error.verify_message}", to.host) from error
    except (OSError, HTTPException, UnicodeError) as error:
        raise Unavailable(f"no answer: {type(error).__name__}", to.host) from error
    finally:
        connection.close()


def secret_of(to: AddressSettings) -> str:
    """The secret that messages to an address are signed with. Never shown, logged or kept.

    Raises:
        InvalidInput: It is missing, or has another form.
    """
    where = f"the environment variable {to.secret_env}" if to.secret_env else f"the file {to.secret_file}"
    try:
        found = os.environ[to.secret_env] if to.secret_env else Path(to.secret_file or "").read_text().strip()
    except (KeyError, OSError, UnicodeDecodeError) as error:
        what = "is not set where the control plane runs" if to.secret_env else f"cannot be read: {type(error).__name__}"
        raise InvalidInput(f"{where} {what}", to.host, "set it; the secret is read at each attempt") from None
    try:
        key = base64.b64decode(found.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    least, most = SECRET_BYTES
    if not found.startswith(SECRET_PREFIX) or not least <= len(key) <= most:
        what = f"{where} does not hold a secret: {SECRET_PREFIX} and {least} to {most} bytes in base64"
        raise InvalidInput(what, to.host, 'make one: echo "whsec_$(openssl rand -base64 32)"')
    return found


def _refuse_private(connection: HTTPConnection, to: AddressSettings) -> None:
    if to.private:
        return
    address = ipaddress.ip_address(connection.sock.getpeername()[0].partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if not address.is_global or address.is_multicast:
        what = "is an address of this machine or of a private network, and nothing was sent there"
        raise InvalidInput(what, to.host, "if it is meant, write private: true beside its url")
