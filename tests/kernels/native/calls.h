// The library's exported functions, each as one call that takes and gives whole vectors, and says in a finding when its status or the
// guards around its outputs are wrong. No expected result here. Included by check.cpp.
#pragma once
#include "inputs.h"

extern "C" {
Context* braid_create(const char* isa, int32_t num_threads, int32_t spin_us);
void braid_destroy(Context*);
const char* braid_isa(const Context*);
int braid_qkv(Context*, const Layer*, const KV*, const Batch*, const float* x, float* residual, int32_t has_residual,
              const int64_t* positions, float* q, int64_t num_tokens);
int braid_attend(Context*, const KV*, const Batch*, const Spec*, const float* q, float* y, int64_t num_heads, int64_t num_tokens);
int braid_out_mlp(Context*, const Layer*, const float* y, float* residual, float* x, int64_t num_tokens);
int braid_linear(Context*, const Matrix*, const float* x, float* out, int64_t num_rows);
int braid_draw(Context*, const Matrix* head, const float* x, const Draw*, int64_t* ids, int64_t num_rows);
int braid_embed(Context*, const Matrix*, const int64_t* ids, float* out, int64_t num_tokens);
int braid_rms_norm(Context*, const float* x, const float* residual, const float* weight, float eps, float* normed, float* sum,
                   int64_t num_rows, int64_t width);
int braid_kv_write(Context*, const Layer*, const KV*, const Batch*, const float* product, const int64_t* positions, float* q,
                   int64_t num_tokens);
int braid_gated(Context*, const float* gate_up, float* out, int64_t num_rows, int64_t width, int32_t is_gelu);
int braid_sample(Context*, const float* logits, const Draw*, int64_t* ids, int64_t num_rows, int64_t vocab_size);
}

namespace {

Floats linear(Context* c, Finding& f, const Weights& w, const Floats& x) {
    const int64_t rows = static_cast<int64_t>(x.size()) / w.in;
    Output<float> out(rows * w.out);
    const Matrix matrix = w.matrix();
    const int status = braid_linear(c, &matrix, x.data(), out.data(), rows);
    return out.taken(f, status);
}

// The normed rows, and behind them the sums.
Floats rms_norm(Context* c, Finding& f, const Floats& x, const Floats* residual, const Floats& weight, float eps) {
    const auto count = static_cast<int64_t>(x.size()), width = static_cast<int64_t>(weight.size());
    Output<float> normed(count), sum(count);
    const int status = braid_rms_norm(c, x.data(), residual == nullptr ? nullptr : residual->data(), weight.data(), eps, normed.data(),
                                      sum.data(), count / width, width);
    Floats both = normed.taken(f, status);
    const Floats sums = residual == nullptr ? x : sum.taken(f, status);
    both.insert(both.end(), sums.begin(), sums.end());
    return both;
}

Floats gated(Context* c, Finding& f, const Floats& gate_up, int64_t width, bool is_gelu) {
    const int64_t rows = static_cast<int64_t>(gate_up.size()) / (2 * width);
    Output<float> out(rows * width);
    const int status = braid_gated(c, gate_up.data(), out.data(), rows, width, is_gelu);
    return out.taken(f, status);
}

// Mutates: pool.
Floats kv_write(Context* c, Finding& f, const Layer& layer, const Paged& pool, const Step& step, const Floats& product) {
    Output<float> q(step.num_tokens() * layer.num_heads * layer.head_width);
    const KV kv = pool.kv();
    const Batch batch = step.batch(false);
    const Floats before = product;
    const int status = braid_kv_write(c, &layer, &kv, &batch, product.data(), step.positions.data(), q.data(), step.num_tokens());
    f.expect(product == before, "the product is overwritten");
    return q.taken(f, status);
}

Floats attend(Context* c, Finding& f, const Paged& pool, const Step& step, const Spec& spec, const Floats& q, int64_t num_heads) {
    Output<float> y(static_cast<int64_t>(q.size()));
    const KV kv = pool.kv();
    const Batch batch = step.batch(spec.near.columns > 0);
    const int status = braid_attend(c, &kv, &batch, &spec, q.data(), y.data(), num_heads, step.num_tokens());
    return y.taken(f, status);
}

Ids sample(Context* c, Finding& f, const Floats& logits, const Draws& draws) {
    const Draw draw = draws.draw();
    Output<int64_t> ids(draws.count());
    const int status =
        braid_sample(c, logits.data(), &draw, ids.data(), draws.count(), static_cast<int64_t>(logits.size()) / draws.count());
    return ids.taken(f, status);
}

Ids draw_ids(Context* c, Finding& f, const Weights& head, const Floats& x, const Draws& draws) {
    const Draw draw = draws.draw();
    const Matrix matrix = head.matrix();
    Output<int64_t> ids(draws.count());
    const int status = braid_draw(c, &matrix, x.data(), &draw, ids.data(), draws.count());
    return ids.taken(f, status);
}

}  // namespace
