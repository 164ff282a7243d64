"""Requests to addresses that users give: only to the public internet, and to what the operator allows.

Every request looks the name up, checks every address it has, and uses only a connection to one of these: a name
that turns private between check and dial (DNS rebinding) is never dialled. Redirects are not followed, proxies of
the environment not used. The look-up itself takes as long as the system's resolver lets it.
"""

from __future__ import annotations

import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import quote, urlsplit

import h11

from models.errors import Unreachable
from models.pipeline import Response

Address = IPv4Address | IPv6Address
#: Gives the addresses of a host and port as text. Raises OSError where there are none.
Resolver = Callable[[str, int], Sequence[str]]

PORTS = (443, 8443)
_CONNECT_S = 5.0
#: Shorter than common servers keep a silent connection (5 s): a question must not meet a closing one.
_IDLE_S = 4.0
_MOST_IDLE = 32
_PIECE = 64 * 1024
_LONGEST_HOST = 253
_ASK_OPERATOR = "The operator can allow a destination with DRAM_EGRESS_ALLOW."

#: What `is_global` of older Pythons takes for global (IANA special-purpose address registries).
_NOT_PUBLIC: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(text)
    for text in (
        "192.0.0.0/24",  # IETF protocol assignments
        "192.88.99.0/24",  # 6to4 relays, deprecated
        "2002::/16",  # 6to4: any IPv4 address, private ones too
        "3fff::/20",  # documentation
        "2001::/23",  # IETF protocol assignments; Teredo, which carries any IPv4 address
        "2001:db8::/32",  # documentation
    )
)
_IPV6_UNICAST = IPv6Network("2000::/3")  # all that is given out for the internet
_NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_ENDS_IN_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_HEADER_VALUE = re.compile(r"([\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?)?")
_OUR_HEADERS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "proxy-connection", "upgrade"}
    | {"te", "trailer", "expect", "accept-encoding"}
)


class Refused(Unreachable):
    """The destination or a header breaks a rule; nothing was sent."""

    code = "destination_refused"
    retryable = False

    def __init__(self, detail: str, hint: str = "") -> None:
        super().__init__(detail, hint, sent=False)


class TooLarge(Unreachable):
    """The answer is larger than the caller takes."""

    code = "answer_too_large"
    retryable = False


@dataclass(frozen=True)
class Rule:
    """A destination the operator allows: a host name or a network, at one port or (None) at all."""

    host: str | IPv4Network | IPv6Network
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Reads `host`, `host:port`, `CIDR`, `CIDR:port`, `[IPv6 CIDR]:port`. Raises ValueError."""
        bracketed = re.fullmatch(r"\[(.+)\](?::(.*))?", text)
        if bracketed:
            host, port = bracketed[1], bracketed[2]
        elif text.count(":") > 1:  # IPv6 without port
            host, port = text, None
        else:
            host, colon, port = text.partition(":")
            port = port if colon else None
        if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"allowed destination '{text}': '{port}' is no port")
        try:
            return cls(ip_network(host), int(port) if port else None)
        except ValueError:
            pass
        try:
            return cls(_ascii_name(host), int(port) if port else None)
        except Refused:
            raise ValueError(
                f"allowed destination '{text}' is no host, host:port, CIDR or CIDR:port"
            ) from None

    def names(self, host: str, port: int) -> bool:
        return self.host == host and self.port in (None, port)

    def contains(self, address: Address, port: int) -> bool:
        return not isinstance(self.host, str) and address in self.host and self.port in (None, port)


@dataclass(frozen=True)
class _Destination:
    """A checked URL: where to dial, and what to say there."""

    scheme: str
    host: str  # ASCII
    port: int
    target: str  # path and query
    addresses: tuple[Address, ...]

    @property
    def site(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """For the Host header and for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"https": 443, "http": 80}[self.scheme] else f"{host}:{self.port}"


@dataclass
class _Connection:
    sock: socket.socket
    address: Address
    talk: h11.Connection
    used: float  # when it was last put back, monotonic

    def is_usable(self) -> bool:
        """Whether it is open, silent and not idle for too long."""
        if time.monotonic() - self.used > _IDLE_S:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)  # a word out of turn is an end of file, or nonsense


