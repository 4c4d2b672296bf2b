// Names of what Python calls: slipstream_<name>_<instruction set>, so that one library holds every set.
#pragma once

#define SLIPSTREAM_JOIN_(name, isa) slipstream_##name##_##isa
#define SLIPSTREAM_JOIN(name, isa) SLIPSTREAM_JOIN_(name, isa)
#define SLIPSTREAM_EXPORT(name) \
    __attribute__((visibility("default"))) SLIPSTREAM_JOIN(name, SLIPSTREAM_ISA)
