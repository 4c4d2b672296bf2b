"""What the processor runs: a decoder's forward pass as one call, and its ops one by one; torch and numpy only."""

from slipstream_kernels.build import KernelsUnavailable
from slipstream_kernels.isa import (
    instruction_set,
    is_available,
    set_num_threads,
    supported_sets,
    use_instruction_set,
    why_unavailable,
)

__all__ = [
    "KernelsUnavailable",
    "instruction_set",
    "is_available",
    "set_num_threads",
    "supported_sets",
    "use_instruction_set",
    "why_unavailable",
]
