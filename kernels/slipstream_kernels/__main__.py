"""`python -m slipstream_kernels`: compile the kernels now rather than when they are first needed."""

from __future__ import annotations

import sys
import time

from slipstream_kernels.isa import is_available, supported_sets, why_unavailable


def main() -> int:
    """Build and say what came out; 1 where there are no kernels, which the library can do without."""
    started = time.perf_counter()
    if not is_available():
        print(f"no CPU kernels: {why_unavailable()}\ndecoding falls back to torch, several times slower")
        return 1
    print(f"CPU kernels ready in {time.perf_counter() - started:.1f} s; this processor runs {supported_sets()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
