// The operations compiled for any machine, with vectors of four floats that the compiler maps to what there is.
#include "layer.h"

const Table* generic_table() {
    static constexpr Table table = table_of("generic");
    return &table;
}
