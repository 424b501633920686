// The operations compiled for AVX2; a null table where the library is not built for x86-64. Flags for this file: setup.py.
#if defined(__x86_64__)
#define BRAID_AVX2
#include "layer.h"
const Table* avx2_table() {
    static constexpr Table table = table_of("avx2");
    return &table;
}
#else
#include "braid_cpu.h"
const Table* avx2_table() { return nullptr; }
#endif
