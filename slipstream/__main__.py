"""`slipstream status | rollback | register | freeze | unfreeze | doctor`, also as `python -m slipstream`.

Exit codes: 0 in order, 1 skew, outage or a refused change, 2 wrong arguments or settings.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from slipstream.config import Settings, load_config
from slipstream.doctor import examine
from slipstream.errors import ConfigError, SlipstreamError
from slipstream.rollback import rollback
from slipstream.status import problems, read_status, render, short
from slipstream.stores.opening import open_pointers, open_registry
from slipstream.stores.protocols import PointerStore
from slipstream.versions import DEFAULT_DOMAIN

ENDPOINTS = "endpoints.json"
"""What a local supervisor leaves in its state directory while it is up."""


class _Endpoints(msgspec.Struct, frozen=True):
    redis_url: str


def main(arguments: list[str] | None = None) -> int:
    """Run one command of the operator; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        settings = with_local_store(load_config())
        command: Callable[[Settings, argparse.Namespace], int] = parsed.command
        return command(settings, parsed)
    except ConfigError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return 2
    except SlipstreamError as error:
        print(f"slipstream: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def with_local_store(settings: Settings) -> Settings:
    """The settings, with the store of the supervisor that is up in the state directory if none is named."""
    path = settings.state_dir / ENDPOINTS
    if settings.addresses.redis is not None or not path.exists():
        return settings
    try:
        endpoints = msgspec.json.decode(path.read_bytes(), type=_Endpoints)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}; expected what `make up` writes there") from error
    addresses = msgspec.structs.replace(settings.addresses, redis=endpoints.redis_url)
    return msgspec.structs.replace(settings, addresses=addresses)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slipstream", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    def add_reason(sub: argparse.ArgumentParser) -> None:
        who = os.environ.get("USER", "an operator")
        sub.add_argument("--reason", default=f"by {who}", help="kept in the history (default: who asked)")

    add("status", _status, "every pointer beside what the replicas acknowledge, workers, last decisions")
    back = add("rollback", _rollback, "move the pointer to an earlier version and freeze promotion")
    back.add_argument("--to", type=int, metavar="VERSION", help="default: the one before; 0 serves without one")
    back.add_argument("--role", choices=["draft", "recycling"], default="draft", help="recycling: the matrix")
    add_reason(back)
    register = add("register", _register, "offer the gate a draft that was made elsewhere")
    register.add_argument("directory", type=Path, help="a checkpoint of the target's vocabulary")
    register.add_argument("--note", default="registered by hand", help="kept in the version's lineage")
    for sub in (back, register):
        sub.add_argument("--domain", default=DEFAULT_DOMAIN)
    add_reason(add("freeze", _freeze, "refuse promotions until `unfreeze`"))
    add("unfreeze", _unfreeze, "allow promotions again")
    add("doctor", _doctor, "versions, extensions and servers within reach of this machine")
    return parser


def _status(settings: Settings, parsed: argparse.Namespace) -> int:
    status = _with_pointers(settings, lambda it: read_status(it, at=time.time()))
    print(render(status))
    return 1 if problems(status) else 0


def _rollback(settings: Settings, parsed: argparse.Namespace) -> int:
    def move(pointers: PointerStore) -> Any:
        return rollback(pointers, role=parsed.role, domain=parsed.domain, to_version=parsed.to, reason=parsed.reason)

    pointer = _with_pointers(settings, move)
    place = f"{pointer.role}/{pointer.domain}"
    print(f"{place} is at v{pointer.version} {short(pointer.digest)}, generation {pointer.generation}")
    print("promotion is frozen; `slipstream unfreeze` releases it")
    return 0


def _register(settings: Settings, parsed: argparse.Namespace) -> int:
    # Imported here: an operator's status and rollback must not wait for torch, nor need it.
    from slipstream.registration import offer_draft  # noqa: PLC0415

    registry = open_registry(settings)
    try:
        version = offer_draft(registry, settings, parsed.directory, domain=parsed.domain, note=parsed.note)
    finally:
        registry.close()
    print(f"draft/{version.domain} has v{version.version} {short(version.digest)} as the gate's challenger")
    return 0


def _freeze(settings: Settings, parsed: argparse.Namespace) -> int:
    _with_pointers(settings, lambda pointers: pointers.freeze(parsed.reason))
    print("promotion is frozen; `slipstream unfreeze` releases it")
    return 0


def _unfreeze(settings: Settings, parsed: argparse.Namespace) -> int:
    _with_pointers(settings, lambda pointers: pointers.unfreeze())
    print("promotion is allowed")
    return 0


def _doctor(settings: Settings, parsed: argparse.Namespace) -> int:
    findings = examine(settings)
    for one in findings:
        print(f"{one.level:<7} {one.text}")
    return 1 if any(one.level == "bad" for one in findings) else 0


def _with_pointers(settings: Settings, call: Callable[[PointerStore], Any]) -> Any:
    pointers = open_pointers(settings)
    try:
        return call(pointers)
    finally:
        pointers.close()


if __name__ == "__main__":
    sys.exit(main())
