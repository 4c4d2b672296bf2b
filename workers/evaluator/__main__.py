"""`python -m workers.evaluator`: judge challengers until SIGTERM; exit code 2 for a wrong setting or checkpoint."""

from __future__ import annotations

import sys

from slipstream.config import load_config
from slipstream.errors import CheckpointError, ConfigError
from slipstream.telemetry import configure_logging
from workers.evaluator.worker import run


def main() -> int:
    """Run the worker; the exit code."""
    configure_logging("evaluator")
    try:
        run(load_config())
    except (ConfigError, CheckpointError) as error:
        print(f"workers.evaluator: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
