// What this machine could do at best, in the instruction set of the kernels: the roofline they are measured against.
#pragma once

#include <cstdint>

namespace SLIPSTREAM_ISA {

// Seconds in which `num_threads` threads, each with its own part, read `num_bytes` bytes `num_passes` times.
double read_seconds(const void* data, int64_t num_bytes, int32_t num_threads, int32_t num_passes);

// Seconds in which `num_threads` threads do `num_rounds` rounds of multiply-adds each, in registers alone;
// `num_multiply_adds` gets the number of all of them together.
double multiply_add_seconds(int32_t num_threads, int64_t num_rounds, int64_t* num_multiply_adds);

}  // namespace SLIPSTREAM_ISA
