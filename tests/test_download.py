"""Addresses from people: the bytes that lie there, or one sentence; never a request to this machine's own network."""

import random
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial

import pytest

from libragrad_minimal import download as downloading
from libragrad_minimal.download import download, is_public

LARGEST = 1_000_000


class Unencrypted:
    """In place of an SSL context: the tests' server speaks plainly."""

    def wrap_socket(self, plain: socket.socket, server_hostname: str) -> socket.socket:
        return plain


class Server:
    """Answers every connection by `answer(connection, request)`, and notes the requests."""

    def __init__(self, answer, encryption: ssl.SSLContext | None = None) -> None:
        self.answer, self.requests, self.encryption = answer, [], encryption
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def stop(self) -> None:
        with suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)  # Linux goes on accepting while a thread waits for it
        self.listening.close()

    def serve(self) -> None:
        with suppress(OSError):  # the test is over
            while True:
                connection, _ = self.listening.accept()
                threading.Thread(target=self.converse, args=(connection,), daemon=True).start()

    def converse(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if self.encryption is not None:
                connection = self.encryption.wrap_socket(connection, server_side=True)
            request = b""
            while not request.endswith(b"\r\n\r\n") and (part := connection.recv(65536)):
                request += part
            self.requests.append(request.decode("latin-1"))
            self.answer(connection, request)


@pytest.fixture
def serve(monkeypatch):
    """Starts a server by what it answers: bytes or a function; https://pictures.example is then where it is."""
    servers = []
    monkeypatch.setattr(ssl, "create_default_context", Unencrypted)
    monkeypatch.setattr(downloading, "is_public", lambda address: True)

    def start(answer) -> Server:
        if isinstance(answer, bytes):
            content, answer = answer, lambda connection, request: connection.sendall(content)
        servers.append(server := Server(answer))
        here = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: here)
        return server

    yield start
    for server in servers:
        server.stop()


def ok(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode("latin-1") + body


def refusal(address: str = "https://pictures.example/cat.png") -> str:
    """The one sentence about an address."""
    with pytest.raises(ValueError) as caught:
        download(address, LARGEST)
    text = str(caught.value)
    assert type(caught.value) is ValueError and "can't be fetched" in text
    assert text.isprintable() and len(text) < 600
    return text


# ---- what lies there -------------------------------------------------------------------------------------------------

CHUNKED = b"3\r\ncat\r\n9;note=x\r\n pictures\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"cat pictures"),
        ok(b"cat pictures", "Content-Length: 12"),
        ok(b"cat pictures and more", "Content-Length: 12"),
        ok(CHUNKED, "Transfer-Encoding: chunked"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + ok(b"cat pictures"),
        b"HTTP/1.0 200\r\n\r\ncat pictures",
        ok(b"cat pictures", "X-Odd: \xe9\xff", "no colon here", "Content-Length: many"),
    ],
)
def test_what_lies_there(serve, answer):
    serve(answer)
    assert download("https://pictures.example/cat.png", LARGEST) == b"cat pictures"


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("https://pictures.example", "/"),
        ("  https://pictures.example/my cat.png\n", "/my%20cat.png"),
        ("https://pictures.example/a%20b?c=d e&f=%41#part", "/a%20b?c=d%20e&f=%41"),
        ("https://pictures.example/Kätzchen", "/K%C3%A4tzchen"),
        ("https://user:secret@pictures.example/a", "/a"),
    ],
)
def test_how_an_address_is_asked_for(serve, address, asked):
    server = serve(ok(b"cat"))
    assert download(address, LARGEST) == b"cat"
    (request,) = server.requests
    assert request.startswith(f"GET {asked} HTTP/1.1\r\nHost: pictures.example\r\n")
    assert request.isascii() and "secret" not in request


def test_an_address_adds_no_lines_to_the_request(serve):
    server = serve(ok(b"cat"))
    download("https://pictures.example/a\r\nX-Evil: 1\r\n\r\nGET /b", LARGEST)
    (request,) = server.requests
    assert request.count("\r\n") == 7 and "\r\nX-Evil" not in request


