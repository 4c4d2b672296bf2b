"""`python -m workers.evaluator`: judge challengers until SIGTERM; exit code 2 for a wrong setting or checkpoint."""

from __future__ import annotations

import sys

from slipstream.turns import run_process
from workers.evaluator.worker import run

if __name__ == "__main__":
    sys.exit(run_process("workers.evaluator", run))
