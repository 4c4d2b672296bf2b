"""`python -m services.target`: serve the target until SIGTERM; exit code 2 for a wrong setting or checkpoint."""

from __future__ import annotations

import sys

from services.target.app import check_settings, serve_until_stopped
from slipstream.config import load_config
from slipstream.errors import CheckpointError, ConfigError
from slipstream.telemetry import configure_logging


def main() -> int:
    """Run the service; the exit code."""
    configure_logging("target")
    try:
        settings = load_config()
        serve_until_stopped(settings, check_settings(settings))
    except (ConfigError, CheckpointError) as error:
        print(f"services.target: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