def test_redirects_are_followed(serve):
    places = {b"/a": "Location: /b", b"/b": "Location: https://other.example/c"}

    def answer(connection, request):
        path = request.split()[1]
        if path in places:
            connection.sendall(f"HTTP/1.1 302 Found\r\n{places[path]}\r\n\r\n".encode())
        else:
            connection.sendall(ok(b"cat"))

    server = serve(answer)
    assert download("https://pictures.example/a", LARGEST) == b"cat"
    assert [request.split()[1] for request in server.requests] == ["/a", "/b", "/c"]
    assert "Host: other.example\r\n" in server.requests[2]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://pictures.example/a", "not an https address"),
        ("file:///etc/passwd", "not an https address"),
        ("https://", "names no server"),
        ("https:///a", "names no server"),
        ("https://two words/a", "names no server"),
        ("https://a..b/", "no address"),
        ("https://[::1/", "no address"),
        ("https://[fe80::1%25eth0]/", "n"),
        ("https://pictures.example:port/", "no address"),
        ("https://pictures.example:99999/", "no address"),
        (f"https://{'a' * 70}.example/", "no address"),
        ("https://x/\x1b[31m" + 1000 * "a", "known"),
    ],
)
def test_addresses_that_are_none(monkeypatch, address, reason):
    def unknown(host, port, type):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert reason in refusal(address)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "can't be understood"),
        (b"\r\n\r\n", "can't be understood"),
        (b"cat pictures\r\n\r\n", "can't be understood"),
        (b"HTTP/1.1 abc OK\r\n\r\n", "can't be understood"),
        (b"HTTP/1.1 99 Low\r\n\r\n", "can't be understood"),
        (b"HTTP/1.1 " + 70_000 * b"2", "can't be understood"),
        (ok(b"", *[f"X-{i}: x" for i in range(200)]), "can't be understood"),
        (ok(b"", "X: " + 70_000 * "x"), "can't be understood"),
        (ok(b"zz\r\ncat\r\n", "Transfer-Encoding: chunked"), "can't be understood"),
        (ok(b"-5\r\ncat\r\n", "Transfer-Encoding: chunked"), "can't be understood"),
        (ok(b"9\r\ncat", "Transfer-Encoding: chunked"), "can't be understood"),
        (ok(b"cat", "Content-Length: 12"), "stopped in the middle"),
        (ok(b"", "Content-Length: 1000001"), "larger than 1 MB"),
        (ok(bytes(LARGEST + 1)), "larger than 1 MB"),
        (b"HTTP/1.1 404 \x1b[31mgone\r\n\r\n", "the server answered 404 Not Found"),
        (b"HTTP/1.1 799 Odd\r\n\r\n", "the server answered 799"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "more than 5 times"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://pictures.example/\r\n\r\n", "redirected to http.*not an https"),
        (b"HTTP/1.1 302 Found\r\nLocation: https://[/\r\n\r\n", "can't be understood"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "redirected to file.*not an https"),
    ],
)
def test_answers_that_are_none(serve, answer, reason):
    serve(answer)
    assert re.search(reason, refusal())


def test_a_server_that_hangs_up(serve):
    def answer(connection, request):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end

    serve(answer)
    assert "Connection reset" in refusal()


def test_nobody_listens(serve):
    serve(ok(b"cat")).stop()
    assert "refused" in refusal()


# ---- time ------------------------------------------------------------------------------------------------------------


def dripping(first: bytes, connection, request) -> None:
    """A byte at a time, none late enough for a timeout of its own."""
    connection.sendall(first)
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "answer",
    [
        lambda connection, request: time.sleep(30),
        partial(dripping, b""),
        partial(dripping, b"HTTP/1.1 200 OK\r\nX: "),
        partial(dripping, ok(b"")),
        partial(dripping, ok(b"", "Content-Length: 1000")),
        partial(dripping, ok(b"FFF\r\n", "Transfer-Encoding: chunked")),
    ],
    ids=["silence", "status", "header", "content", "length", "chunk"],
)
def test_slow_servers(serve, monkeypatch, answer):
    monkeypatch.setattr(downloading, "PATIENCE", 0.4)
    serve(answer)
    started = time.monotonic()
    assert "takes more than" in refusal()
    assert time.monotonic() - started < 2


def test_a_slow_resolver(monkeypatch):
    monkeypatch.setattr(downloading, "PATIENCE", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: time.sleep(5))
    started = time.monotonic()
    assert "takes more than" in refusal()
    assert time.monotonic() - started < 2


# ---- encryption ------------------------------------------------------------------------------------------------------


