"""Who is calling: API keys to tenants. Without a tenants file every caller is the tenant `anonymous`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

import msgspec

from slipstream.config import Tenant

ANONYMOUS: Final = "anonymous"


class Caller(msgspec.Struct, frozen=True):
    """The tenant behind a request, and whether its requests may be learned from."""

    tenant: str
    may_train: bool


class Callers:
    """The tenants of this service; `are_known` is False when no keys are configured."""

    def __init__(self, tenants: Mapping[str, Tenant] | None) -> None:
        self._tenants = dict(tenants or {})
        self.are_known = tenants is not None

    def identify(self, authorization: str | None) -> Caller | None:
        """The caller behind an `Authorization` header, or None if it must be turned away.

        Every tenant is compared in constant time, so the time taken says nothing about the keys.
        """
        if not self.are_known:
            return Caller(ANONYMOUS, True)
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        found = None
        for name, tenant in self._tenants.items():
            if hmac.compare_digest(digest, tenant.key_sha256):
                found = Caller(name, tenant.train)
        return found if scheme.lower() == "bearer" and key.strip() else None
