"""The class that Ray Serve runs: a `Replica`, imported only in the process that serves.

The process that starts the service hands this class to Serve; importing torch there would cost 2 s of the start and
200 MB for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import ASGIApp

if TYPE_CHECKING:
    from services.target.replica import Replica


class ReplicaProcess:
    """What Serve calls; see `Replica` for what each call does."""

    _replica: Replica | None = None

    def __init__(self, target_dir: str, model_name: str) -> None:
        from services.target.replica import Replica  # noqa: PLC0415 - see the module's docstring

        self._replica = Replica(target_dir, model_name)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The HTTP face; called once, after the constructor."""
        assert self._replica is not None
        return self._replica.app()

    def check_health(self) -> None:
        """Raises EngineStopped if the engine is dead or stuck."""
        assert self._replica is not None
        self._replica.check_health()

    def __del__(self) -> None:
        """Stop in order; the constructor may have failed."""
        if self._replica is not None:
            self._replica.stop()