@pytest.fixture
def encrypted(monkeypatch, tmp_path):
    """The path of a certificate that vouches for https://pictures.example, which is here."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is absent")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ("-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example")
    files = ("-keyout", key, "-out", certificate)
    make = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files)
    subprocess.run(make, check=True, capture_output=True)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)

    server = Server(lambda connection, request: connection.sendall(ok(b"cat")), theirs)
    here = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port))]
    monkeypatch.setattr(downloading, "is_public", lambda address: True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: here)
    yield certificate
    server.stop()


def test_a_certificate_must_be_trusted_and_the_servers_own(encrypted, monkeypatch):
    assert "its certificate can't be trusted" in refusal()
    trusting = partial(ssl.create_default_context, cafile=encrypted)
    monkeypatch.setattr(ssl, "create_default_context", trusting)
    assert download("https://pictures.example/cat.png", LARGEST) == b"cat"
    assert "its certificate can't be trusted" in refusal("https://other.example/cat.png")


def test_a_server_that_speaks_plainly(monkeypatch):
    server = Server(lambda connection, request: None)
    here = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port))]
    monkeypatch.setattr(downloading, "is_public", lambda address: True)
    monkeypatch.setattr(downloading, "PATIENCE", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: here)
    assert "takes more than" in refusal()  # neither side understands the other's greeting


# ---- this machine's own network --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    """
    127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.1 192.0.2.1
    198.18.0.1 203.0.113.5 224.0.0.251 239.1.1.1 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:a9fe:a9fe fe80::1 fe80::1%eth0 fec0::1 fc00::1
    fd12::1 ff02::1 2001:db8::1 2002:7f00:1:: 2002:a00:1::1 64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b:1::1 100::1
    2001:0:4136:e378:8000:63bf:f5ff:fffe
    """.split(),
)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    "1.1.1.1 93.184.216.34 2606:4700::1111 2a00:1450:4001::1 ::ffff:1.1.1.1 64:ff9b::1.1.1.1 2002:101:101::".split(),
)
def test_public_addresses(address):
    assert is_public(address)


def known_as(monkeypatch, *numbers: str) -> list[str]:
    """Every name stands for these numbers; returns what is connected to."""
    connected: list[str] = []

    class Silent(socket.socket):
        def connect(self, where) -> None:
            connected.append(where[0])
            raise ConnectionRefusedError(111, "Connection refused")

    families = [socket.AF_INET6 if ":" in number else socket.AF_INET for number in numbers]
    found = [(family, socket.SOCK_STREAM, 0, "", (n, 443)) for family, n in zip(families, numbers, strict=True)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: found)
    monkeypatch.setattr(socket, "socket", Silent)
    return connected


@pytest.mark.parametrize(
    "numbers", [("10.0.0.1",), ("1.1.1.1", "10.0.0.1"), ("2606:4700::1111", "::1"), ("fe80::1%lo",)]
)
def test_a_name_that_stands_for_a_private_address(monkeypatch, numbers):
    connected = known_as(monkeypatch, *numbers)
    assert f"at {numbers[-1]}, which is not an address of the public internet" in refusal()
    assert connected == []


def test_only_what_was_checked_is_connected_to(monkeypatch):
    """A name that stands for something else when it is asked a second time (DNS rebinding) gains nothing."""
    connected = known_as(monkeypatch, "2606:4700::1111", "1.1.1.1")
    answers, looked_up = [socket.getaddrinfo("a", 443, type=0)], []

    def once(host, port, type):
        looked_up.append(host)
        return answers.pop()

    monkeypatch.setattr(socket, "getaddrinfo", once)
    assert "Connection refused" in refusal()
    assert connected == ["2606:4700::1111", "1.1.1.1"] and looked_up == ["pictures.example"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_this_machine_by_any_name(host):
    """By the system's own resolver, which understands the odder ones or doesn't."""
    text = refusal(f"https://{host}/")
    assert "not an address of the public internet" in text or "no server" in text


def test_a_redirect_to_a_private_address(serve, monkeypatch):
    server = serve(b"HTTP/1.1 302 Found\r\nLocation: https://169.254.169.254/latest/meta-data\r\n\r\n")
    there = socket.getaddrinfo("", 443, type=0)

    def resolve(host, port, type):
        inside = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port))]
        return inside if host == "169.254.169.254" else there

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(downloading, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    text = refusal()
    assert "redirected to https://169.254.169.254/" in text and "public internet" in text
    assert len(server.requests) == 1


# ---- nonsense --------------------------------------------------------------------------------------------------------


def test_nonsense_gets_one_sentence(serve):
    """Damaged answers and addresses: bytes, or one sentence."""
    rng = random.Random(0)
    whole = [
        ok(b"cat pictures", "Content-Length: 12", "Content-Type: image/png"),
        ok(CHUNKED, "Transfer-Encoding: chunked"),
        b"HTTP/1.1 301 Moved\r\nLocation: /elsewhere\r\n\r\n",
    ]
    answers: list[bytes] = []

    def answer(connection, request):
        connection.sendall(answers[-1])

    serve(answer)
    for _ in range(200):
        damaged = bytearray(rng.choice(whole))
        for _ in range(rng.choice((1, 2, 8))):
            place = rng.randrange(len(damaged))
            damaged[place : place + rng.randrange(4)] = rng.choice(
                (b"", b"\r\n", b"\0", b"\xff", b" ", b"9", b"-", b":")
            )
        answers.append(bytes(damaged))
        address = list("https://pictures.example/cat.png?a=b")
        for _ in range(rng.choice((0, 0, 1, 3))):
            address[rng.randrange(8, len(address))] = rng.choice("[]@:#%\\ \n\t\0é\u202e\ud800/?.")
        try:
            assert isinstance(download("".join(address), LARGEST), bytes)
        except ValueError:
            refusal("".join(address))
