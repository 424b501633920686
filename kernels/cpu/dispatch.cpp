// The exported functions: pick an instruction set, then pass every call on to its table. No arithmetic. Called by library.py.
#include <algorithm>
#include <cstring>
#include <functional>
#include <new>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "braid_cpu.h"

namespace {

bool can_run_avx2() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;  // float16 is not among the names that every compiler's builtin knows
    const bool has_half = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
    return has_half && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

bool can_run_avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

// NEON itself is part of AArch64; its dot products of int8 came with version 8.2.
bool can_run_neon() {
#if defined(__aarch64__) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    int has_dot = 0;
    size_t size = sizeof has_dot;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has_dot, &size, nullptr, 0) == 0 && has_dot != 0;
#else
    return false;
#endif
}

// The first that this machine can run, the best one, or the one so named.
const Table* find_table(const char* name) {
    const Table* runnable[] = {can_run_avx512() ? avx512_table() : nullptr, can_run_avx2() ? avx2_table() : nullptr,
                               can_run_neon() ? neon_table() : nullptr, generic_table()};
    for (const Table* table : runnable)
        if (table != nullptr && (*name == '\0' || std::strcmp(table->name, name) == 0)) return table;
    return nullptr;
}

// An exception must not cross into C. The only one there can be is a lack of memory.
template <class Body>
int guarded(int64_t num_rows, Body&& body) {
    try {
        if (num_rows > 0) body();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

// Here and not in sample.h, because the library's templates compiled for one instruction set could be linked into another's code.
void sort_descending(float* first, float* last) { std::sort(first, last, std::greater<float>()); }

// Mutates: the order of [first, last). n begins at 1.
float nth_highest(float* first, float* last, int64_t n) {
    std::nth_element(first, first + n - 1, last, std::greater<float>());
    return first[n - 1];
}

#define BRAID_API extern "C" __attribute__((visibility("default")))

// isa: "avx512", "avx2", "neon", "generic", or "" for the best that this machine can run; null when it can't run the one asked for.
// spin_us: how long a thread without work looks for some before it sleeps.
BRAID_API Context* braid_create(const char* isa, int32_t num_threads, int32_t spin_us) {
    const Table* table = find_table(isa);
    if (table == nullptr) return nullptr;
    try {
        return new Context(table, num_threads, spin_us);
    } catch (...) {
        return nullptr;
    }
}

BRAID_API void braid_destroy(Context* context) { delete context; }

BRAID_API const char* braid_isa(const Context* context) { return context->table->name; }

BRAID_API int braid_qkv(Context* c, const Layer* layer, const KV* kv, const Batch* batch, const float* x, float* residual,
                        int32_t has_residual, const int64_t* positions, float* q, int64_t num_tokens) {
    return guarded(num_tokens, [&] { c->table->qkv(*c, *layer, *kv, *batch, x, residual, has_residual != 0, positions, q, num_tokens); });
}

BRAID_API int braid_attend(Context* c, const KV* kv, const Batch* batch, const Spec* spec, const float* q, float* y, int64_t num_heads,
                           int64_t num_tokens) {
    return guarded(num_tokens, [&] { c->table->attend(*c, *kv, *batch, *spec, q, y, num_heads, num_tokens); });
}

// Every layer in turn, all of one shape. x: what comes in, and out of the last one; residual: only written.
BRAID_API int braid_layers(Context* c, int64_t num_layers, const Layer* const* layers, const Spec* specs, const KV* const* pools,
                           const Batch* const* batches, float* x, float* residual, const int64_t* positions, int64_t num_tokens) {
    return guarded(num_tokens, [&] {
        const auto size = static_cast<size_t>(num_tokens * layers[0]->num_heads * layers[0]->head_width) * sizeof(float);
        auto* q = static_cast<float*>(c->queries.reserve(size));
        auto* y = static_cast<float*>(c->answers.reserve(size));
        for (int64_t at = 0; at < num_layers; ++at) {
            c->table->qkv(*c, *layers[at], *pools[at], *batches[at], x, residual, at > 0, positions, q, num_tokens);
            c->table->attend(*c, *pools[at], *batches[at], specs[at], q, y, layers[at]->num_heads, num_tokens);
            c->table->out_mlp(*c, *layers[at], y, residual, x, num_tokens);
        }
    });
}

BRAID_API int braid_out_mlp(Context* c, const Layer* layer, const float* y, float* residual, float* x, int64_t num_tokens) {
    return guarded(num_tokens, [&] { c->table->out_mlp(*c, *layer, y, residual, x, num_tokens); });
}

BRAID_API int braid_linear(Context* c, const Matrix* weight, const float* x, float* out, int64_t num_rows) {
    return guarded(num_rows, [&] { c->table->linear(*c, *weight, x, out, num_rows); });
}

// 3: some row needs all its logits: take braid_linear and braid_sample.
BRAID_API int braid_draw(Context* c, const Matrix* head, const float* x, const Draw* draw, int64_t* ids, int64_t num_rows) {
    bool is_done = true;
    const int status = guarded(num_rows, [&] { is_done = c->table->draw(*c, *head, x, *draw, ids, num_rows); });
    return status != 0 ? status : is_done ? 0 : 3;
}

// 2: an id lies outside the table.
BRAID_API int braid_embed(Context* c, const Matrix* table, const int64_t* ids, float* out, int64_t num_tokens) {
    for (int64_t t = 0; t < num_tokens; ++t)
        if (ids[t] < 0 || ids[t] >= table->out) return 2;
    return guarded(num_tokens, [&] { c->table->embed(*c, *table, ids, out, num_tokens); });
}

BRAID_API int braid_rms_norm(Context* c, const float* x, const float* residual, const float* weight, float eps, float* normed,
                             float* sum, int64_t num_rows, int64_t width) {
    return guarded(num_rows, [&] { c->table->rms_norm(*c, x, residual, weight, eps, normed, sum, num_rows, width); });
}

BRAID_API int braid_kv_write(Context* c, const Layer* layer, const KV* kv, const Batch* batch, const float* product,
                             const int64_t* positions, float* q, int64_t num_tokens) {
    return guarded(num_tokens, [&] { c->table->kv_write(*c, *layer, *kv, *batch, product, positions, q, num_tokens); });
}

BRAID_API int braid_gated(Context* c, const float* gate_up, float* out, int64_t num_rows, int64_t width, int32_t is_gelu) {
    return guarded(num_rows, [&] { c->table->gated(*c, gate_up, out, num_rows, width, is_gelu != 0); });
}

BRAID_API int braid_sample(Context* c, const float* logits, const Draw* draw, int64_t* ids, int64_t num_rows, int64_t vocab_size) {
    return guarded(num_rows, [&] { c->table->sample(*c, logits, *draw, ids, num_rows, vocab_size); });
}
