"""A file from a stranger's server: https only, from public addresses only, within a time and a size.

Addresses are typed by people and followed by redirects, so a server must not be able to make this machine ask its own
network (server-side request forgery): every address that a name stands for is checked, and the connection goes to one
of those that were checked, not to what the name stands for a moment later. Proxies are not used: they would resolve the
name once more.
"""

from __future__ import annotations

import io
import socket
import ssl
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Thread
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from .sentences import one_line

PATIENCE = 20  # seconds in all, from the first name to the last byte
MOST_REDIRECTS = 5
PIECE = 65536  # bytes
REDIRECTS = {301, 302, 303, 307, 308}
NAT64 = ip_network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address
GLOBAL_UNICAST = ip_network("2000::/3")  # RFC 4291: all IPv6 addresses that are given out for the internet


def download(address: str, largest: int) -> bytes:
    """What lies at an https address.

    Args:
        address: may hold spaces and letters of any script; redirects are followed.
        largest: bytes; what is larger is refused.
    Raises:
        ValueError: whatever is wrong, in one sentence: no https address, a private one, a server that can't be reached,
            takes too long, says nonsense, or sends too much.
    """
    deadline = Deadline(time.monotonic() + PATIENCE)
    visited = address.strip()
    try:
        for _ in range(MOST_REDIRECTS + 1):
            place = Place.of(visited)
            with place.connected(deadline) as connection:
                answer = asked(connection, place, deadline)
                if answer.status not in REDIRECTS:
                    return content(answer, largest)
                visited = urljoin(visited, answer.getheader("Location", ""))
        raise Refused(f"it is redirected more than {MOST_REDIRECTS} times")
    except TimeoutError:
        reason = f"it takes more than {PATIENCE} seconds"
    except ssl.SSLCertVerificationError as error:
        reason = f"its certificate can't be trusted ({error.verify_message})"
    except Refused as error:
        reason = str(error)
    except (HTTPException, ValueError) as error:  # Python's ways of saying that an answer is no HTTP
        reason = f"the server's answer can't be understood ({type(error).__name__})"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    by_way = "" if visited == address.strip() else f", redirected to {one_line(visited, 200)}"
    raise ValueError(f"{one_line(address, 200)} can't be fetched{by_way}: {reason}")


class Refused(Exception):
    """A reason of ours, as the end of a sentence."""


@dataclass
class Deadline:
    """A moment that everything together must keep to: a server that sends a byte a second never runs into a timeout."""

    moment: float

    def left(self) -> float:
        """Seconds, more than zero.

        Raises:
            TimeoutError: it has passed.
        """
        left = self.moment - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


@dataclass
class Place:
    """Where an address leads."""

    host: str
    port: int
    path: str  # with the query, percent-encoded

    @classmethod
    def of(cls, address: str) -> Place:
        try:
            parts = urlsplit(address)
            host, port = (parts.hostname or "").encode("idna").decode(), parts.port or 443
        except ValueError as error:  # UnicodeError is one
            raise Refused(f"it is no address ({type(error).__name__})") from error
        if parts.scheme != "https":
            raise Refused("it is not an https address; only those are opened")
        if not host or not host.replace(".", "").replace("-", "").replace("_", "").replace(":", "").isalnum():
            raise Refused("it names no server")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (parts.query and "?")
        return cls(host, port, path + quote(parts.query, safe="/%:@!$&'()*+,;=~?"))

    def connected(self, deadline: Deadline) -> ssl.SSLSocket:
        """An encrypted connection to the first of the server's addresses that answers.

        Raises:
            Refused: one of them is not public.
        """
        found = resolved(self.host, self.port, deadline)
        for *_, where in found:
            if not is_public(where[0]):
                raise Refused(f"{self.host} is at {where[0]}, which is not an address of the public internet")
        failure: OSError = ConnectionError()
        for later, (family, kind, protocol, _, where) in zip(range(len(found) - 1, -1, -1), found, strict=True):
            plain = socket.socket(family, kind, protocol)
            try:
                plain.settimeout(deadline.left() / (1 + later))  # one that is silent leaves time for the others
                plain.connect(where)
                return ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
            except OSError as error:
                plain.close()
                failure = error
        raise failure


def resolved(host: str, port: int, deadline: Deadline) -> list[Any]:
    """The answers of the system's resolver, which can't be told to hurry: a thread waits for it, and is left behind."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            found.append(None)

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(deadline.left())
    if not found:
        raise TimeoutError
    if not found[0]:
        raise Refused(f"no server {host} is known")
    return found[0]


def is_public(address: str) -> bool:
    """Is it of the internet: not this machine, its network, a cloud's metadata, nor one of those wrapped in IPv6?"""
    number = ip_address(address.partition("%")[0])
    if isinstance(number, IPv4Address):
        return number.is_global and not number.is_multicast
    wrapped = ipv4_within(number)
    if wrapped is not None:
        return is_public(str(wrapped))
    return number in GLOBAL_UNICAST and number.is_global


def ipv4_within(number: IPv6Address) -> IPv4Address | None:
    if number in NAT64:
        return IPv4Address(int(number) & 0xFFFFFFFF)
    return number.ipv4_mapped or number.sixtofour or (number.teredo and number.teredo[1]) or None


class Punctual(io.RawIOBase):
    """The bytes of a connection; every wait for some of them is as long as the deadline allows."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self.connection, self.deadline = connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(self.deadline.left())
        return self.connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:  # all that HTTPResponse asks of a socket
        return io.BufferedReader(self)


def asked(connection: socket.socket, place: Place, deadline: Deadline) -> HTTPResponse:
    host = f"[{place.host}]" if ":" in place.host else place.host
    lines = (
        f"GET {place.path} HTTP/1.1",
        f"Host: {host}" if place.port == 443 else f"Host: {host}:{place.port}",
        "User-Agent: libragrad-minimal",  # some servers demand a name
        "Accept: image/*",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    connection.settimeout(deadline.left())
    connection.sendall("\r\n".join((*lines, "", "")).encode("ascii"))
    answer = HTTPResponse(Punctual(connection, deadline), method="GET")  # type: ignore[arg-type]
    answer.begin()
    return answer


def content(answer: HTTPResponse, largest: int) -> bytes:
    if answer.status != 200:
        known = {status.value: status.phrase for status in HTTPStatus}  # the server's own words may be anything
        raise Refused(f"the server answered {answer.status} {known.get(answer.status, '')}".strip())
    too_large = Refused(f"it is larger than {largest // 1_000_000} MB; make it smaller first")
    if (answer.length or 0) > largest:
        raise too_large
    pieces = bytearray()
    while piece := answer.read(PIECE):
        pieces += piece
        if len(pieces) > largest:
            raise too_large
    if answer.length:  # bytes that were announced and never came
        raise Refused("the server stopped in the middle")
    return bytes(pieces)
