"""`python -m services.promoter`: move the pointer until SIGTERM; exit code 2 for a wrong setting or checkpoint."""

from __future__ import annotations

import sys

from services.promoter.service import run
from slipstream.turns import run_process

if __name__ == "__main__":
    sys.exit(run_process("services.promoter", run))
