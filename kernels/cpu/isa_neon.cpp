// The operations compiled for ARM's NEON with its dot products; a null table where the library is not built for AArch64. Flags for this
// file: setup.py.
#if defined(__aarch64__)
#define BRAID_NEON
#include "layer.h"
const Table* neon_table() {
    static constexpr Table table = table_of("neon");
    return &table;
}
#else
#include "braid_cpu.h"
const Table* neon_table() { return nullptr; }
#endif
