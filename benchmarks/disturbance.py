"""Whether something else ran on this machine while a system was measured."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class Watch:
    """Watches from its construction on what others use of the processors; needs /proc/stat, else nobody is seen."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy_s, self._ours_s = _busy_s(), _ours_s()

    def others_share(self) -> float:
        """Processor time since then that neither this process nor its ended children used, over all there was."""
        others_s = (_busy_s() - self._busy_s) - (_ours_s() - self._ours_s)
        had_s = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        return max(0.0, others_s / had_s)


def _busy_s() -> float:
    """Seconds that all processors together were not idle, this machine's host included (`steal`)."""
    if not _STAT.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft_interrupts, steal = map(int, _STAT.read_text("ascii").split()[1:9])
    return (user + nice + system + interrupts + soft_interrupts + steal) / os.sysconf("SC_CLK_TCK")


def _ours_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