def resolve(host: str, port: int) -> list[str]:
    """The addresses that the system's resolver knows, each once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def check_headers(headers: Mapping[str, str]) -> None:
    """Raises `Refused` for a header that may not be sent. The message never holds its value."""
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            raise Refused("a header's name may hold only letters, digits and -", "Correct the header's name.")
        if name.lower() in _OUR_HEADERS:
            raise Refused(f"header '{name}' is set by the service itself", "Leave it out.")
        if not _HEADER_VALUE.fullmatch(value):
            raise Refused(
                f"header '{name}' has a value that cannot be sent",
                "It may hold printable ASCII only, without a line break or spaces around it.",
            )


class Egress:
    """A `models.pipeline.Transport` that keeps connections open between requests. Safe to use from many threads."""

    def __init__(
        self, allow: Iterable[str] = (), *, resolver: Resolver = resolve, tls: ssl.SSLContext | None = None
    ) -> None:
        """`allow` holds the operator's rules, see `Rule.parse`; `tls` says whom to trust (None: the system)."""
        self._rules = tuple(Rule.parse(text) for text in allow)
        self._resolver = resolver
        self._given_tls = tls
        self._idle: dict[tuple[str, str, int], list[_Connection]] = {}
        self._lock = threading.Lock()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Made at the first use: it reads all of the system's certificates."""
        return self._given_tls or ssl.create_default_context()

    def check(self, url: str) -> None:
        """Raises `Refused` for a URL that will never be asked, `Unreachable` where its name has no address now."""
        self._destination(url)

    def post(
        self,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        max_bytes: int | None,
    ) -> Response:
        """Sends `body` and reads the answer, both within `timeout_s`. A 3xx is an answer like another.

        `max_bytes` None: the status and the headers are enough, and the content is not waited for.
        """
        until = time.monotonic() + timeout_s
        check_headers(headers)
        destination = self._destination(url)
        connection = self._idle_to(destination) or self._dialled(destination, until)
        try:
            response, is_open = _exchange(connection, destination, body, headers, until, max_bytes)
        except BaseException as error:
            connection.sock.close()
            if isinstance(error, TimeoutError):
                raise Unreachable(
                    f"{destination.authority} did not answer within {timeout_s:g} s",
                    "Is it up? If it needs longer, raise timeout_s or lower batch_size.",
                ) from None
            if isinstance(error, OSError):
                raise Unreachable(
                    f"{destination.authority} closed the connection without an answer", "Look at its log."
                ) from None
            if isinstance(error, h11.RemoteProtocolError):
                raise Unreachable(
                    f"{destination.authority} broke off its answer, or does not speak HTTP/1.1",
                    "Look at its log.",
                ) from None
            raise
        if is_open:
            self._put_back(destination, connection)
        else:
            connection.sock.close()
        return response

    def close(self) -> None:
        """Ends the connections that wait for another request."""
        with self._lock:
            waiting = [connection for waiting in self._idle.values() for connection in waiting]
            self._idle.clear()
        for connection in waiting:
            connection.sock.close()

    def _destination(self, url: str) -> _Destination:
        if len(url) > 2000 or re.search(r"[\x00-\x20\x7f\\]", url):
            raise Refused("the URL is too long, or holds a space, backslash or control character")
        try:
            parts = urlsplit(url)
            scheme, host, given_port = parts.scheme, parts.hostname or "", parts.port
        except ValueError:
            raise Refused("the URL cannot be read", "Write https://host/path.") from None
        if scheme not in ("https", "http"):
            raise Refused("the URL must begin with https://")
        if "@" in parts.netloc:
            raise Refused("the URL holds a user name", "Leave it out.")
        literal = _literal(host)
        name = str(literal) if literal else _ascii_name(host)
        port = given_port if given_port is not None else {"https": 443, "http": 80}[scheme]
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
            "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?") if parts.query else ""
        )
        addresses = (_plain(literal),) if literal else self._addresses(name, port)
        is_named = any(rule.names(name, port) for rule in self._rules)
        allowed = [
            is_named or any(rule.contains(address, port) for rule in self._rules) for address in addresses
        ]
        for address, is_allowed in zip(addresses, allowed, strict=True):
            if not is_allowed and not is_public(address):
                raise Refused(f"'{name}' is not on the public internet", _ASK_OPERATOR)
        if not all(allowed):
            if scheme != "https":
                raise Refused(f"'{name}' must be asked over https", f"Use https://. {_ASK_OPERATOR}")
            if port not in PORTS:
                raise Refused(
                    f"port {port} of '{name}' may not be asked", f"Use 443 or 8443. {_ASK_OPERATOR}"
                )
        return _Destination(scheme, name, port, target, addresses)

    def _addresses(self, name: str, port: int) -> tuple[Address, ...]:
        try:
            found = tuple(_plain(ip_address(text)) for text in self._resolver(name, port))
        except (OSError, ValueError):
            found = ()
        if not found:
            raise Unreachable(f"the name '{name}' has no address", "Check the URL's host.", sent=False)
        return found

    def _idle_to(self, destination: _Destination) -> _Connection | None:
        """A connection that waits, and leads to an address that was just checked."""
        with self._lock:
            waiting = self._idle.get(destination.site, [])
            while waiting:
                connection = waiting.pop()
                if connection.address in destination.addresses and connection.is_usable():
                    return connection
                connection.sock.close()
        return None

    def _put_back(self, destination: _Destination, connection: _Connection) -> None:
        connection.used = time.monotonic()
        with self._lock:
            waiting = self._idle.setdefault(destination.site, [])
            waiting.append(connection)
            surplus = waiting[:-_MOST_IDLE]
            del waiting[:-_MOST_IDLE]
        for old in surplus:
            old.sock.close()

    def _dialled(self, destination: _Destination, until: float) -> _Connection:
        """A new connection to the first of the checked addresses that answers."""
        failure: OSError = TimeoutError()
        for address in destination.addresses:
            try:
                return _Connection(
                    self._dial(address, destination, until),
                    address,
                    h11.Connection(h11.CLIENT),
                    time.monotonic(),
                )
            except ssl.SSLCertVerificationError as error:
                raise Refused(
                    f"the certificate of {destination.authority} is not valid: {error.verify_message}",
                    "It must be issued for this host by an authority that the service trusts.",
                ) from None
            except OSError as error:
                failure = error
        if isinstance(failure, ssl.SSLError):
            reason = "there is no TLS on this port"
        elif isinstance(failure, TimeoutError):
            reason = "no connection in time"
        else:
            reason = (failure.strerror or "no connection").lower()
        raise Unreachable(f"{destination.authority} cannot be reached: {reason}", "Is it up?", sent=False)

    def _dial(self, address: Address, destination: _Destination, until: float) -> socket.socket:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(min(_CONNECT_S, _left(until)))
            sock.connect((str(address), destination.port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if destination.scheme == "http":
                return sock
            sock.settimeout(_left(until))
            return self._tls.wrap_socket(sock, server_hostname=destination.host)
        except BaseException:
            sock.close()
            raise


def is_public(address: Address) -> bool:
    """Whether an address, and the one it carries inside, is given out for the whole internet."""
    if address.is_multicast or not address.is_global or any(address in network for network in _NOT_PUBLIC):
        return False
    if isinstance(address, IPv4Address):
        return True
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _IPV6_UNICAST


def _exchange(
    connection: _Connection,
    destination: _Destination,
    body: bytes,
    headers: Mapping[str, str],
    until: float,
    max_bytes: int | None,
) -> tuple[Response, bool]:
    """One request and its answer, and whether the connection can take another. `max_bytes` None: without content."""
    sock, talk = connection.sock, connection.talk
    own = {"Host": destination.authority, "Content-Length": str(len(body)), "Accept-Encoding": "identity"}
    request = h11.Request(method="POST", target=destination.target, headers=[*own.items(), *headers.items()])
    pieces = (talk.send(request), talk.send(h11.Data(data=body)), talk.send(h11.EndOfMessage()))
    is_open = True
    try:
        _send(sock, b"".join(piece or b"" for piece in pieces), until)
    except (BrokenPipeError, ConnectionResetError):
        is_open = False  # it may have answered before it closed: 413, for example
    head: h11.Response | None = None
    content = bytearray()
    while True:
        event = talk.next_event()
        if event is h11.NEED_DATA:
            sock.settimeout(_left(until))
            data = sock.recv(_PIECE)
            if not data and head is None:
                raise ConnectionResetError
            talk.receive_data(data)
        elif isinstance(event, h11.Response):
            head = event
            if max_bytes is None:
                return Response(head.status_code, _decoded(head), b""), False
        elif isinstance(event, h11.Data):
            content += event.data
            if max_bytes is not None and len(content) > max_bytes:
                raise TooLarge(
                    f"{destination.authority} answered more than {max_bytes} bytes", "Is this the right URL?"
                )
        elif isinstance(event, h11.EndOfMessage):
            break
        elif isinstance(event, h11.ConnectionClosed):
            raise ConnectionResetError
    assert head is not None
    is_open = is_open and talk.our_state is h11.DONE and talk.their_state is h11.DONE
    if is_open:
        talk.start_next_cycle()
    return Response(head.status_code, _decoded(head), bytes(content)), is_open


def _decoded(head: h11.Response) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}


def _send(sock: socket.socket, content: bytes, until: float) -> None:
    rest = memoryview(content)
    while rest:
        sock.settimeout(_left(until))
        rest = rest[sock.send(rest[:_PIECE]) :]


def _left(until: float) -> float:
    """Seconds until a deadline. Raises TimeoutError after it."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _literal(host: str) -> Address | None:
    """The address that a host is written as, if it is one."""
    try:
        return ip_address(host) if "%" not in host else None
    except ValueError:
        return None


def _ascii_name(host: str) -> str:
    """A host name as it goes over the wire: lower case, IDNA, without the last dot. Raises `Refused`."""
    try:
        if not host or len(host) > _LONGEST_HOST:
            raise UnicodeError
        name = host.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        raise Refused("the URL has no proper host name", "Write https://host/path.") from None
    if _ENDS_IN_NUMBER.fullmatch(name):
        raise Refused(f"'{name}' is an IP address in an odd form", "Write it as four numbers from 0 to 255.")
    if not _NAME.fullmatch(name):
        raise Refused("the URL has no proper host name", "Write https://host/path.")
    return name


def _plain(address: Address) -> Address:
    """An IPv4 address that is written as IPv6 (::ffff:a.b.c.d), as IPv4."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
