"""The configuration that Ray writes for HAProxy, closed before HAProxy reads it."""

from __future__ import annotations

import pytest

from services.target.haproxy_on_loopback import closed, unavailable_page

RAYS = """global
    stats socket /run/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    errorfile 502 /run/500.http
frontend prometheus
    bind :9101
    mode http
    no log
frontend http_frontend
    bind 127.0.0.1:8000
    # comment
    default_backend default_backend
backend default_backend
    http-reuse always
    http-request return status 404
listen stats
  bind *:8404
  stats enable
"""


def test_only_the_services_own_listener_remains() -> None:
    lines = [line.strip() for line in closed(RAYS, "/run/page").splitlines()]
    assert [line for line in lines if line.startswith("bind")] == ["bind 127.0.0.1:8000"]
    assert "backend default_backend" in lines


def test_the_admin_socket_is_the_owners_alone() -> None:
    assert "mode 600 level admin" in closed(RAYS, "/run/page")
    assert "666" not in closed(RAYS, "/run/page")


def test_a_dead_replica_is_answered_in_openai_shape() -> None:
    assert "errorfile 502 /run/page" in closed(RAYS, "/run/page")
    head, body = unavailable_page().split(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head


def test_no_connection_to_a_replica_is_used_twice() -> None:
    lines = [line.strip() for line in closed(RAYS, "/run/page").splitlines()]
    assert "option httpclose" in lines
    assert [line for line in lines if line.startswith("http-reuse")] == ["http-reuse never"]


def test_a_request_whose_body_does_not_come_waits_in_haproxy_and_not_for_long() -> None:
    lines = [line.strip() for line in closed(RAYS, "/run/page").splitlines()]
    defaults = lines[lines.index("defaults") : lines.index("frontend http_frontend")]
    assert {"option http-buffer-request", "timeout http-request 10s"} <= set(defaults)


@pytest.mark.parametrize("header", ["x-request-disconnect-disabled", "x-request-timeout-seconds"])
def test_headers_that_serve_would_obey_do_not_reach_it(header: str) -> None:
    assert f"http-request del-header {header}" in [line.strip() for line in closed(RAYS, "/run/page").splitlines()]


def test_closing_twice_changes_only_the_doubled_rule() -> None:
    once = closed(RAYS, "/run/page")
    assert set(closed(once, "/run/page").splitlines()) == set(once.splitlines())


def test_a_listener_nobody_knows_stops_haproxy() -> None:
    with pytest.raises(ValueError, match=r"bind :9999.*expected one listener"):
        closed(RAYS + "frontend more\n    bind :9999\n", "/run/page")
