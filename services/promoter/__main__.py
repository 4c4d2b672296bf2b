"""`python -m services.promoter`: move the pointer until SIGTERM; exit code 2 for a wrong setting or checkpoint."""

from __future__ import annotations

import sys

from services.promoter.service import run
from slipstream.config import load_config
from slipstream.errors import CheckpointError, ConfigError
from slipstream.telemetry import configure_logging


def main() -> int:
    """Run the service; the exit code."""
    configure_logging("promoter")
    try:
        run(load_config())
    except (ConfigError, CheckpointError) as error:
        print(f"services.promoter: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
