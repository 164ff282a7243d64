"""Where users' URLs may lead, and that a hostile server costs no more than its time and bytes."""

from __future__ import annotations

import datetime
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from app.security.egress import Egress, Refused, Rule, TooLarge, check_headers, is_public
from models.errors import Unreachable
from models.pipeline import Response
from tests.unit.http_server import Asked, Exchange, serving

SECRET = "s3cret-t0ken"
_dialled: list[object] = []


def _record(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.connect":
        _dialled.append(args[1])


sys.addaudithook(_record)


@pytest.fixture
def dialled() -> Iterator[list[object]]:
    """Every address that a socket of this process connects to during the test."""
    _dialled.clear()
    yield _dialled
    _dialled.clear()


def post(egress: Egress, url: str, body: bytes = b"x", **headers: str) -> Response:
    return egress.post(url, body, headers, timeout_s=5, max_bytes=2**20)


def echo(exchange: Exchange, asked: Asked) -> None:
    exchange.say(200, asked.body)


#: Names of the outside that lead inside.
NAMES = {
    "metadata.example": ["169.254.169.254"],
    "inside.example": ["10.1.2.3"],
    "half.example": ["93.184.216.34", "192.168.0.1"],
    "both.example": ["10.9.9.9", "93.184.216.34"],
    "six.example": ["2606:2800:220:1::1", "fd00::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "zone.example": ["fe80::1%lo"],
    "good.example": ["93.184.216.34"],
    "xn--bcher-kva.example": ["10.0.0.9"],
    "localhost": ["::1", "127.0.0.1"],
    "internal": ["10.0.0.8"],
}

REFUSED_URLS = (
    # other schemes, and what is no URL
    "ftp://good.example/", "file:///etc/passwd", "gopher://127.0.0.1:6379/_x", "//good.example/", "good.example",
    "", "https://", "https:///path", "https://:443/", "https://[::1", "https://good.example:99999/",
    "https://good.example:x/", "http://good.example/", "https://good.example:22/", "https://good.example:80/",
    # userinfo, and what makes parsers disagree
    "https://user@good.example/", "https://user:pw@good.example/", "https://good.example@127.0.0.1/",
    "https://good.example\\@127.0.0.1/", "https://127.0.0.1\\.good.example/", "https://good.example\t/",
    "https://good.example/a b", "https://good.example/\r\nHost: x", " https://good.example/", "https://good.example%2f/",
    "https://good.example\x00.example/", "https://good%2eexample/", "https://good_.-example/",
    # loopback and other addresses that are not public
    "https://127.0.0.1/", "https://127.8.9.10/", "https://0.0.0.0/", "https://10.0.0.1/", "https://172.16.0.1/",
    "https://192.168.1.1/", "https://169.254.169.254/latest/meta-data/", "https://100.64.0.1/", "https://224.0.0.1/",
    "https://255.255.255.255/", "https://192.0.0.192/", "https://198.18.0.1/", "https://[::1]/", "https://[::]/",
    "https://[fe80::1]/", "https://[fe80::1%25lo]/", "https://[fd00:ec2::254]/", "https://[ff02::1]/",
    # IPv4 in IPv6
    "https://[::ffff:127.0.0.1]/", "https://[::ffff:a00:1]/", "https://[::127.0.0.1]/", "https://[2002:7f00:1::]/",
    "https://[64:ff9b::7f00:1]/", "https://[64:ff9b:1::a00:1]/", "https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    # odd numeric forms
    "https://2130706433/", "https://0x7f000001/", "https://017700000001/", "https://127.1/", "https://0177.0.0.1/",
    "https://0x7f.1/", "https://127.0.0.1./", "https://127.0.0.01/", "https://\uff11\uff12\uff17.0.0.1/",
    "https://127\u30020\u30020\u30021/", "https://1.2.3.4.5/", "https://\u2460\u2461\u2466.0.0.1/",
    # names that lead inside
    "https://localhost/", "https://LOCALHOST./", "https://internal/", "https://metadata.example/",
    "https://inside.example/", "https://half.example/", "https://six.example/", "https://mapped.example/",
    "https://zone.example/", "https://b\u00fccher.example/",
)  # fmt: skip


def names(host: str, port: int) -> Sequence[str]:
    if host not in NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")
    return NAMES[host]


@pytest.mark.parametrize("url", REFUSED_URLS, ids=[f"url{at}" for at in range(len(REFUSED_URLS))])
def test_a_url_that_leads_inside_is_refused_before_any_socket_is_dialled(
    url: str, dialled: list[object]
) -> None:
    egress = Egress(resolver=names)
    with pytest.raises(Refused) as refused:
        post(egress, url, Authorization=SECRET)
    assert not dialled
    assert not refused.value.sent
    assert not refused.value.retryable
    assert SECRET not in refused.value.detail
    with pytest.raises(Refused):
        egress.check(url)


@pytest.mark.parametrize("host", ["inside.example", "half.example", "six.example"])
def test_a_refusal_does_not_tell_the_private_address_behind_a_name(host: str) -> None:
    with pytest.raises(Refused) as refused:
        Egress(resolver=names).check(f"https://{host}/")
    assert not any(address in refused.value.detail for address in NAMES[host])


@pytest.mark.parametrize(
    "url",
    ["https://good.example/", "https://GOOD.example.:8443/x?y=z#f", "https://93.184.216.34/",
     "https://[2606:4700:4700::1111]/", "https://[64:ff9b::808:808]/"],
)  # fmt: skip
def test_a_public_url_passes_the_check_at_registration(url: str) -> None:
    Egress(resolver=names).check(url)


def test_a_name_that_turns_private_at_the_second_look_up_is_never_dialled(dialled: list[object]) -> None:
    answers = iter([["93.184.216.34"], ["127.0.0.1"], ["10.0.0.1"]])
    egress = Egress(resolver=lambda host, port: next(answers))
    egress.check("https://rebinding.example/")
    for _ in range(2):
        with pytest.raises(Refused):
            post(egress, "https://rebinding.example/")
    assert not dialled


def test_what_is_dialled_is_the_address_that_was_checked(dialled: list[object]) -> None:
    looked_up = []

    def alternating(host: str, port: int) -> list[str]:
        looked_up.append(host)
        return ["127.0.0.1"] if len(looked_up) % 2 else ["127.0.0.2"]

    with serving(echo) as server:
        egress = Egress([f"127.0.0.1:{server.port}"], resolver=alternating)
        assert post(egress, f"http://turning.example:{server.port}/").status == 200
        with pytest.raises(Refused):  # 127.0.0.2 is not allowed, and the open connection is no way round
            post(egress, f"http://turning.example:{server.port}/")
    assert looked_up == ["turning.example"] * 2
    assert dialled == [("127.0.0.1", server.port)]


def test_an_open_connection_is_not_used_when_the_name_has_moved() -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.9"]])
    with serving(echo) as server:
        egress = Egress(["127.0.0.0/8"], resolver=lambda host, port: next(answers))
        post(egress, f"http://moving.example:{server.port}/")
        with pytest.raises(Unreachable, match="cannot be reached"):  # nobody listens there
            post(egress, f"http://moving.example:{server.port}/")
        assert server.connections == 1


@pytest.mark.parametrize(
    ("address", "expected"),
    [("8.8.8.8", True), ("192.0.1.1", True), ("192.88.100.1", True), ("2001:4860:4860::8888", True),
     ("2606:4700::1", True), ("64:ff9b::808:808", True),
     ("0.1.2.3", False), ("10.255.0.1", False), ("100.127.255.254", False), ("127.0.0.1", False),
     ("169.254.1.1", False), ("172.31.0.1", False), ("192.0.0.8", False), ("192.0.0.100", False),
     ("192.0.2.1", False), ("192.88.99.1", False), ("192.168.0.1", False), ("198.19.255.255", False),
     ("198.51.100.1", False), ("203.0.113.1", False), ("224.0.0.251", False), ("239.1.1.1", False),
     ("240.0.0.1", False), ("::", False), ("::1", False), ("::808:808", False), ("64:ff9b::a00:1", False),
     ("64:ff9b::e000:1", False), ("64:ff9b:1::808:808", False), ("100::1", False), ("2001::1", False),
     ("2001:2::1", False), ("2001:20::1", False), ("2001:db8::1", False), ("2002:808:808::1", False),
     ("3fff::1", False), ("5f00::1", False), ("fc00::1", False), ("fec0::1", False), ("ff0e::1", False)],
)  # fmt: skip
def test_addresses_are_public_as_the_iana_registries_say(address: str, expected: bool) -> None:
    assert is_public(ip_address(address)) is expected


@pytest.mark.parametrize(
    ("rule", "url", "allowed"),
    [("127.0.0.1", "http://127.0.0.1:9/", True), ("127.0.0.1:9", "http://127.0.0.1:9/", True),
     ("127.0.0.1:9", "http://127.0.0.1:8/", False), ("10.0.0.0/8", "http://10.9.9.9/", True),
     ("10.0.0.0/8:80", "http://inside.example/", True), ("10.0.0.0/8:80", "https://inside.example/", False),
     ("10.0.0.0/8", "http://192.168.0.1/", False),
     ("10.0.0.0/8", "https://both.example/", True), ("10.0.0.0/8", "http://both.example/", False),
     ("10.0.0.0/8", "https://both.example:22/", False), ("Inside.Example", "http://inside.example:81/", True),
     ("inside.example:81", "http://inside.example:81/", True), ("inside.example:81", "http://inside.example/", False),
     ("inside.example", "http://internal/", False), ("[::1]:80", "http://[::1]/", True),
     ("fd00::/8", "http://[fd00::9]:1/", True), ("[fd00::/8]:1", "http://[fd00::9]:1/", True),
     ("[fd00::/8]:1", "http://[fd00::9]:2/", False), ("127.0.0.1", "http://localhost/", False),
     ("localhost", "http://localhost/", True), ("93.184.216.34", "http://good.example:22/", True),
     ("127.0.0.1", "http://[::ffff:127.0.0.1]/", True), ("localhost", "http://user@localhost/", False)],
)  # fmt: skip
def test_an_operator_allows_hosts_and_networks_with_or_without_port(
    rule: str, url: str, allowed: bool
) -> None:
    egress = Egress([rule], resolver=names)
    if allowed:
        egress.check(url)
    else:
        with pytest.raises(Refused):
            egress.check(url)


@pytest.mark.parametrize(
    "rule",
    ["", "10.0.0.1/8", "host:0", "host:http", "host:70000", "a b", "http://host", "*", "[::1", "127.1"],
)
def test_a_rule_that_cannot_be_read_is_an_error_that_names_it(rule: str) -> None:
    with pytest.raises(ValueError, match="allowed destination"):
        Rule.parse(rule)


@pytest.mark.parametrize(
    ("name", "value"),
    [("X-Key", f"{SECRET}\r\nEvil: 1"), ("X-Key", f" {SECRET}"), ("X-Key", f"{SECRET}\x00"), ("X-Key", f"ü{SECRET}"),
     ("X Key", SECRET), ("X-Key:", SECRET), ("", SECRET), ("Host", SECRET), ("content-length", SECRET),
     ("Transfer-Encoding", SECRET), ("Connection", SECRET), ("Expect", SECRET)],
)  # fmt: skip
def test_a_header_that_could_smuggle_is_refused_without_its_value(
    name: str, value: str, dialled: list[object]
) -> None:
    with pytest.raises(Refused) as refused:
        Egress(["127.0.0.1"]).post("http://127.0.0.1:1/", b"", {name: value}, timeout_s=1, max_bytes=1)
    assert SECRET not in f"{refused.value.detail} {refused.value.hint}"
    assert not dialled
    with pytest.raises(Refused):
        check_headers({name: value})


def test_requests_share_a_connection_and_say_what_they_must() -> None:
    with serving(echo) as server:
        egress = server.egress()
        for body in (b"one", b"", b"three" * 10_000):
            assert post(egress, f"{server.url}?a=ä", body, Authorization=SECRET).body == body
        assert server.connections == 1
        asked = server.asked[0]
        assert asked.path == "/predict?a=%C3%A4"
        assert asked.headers["host"] == server.address
        assert asked.headers["authorization"] == SECRET
        assert asked.headers["accept-encoding"] == "identity"


def test_a_connection_that_the_server_closed_meanwhile_is_replaced_unasked() -> None:
    def once(exchange: Exchange, asked: Asked) -> None:
        echo(exchange, asked)
        exchange.close_connection = True  # without saying so

    with serving(once) as server:
        egress = server.egress()
        for _ in range(3):
            assert post(egress, server.url).status == 200
            time.sleep(0.05)
        assert (server.connections, len(server.asked)) == (3, 3)


def test_threads_get_their_own_answers() -> None:
    with serving(echo) as server, ThreadPoolExecutor(8) as threads:
        egress = server.egress()
        bodies = [f"question {number}".encode() for number in range(200)]
        assert [
            answer.body for answer in threads.map(lambda body: post(egress, server.url, body), bodies)
        ] == bodies
        assert server.connections <= 8
        egress.close()


def test_a_redirect_is_given_back_and_not_followed(dialled: list[object]) -> None:
    inside = "http://169.254.169.254/latest/"
    with serving(lambda exchange, asked: exchange.say(302, b"", Location=inside)) as server:
        answer = post(server.egress(), server.url)
    assert (answer.status, answer.headers["location"]) == (302, inside)
    assert dialled == [("127.0.0.1", server.port)]


def test_proxies_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, dialled: list[object]
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with serving(echo) as server:
        post(server.egress(), server.url)
    assert dialled == [("127.0.0.1", server.port)]


def test_a_server_that_is_down_was_sent_nothing() -> None:
    with serving(echo) as server:
        pass
    with pytest.raises(Unreachable, match="cannot be reached: connection refused") as error:
        post(server.egress(), server.url)
    assert not error.value.sent
    assert error.value.retryable


def test_a_name_without_address_may_have_one_later() -> None:
    with pytest.raises(Unreachable, match=r"'gone\.example' has no address") as error:
        post(Egress(resolver=names), "https://gone.example/")
    assert not error.value.sent
    assert error.value.retryable


def _drip_head(exchange: Exchange, asked: Asked) -> None:
    for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
        exchange.wfile.write(bytes([letter]))
        time.sleep(0.05)


def _drip_body(exchange: Exchange, asked: Asked) -> None:
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    _drip_head(exchange, asked)


def _drip_hints(exchange: Exchange, asked: Asked) -> None:
    for _ in range(1000):
        exchange.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "behave", [lambda exchange, asked: time.sleep(3), _drip_head, _drip_body, _drip_hints],
    ids=["silence", "head", "body", "hints"],
)  # fmt: skip
def test_the_deadline_holds_against_a_server_that_drips(behave) -> None:  # type: ignore[no-untyped-def]
    with serving(behave) as server:
        started = time.monotonic()
        with pytest.raises(Unreachable, match=r"did not answer within 0\.4 s") as error:
            server.egress().post(server.url, b"x", {}, timeout_s=0.4, max_bytes=10_000)
        assert time.monotonic() - started < 1.5
        assert error.value.sent


def test_the_deadline_holds_against_a_server_that_does_not_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(Unreachable, match="did not answer within"):
            Egress([f"127.0.0.1:{port}"]).post(
                f"http://127.0.0.1:{port}/", bytes(30 * 2**20), {}, timeout_s=0.4, max_bytes=1
            )
        assert time.monotonic() - started < 1.5


def test_an_answer_of_a_hundred_megabytes_is_cut_off() -> None:
    written = []

    def flood(exchange: Exchange, asked: Asked) -> None:
        exchange.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        for _ in range(1000):
            written.append(exchange.wfile.write(bytes(100_000)))

    with serving(flood) as server:
        egress = server.egress()
        with pytest.raises(TooLarge, match="more than 1048576 bytes") as error:
            post(egress, server.url)
        assert error.value.sent
        assert not error.value.retryable
    assert sum(written) < 30e6


@pytest.mark.parametrize(
    "raw",
    [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhalf", b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000],
    ids=["nothing", "half a line", "half a body", "half a chunk", "another protocol", "bad length", "endless head"],
)  # fmt: skip
def test_an_answer_that_is_not_whole_is_an_error_and_never_a_response(raw: bytes) -> None:
    def behave(exchange: Exchange, asked: Asked) -> None:
        exchange.wfile.write(raw)
        exchange.close_connection = True

    with serving(behave) as server, pytest.raises(Unreachable) as error:
        post(server.egress(), server.url, Authorization=SECRET)
    assert error.value.sent
    assert SECRET not in f"{error.value.detail} {error.value.hint}"


def test_a_server_that_answers_413_without_reading_is_heard() -> None:
    def early(exchange: Exchange, asked: Asked) -> None:
        exchange.say(413, b"too large", Connection="close")
        time.sleep(0.2)  # else the reset overtakes the answer

    with serving(early) as server:
        server.reads = False
        assert post(server.egress(), server.url, bytes(30 * 2**20)).status == 413


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of teacher.example, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "teacher.example")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("teacher.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "teacher.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_tls_is_spoken_with_the_name_and_dialled_to_the_address(
    certificate: Path, dialled: list[object]
) -> None:
    server_names: list[str | None] = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    tls.sni_callback = lambda sock, name, context: server_names.append(name)
    with serving(echo, tls) as server:
        rules = [f"127.0.0.1:{server.port}"]
        trusting = ssl.create_default_context(cafile=str(certificate))

        def here(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        egress = Egress(rules, resolver=here, tls=trusting)
        for _ in range(3):
            assert post(egress, f"https://teacher.example:{server.port}/", b"hello").body == b"hello"
        assert server_names == ["teacher.example"]
        assert server.asked[0].headers["host"] == f"teacher.example:{server.port}"
        assert dialled == [("127.0.0.1", server.port)]
        for other in (egress, Egress(rules, resolver=here)):  # another name, and a stranger's signature
            host = "other.example" if other is egress else "teacher.example"
            with pytest.raises(Refused, match="certificate"):
                post(other, f"https://{host}:{server.port}/")
        assert len(server.asked) == 3


def test_https_to_a_port_without_tls_says_so() -> None:
    with serving(echo) as server, pytest.raises(Unreachable, match="no TLS on this port") as error:
        post(server.egress(), f"https://{server.address}/")
    assert not error.value.sent


def test_closing_ends_the_open_connections_and_another_request_opens_one() -> None:
    with serving(echo) as server:
        egress = server.egress()
        post(egress, server.url)
        egress.close()
        deadline = time.monotonic() + 2
        while not server.ended and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.ended == 1
        assert post(egress, server.url).status == 200
