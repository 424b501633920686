// The operations compiled for AVX512; a null table where the library is not built for x86-64. Flags for this file: setup.py.
#if defined(__x86_64__)
#define BRAID_AVX512
#include "layer.h"
const Table* avx512_table() {
    static constexpr Table table = table_of("avx512");
    return &table;
}
#else
#include "braid_cpu.h"
const Table* avx512_table() { return nullptr; }
#endif
