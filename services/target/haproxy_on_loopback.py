"""Runs in HAProxy's place: takes from the configuration that Ray wrote what must not be open, then becomes HAProxy.

    python -I -S haproxy_on_loopback.py HAPROXY_BINARY ...HAProxy's own arguments

Ray 2.60 makes HAProxy listen for metrics and statistics on every interface, without a password and on fixed ports,
and opens its admin socket to every user of the machine. This program removes the two listeners, closes the socket,
drops headers that Serve would obey or echo, ends requests that do not come, answers for a dead replica in OpenAI's
error shape, and refuses to start if any other unexpected listener remains.
It runs with the standard library alone, so that it costs some 20 ms.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_UNWANTED = ("frontend prometheus", "listen stats")
_DROP_BAD_REQUEST_ID = (
    "http-request del-header x-request-id unless { req.hdr(x-request-id) -m reg ^[A-Za-z0-9._-]{1,64}$ }"
)
_DROP_SERVES_SWITCHES = (
    "http-request del-header x-request-disconnect-disabled",
    "http-request del-header x-request-timeout-seconds",
)
"""Serve obeys these of any client: one makes it read a body from a thread that does not own the connection."""

_WAIT_FOR_BODIES = ("option http-buffer-request", "timeout http-request 10s")
"""A request that says no more after its head, or not even that, ends with 408 before it holds a place at a replica."""

_CLOSE_TO_CLIENTS, _NEVER_REUSE = "option httpclose", "    http-reuse never"
"""On a reused connection HAProxy answers a server's death by closing without a word, so that the client asks again."""

_ANSWER_BEFORE_CLOSING = "option idle-close-on-response"
"""A change of replicas reloads HAProxy; without this, a request may arrive on a connection that is being closed."""

_NO_PLAIN_TEXT_ERRORS = "http-response return status 503 content-type application/json file {body} hdr retry-after 1"
_FROM_SERVE_ITSELF = "if { status 500 } { res.hdr(content-type) -m beg text/plain }"
"""Serve's own proxy says no more than `Internal Server Error` for a replica that just died; replicas speak JSON."""

_UNAVAILABLE = (
    b'{"error":{"message":"the replica that ran this request is gone and another one starts; send it again",'
    b'"type":"server_error","param":null,"code":"replica_lost"}}'
)


def closed(config: str, error_page: str) -> str:
    """The configuration without the open listeners; raises ValueError if it is not the one expected."""
    sections: list[list[str]] = []
    for line in config.splitlines():
        if line and not line[0].isspace():
            sections.append([])
        if sections:
            sections[-1].append(line)
    lines = [line for section in sections if not section[0].startswith(_UNWANTED) for line in section]
    listeners = [line.strip() for line in lines if line.split()[:1] == ["bind"]]
    if len(listeners) != 1:
        raise ValueError(f"HAProxy would listen at {listeners}, expected one listener; set RAY_SERVE_ENABLE_HA_PROXY=0")
    return "\n".join(_closed_line(line, error_page) for line in lines) + "\n"


def _closed_line(line: str, error_page: str) -> str:
    words = line.split()
    if words[:1] == ["errorfile"]:
        return f"    errorfile {words[1]} {error_page}"
    if words[:1] == ["bind"]:
        return "\n    ".join((line, _DROP_BAD_REQUEST_ID, *_DROP_SERVES_SWITCHES, _openai_errors(error_page)))
    if words == ["defaults"]:
        return "\n    ".join((line, _CLOSE_TO_CLIENTS, _ANSWER_BEFORE_CLOSING, *_WAIT_FOR_BODIES))
    if words[:1] == ["http-reuse"]:
        return _NEVER_REUSE
    return line.replace(" mode 666 ", " mode 600 ")


def _openai_errors(error_page: str) -> str:
    body = Path(error_page).with_suffix(".json")
    return f"{_NO_PLAIN_TEXT_ERRORS.format(body=body)} {_FROM_SERVE_ITSELF}"


def unavailable_page() -> bytes:
    """The whole HTTP answer for a request whose replica died."""
    head = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(_UNAVAILABLE) + _UNAVAILABLE


def main(arguments: list[str]) -> None:
    """Rewrite the configuration named by `-f` and become the binary named first."""
    binary, *rest = arguments
    if "-f" in rest:
        config = Path(rest[rest.index("-f") + 1])
        page = config.with_name("unavailable.http")
        page.write_bytes(unavailable_page())
        page.with_suffix(".json").write_bytes(_UNAVAILABLE)
        config.write_text(closed(config.read_text(encoding="utf-8"), str(page)), encoding="utf-8")
    # The process that Ray runs HAProxy under may be killed: HAProxy must not outlive it and keep the port.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(binary, [binary, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
