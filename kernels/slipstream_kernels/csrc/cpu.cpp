// Which instruction sets this processor has. Compiled once, for the baseline.
#include <cstring>

extern "C" __attribute__((visibility("default"))) int slipstream_supports(const char* isa) {
    if (std::strcmp(isa, "baseline") == 0) return 1;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (std::strcmp(isa, "avx2") == 0) return has_avx2;
    if (std::strcmp(isa, "avx512") == 0) {
        return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return 0;
}
