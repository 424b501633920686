// The coarse operations of a layer and the stand-alone fine ones, put together from rows, products and attention, and the table
// that hands them out. Included by the isa_*.cpp files, each of which becomes one instruction set's version.
#pragma once
#include "attention.h"
#include "head.h"

namespace {

INLINE float* reserve_floats(Scratch& scratch, int64_t count) { return static_cast<float*>(scratch.reserve(static_cast<size_t>(count) * sizeof(float))); }

void kv_write(Context& context, const Layer& layer, const KV& kv, const Batch& batch, const float* product, const int64_t* positions, float* q, int64_t num_tokens) {
    const int64_t row_size = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_width;
    float* rows = const_cast<float*>(product);
    if (rows != context.product.reserve(0)) {  // the caller's numbers are not to be touched
        rows = reserve_floats(context.product, num_tokens * row_size);
        std::memcpy(rows, product, static_cast<size_t>(num_tokens * row_size) * sizeof(float));
    }
    parallel_rows(context, num_tokens, row_size, [&](int64_t row) {
        write_token(layer, kv, rows + row * row_size, positions[row], batch.slots[row], q + row * layer.num_heads * layer.head_width);
    });
}

void qkv(Context& context, const Layer& layer, const KV& kv, const Batch& batch, const float* x, float* residual, bool has_residual, const int64_t* positions,
         float* q, int64_t num_tokens) {
    const Activations a = reserve_activations(context, num_tokens, layer.qkv);
    float* normed = reserve_floats(context.hidden, num_tokens * layer.width);
    parallel_bands(context, a, [&](int64_t row) {
        const int64_t at = row * layer.width;
        if (!has_residual) std::memcpy(residual + at, x + at, static_cast<size_t>(layer.width) * sizeof(float));
        add_norm_quantize(has_residual ? x + at : nullptr, residual + at, layer.attention_norm, layer.eps, normed + at, a, row);
    });
    float* rows = reserve_floats(context.product, num_tokens * layer.qkv.out);
    product(context, a, layer.qkv, PlainStore{layer.qkv.out, layer.qkv_bias, rows});
    kv_write(context, layer, kv, batch, rows, positions, q, num_tokens);
}

void linear(Context& context, const Matrix& weight, const float* x, float* out, int64_t num_rows) {
    const Activations a = reserve_activations(context, num_rows, weight);
    parallel_bands(context, a, [&](int64_t row) { quantize_row(x + row * weight.in, a, row); });
    product(context, a, weight, PlainStore{weight.out, nullptr, out});
}

bool draw(Context& context, const Matrix& head, const float* x, const Draw& wanted, int64_t* ids, int64_t num_rows) {
    for (int64_t row = 0; row < num_rows; ++row)
        if (needs_logits(wanted, row)) return false;
    const Activations a = reserve_activations(context, num_rows, head);
    parallel_bands(context, a, [&](int64_t row) { quantize_row(x + row * head.in, a, row); });
    const HeadStore store(context, wanted, head.out, num_rows);
    product(context, a, head, store);
    for (auto& memory : context.of_thread) memory.reserve(store.finish_bytes());
    std::atomic<bool> is_done{true};
    parallel(context, num_rows, [&](int64_t row, int thread) {
        ids[row] = store.winner(row, context.of_thread[static_cast<size_t>(thread)].reserve(0));
        if (ids[row] < 0) is_done = false;
    });
    return is_done;
}

void out_mlp(Context& context, const Layer& layer, const float* y, float* residual, float* x, int64_t num_tokens) {
    float* sum = reserve_floats(context.product, num_tokens * layer.width);
    linear(context, layer.out, y, sum, num_tokens);
    const Activations a = reserve_activations(context, num_tokens, layer.gate_up);
    parallel_bands(context, a, [&](int64_t row) {
        const int64_t at = row * layer.width;
        if (layer.out_norm != nullptr) norm_row(sum + at, layer.out_norm, layer.eps, sum + at, layer.width);
        add_norm_quantize(sum + at, residual + at, layer.mlp_norm, layer.eps, sum + at, a, row);
    });
    float* hidden = reserve_floats(context.hidden, num_tokens * layer.down.in);
    if (layer.gelu)
        product(context, a, layer.gate_up, GatedStore<true>{layer.gate_up.out / 2, hidden});
    else
        product(context, a, layer.gate_up, GatedStore<false>{layer.gate_up.out / 2, hidden});
    linear(context, layer.down, hidden, x, num_tokens);
    if (layer.down_norm == nullptr) return;
    parallel_rows(context, num_tokens, layer.width, [&](int64_t row) {
        float* of_row = x + row * layer.width;
        norm_row(of_row, layer.down_norm, layer.eps, of_row, layer.width);
    });
}

void embed(Context& context, const Matrix& table, const int64_t* ids, float* out, int64_t num_tokens) {
    parallel_rows(context, num_tokens, table.in, [&](int64_t row) { embed_row(table, ids[row], out + row * table.in); });
}

void rms_norm(Context& context, const float* x, const float* residual, const float* weight, float eps, float* normed, float* sum, int64_t num_rows, int64_t width) {
    parallel_rows(context, num_rows, width, [&](int64_t row) {
        const int64_t at = row * width;
        if (residual != nullptr) add_row(sum + at, x + at, residual + at, width);
        norm_row((residual == nullptr ? x : sum) + at, weight, eps, normed + at, width);
    });
}

void gated(Context& context, const float* gate_up, float* out, int64_t num_rows, int64_t width, bool is_gelu) {
    parallel_rows(context, num_rows, width, [&](int64_t row) {
        const float* from = gate_up + row * 2 * width;
        is_gelu ? gated_row<true>(from, out + row * width, width) : gated_row<false>(from, out + row * width, width);
    });
}

constexpr Table table_of(const char* name) { return Table{name, qkv, attend, out_mlp, linear, embed, rms_norm, kv_write, gated, sample, draw}; }

}  // namespace
