// What is done row by row: residual + RMSNorm, quantisation to int8, rotation and K/V store, gated activation, embedding.
// A row's arithmetic depends on that row alone. No products and no attention. Included by the isa_*.cpp files.
#pragma once
#include "lanes.h"

namespace {

#if defined(BRAID_AVX512)
constexpr int kOffset = 128;  // vpdpbusd multiplies unsigned by signed bytes, so activations are stored + 128, for grouped weights as they are
constexpr int kMostRows = 12, kMostGroupedRows = 12;
#elif defined(BRAID_AVX2)
constexpr int kOffset = 0;
constexpr int kMostRows = 4, kMostGroupedRows = 4;
#else
constexpr int kOffset = 0;
constexpr int kMostRows = 4, kMostGroupedRows = 4;
#endif
constexpr int64_t kGroup = 32;  // inputs that share a scale where weights are grouped

// Rows of int8 for a product: [bands][quads][rows][4], so that a product reads the rows of a band from one place per quad. scales: one a
// row; for grouped weights [bands][groups][rows], and beside them, of the same shape, the sum of each group's numbers times its scale,
// which is what the weights' offsets are multiplied by. The rows behind the last one are never stored anywhere, whatever they hold.
struct Activations {
    uint8_t* bytes;
    float *scales, *sums;
    int64_t num_rows, width, rows, quads;
    bool is_grouped;
    int64_t num_bands() const { return ceil_div(num_rows, rows); }
    int64_t num_groups() const { return width / kGroup; }
    uint8_t* band(int64_t index) const { return bytes + index * quads * rows * 4; }
    int64_t scale_of(int64_t band) const { return band * rows * (is_grouped ? num_groups() : 1); }
};

// For a product with this weight.
INLINE Activations reserve_activations(Context& context, int64_t num_rows, const Matrix& weight) {
    Activations a{};
    a.num_rows = num_rows;
    a.width = weight.in;
    a.is_grouped = weight.group_bits != 0;
    a.rows = ceil_div(num_rows, ceil_div(num_rows, a.is_grouped ? kMostGroupedRows : kMostRows));
    a.quads = ceil_div(a.width, 4);
    a.bytes = static_cast<uint8_t*>(context.bytes.reserve(static_cast<size_t>(a.num_bands() * a.rows * a.quads * 4)));
    const int64_t num_scales = a.scale_of(a.num_bands());
    a.scales = static_cast<float*>(context.scales.reserve(static_cast<size_t>(2 * num_scales) * sizeof(float)));
    a.sums = a.scales + num_scales;
    return a;
}

// Calls body(row) for every row that is to be quantised, a band at a time: its rows share cache lines, which threads would take from
// each other.
template <class Body>
void parallel_bands(Context& context, const Activations& a, Body&& body) {
    const int64_t rows = a.num_bands() < context.pool.size() ? most(1, 8192 / a.width) : a.rows;  // of few rows in wide models, some
    parallel(context, ceil_div(a.num_rows, rows), [&](int64_t tile, int) {
        for (int64_t row = tile * rows; row < least(a.num_rows, (tile + 1) * rows); ++row) body(row);
    });
}

INLINE float largest(const float* x, int64_t width) {
    V top = V{};
    int64_t i = 0;
    for (; i + W <= width; i += W) top = max(absolute(load(x + i)), top);
    float result = max_lanes(top);
    for (; i < width; ++i) result = std::fabs(x[i]) > result ? std::fabs(x[i]) : result;
    return result;
}

INLINE float scale_for(float amax) {
    const float scale = amax / 127.0f;
    return scale > 0.0f ? scale : 1.0f;
}

// Ties to even, like the reference.
INLINE VI quantized(V x, float scale) { return round_to_int(min(max(x / splat(scale), splat(-127.0f)), splat(127.0f))); }

// W numbers as bytes, four of them every `stride` bytes.
INLINE void store_bytes(uint8_t* out, int64_t stride, VI wide) {
#if defined(BRAID_AVX512)
    alignas(16) uint32_t quads[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(wide)));
    for (int q = 0; q < 4; ++q) std::memcpy(out + q * stride, &quads[q], 4);
#elif defined(BRAID_NEON)
    const int16x4_t narrow = vmovn_s32(wide);
    const uint32_t quad = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(narrow, narrow))), 0);
    std::memcpy(out, &quad, 4);
    (void)stride;  // one quad
#else
    for (int lane = 0; lane < W; ++lane) out[lane / 4 * stride + lane % 4] = static_cast<uint8_t>(wide[lane]);
#endif
}

// Symmetric int8 with a scale of their own for every 32 numbers.
INLINE void quantize_groups(const float* x, const Activations& a, int64_t row) {
    const int64_t band = row / a.rows, of_row = row % a.rows, stride = a.rows * 4, first = a.scale_of(band) + of_row;
    uint8_t* out = a.band(band) + of_row * 4;
    for (int64_t g = 0; g < a.num_groups(); ++g, x += kGroup) {
        const float scale = scale_for(largest(x, kGroup));
        VI total{};
        for (int64_t i = 0; i < kGroup; i += W, out += stride * (W / 4)) {
            const VI wide = quantized(load(x + i), scale);
            store_bytes(out, stride, wide);
            total += wide;
        }
        a.scales[first + g * a.rows] = scale;
        a.sums[first + g * a.rows] = scale * sum_lanes(to_float(total));
    }
}

// Symmetric int8 with the row's own scale, its absolute maximum / 127, or with one for each group where the weights have groups.
INLINE void quantize_row(const float* x, const Activations& a, int64_t row) {
    if (a.is_grouped) return quantize_groups(x, a, row);
    const float scale = scale_for(largest(x, a.width));
    a.scales[row] = scale;
    uint8_t* out = a.band(row / a.rows) + row % a.rows * 4;
    const int64_t stride = a.rows * 4;
    int64_t i = 0;
    for (; i + W <= a.width; i += W, out += stride * (W / 4)) store_bytes(out, stride, quantized(load(x + i), scale) + kOffset);
    for (; i < a.width; ++i, out += i % 4 == 0 ? stride : 0)  // fewer than W numbers
        out[i % 4] = static_cast<uint8_t>(quantized(splat(x[i]), scale)[0] + kOffset);
    for (; i % 4 != 0; ++i) out[i % 4] = kOffset;
}

INLINE float root_mean_square(const float* x, int64_t width, float eps) {
    V sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= width; i += 4 * W)
        for (int j = 0; j < 4; ++j) sums[j] = fma(load(x + i + j * W), load(x + i + j * W), sums[j]);
    for (; i + W <= width; i += W) sums[0] = fma(load(x + i), load(x + i), sums[0]);
    float sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < width; ++i) sum += x[i] * x[i];
    return 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
}

// normed may be x. Source: Zhang and Sennrich 2019, equation 4.
INLINE void norm_row(const float* x, const float* weight, float eps, float* normed, int64_t width) {
    const float factor = root_mean_square(x, width, eps);
    int64_t i = 0;
    for (; i + W <= width; i += W) store(normed + i, load(x + i) * splat(factor) * load(weight + i));
    for (; i < width; ++i) normed[i] = x[i] * factor * weight[i];
}

INLINE void add_row(float* sum, const float* x, const float* residual, int64_t width) {
    int64_t i = 0;
    for (; i + W <= width; i += W) store(sum + i, load(residual + i) + load(x + i));
    for (; i < width; ++i) sum[i] = residual[i] + x[i];
}

// residual += x (null: residual as it is); RMSNorm; int8. `normed` is a row of the caller's memory.
INLINE void add_norm_quantize(const float* x, float* residual, const float* weight, float eps, float* normed, const Activations& a,
                              int64_t row) {
    if (x != nullptr) add_row(residual, x, residual, a.width);
    norm_row(residual, weight, eps, normed, a.width);
    quantize_row(normed, a, row);
}

// Pairs (i, i + H / 2). Source: Su et al. 2021, section 3.4.2, in half-split order.
INLINE void rotate(const float* x, const float* cosine, float* out, int64_t half) {
    const float* sine = cosine + half;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const V low = load(x + i), high = load(x + i + half), c = load(cosine + i), s = load(sine + i);
        store(out + i, low * c - high * s);
        store(out + i + half, high * c + low * s);
    }
    for (; i < half; ++i) {
        const float low = x[i], high = x[i + half];
        out[i] = low * cosine[i] - high * sine[i];
        out[i + half] = high * cosine[i] + low * sine[i];
    }
}

// step: between two numbers in the pool. scale: where the one of int8 goes, the numbers' absolute maximum / 127.
INLINE void store_head(void* pool, int64_t at, int64_t step, float* scale, const float* x, const KV& kv) {
    if (kv.bits == 16) {
        uint16_t* out = static_cast<uint16_t*>(pool) + at;
        for (int64_t i = 0; i < kv.head_width; ++i) out[i * step] = to_bf16(x[i]);
    } else if (kv.bits == 8) {
        int8_t* out = static_cast<int8_t*>(pool) + at;
        *scale = scale_for(largest(x, kv.head_width));
        int64_t i = 0;
        for (; i + W <= kv.head_width; i += W) {
            const Bytes numbers = __builtin_convertvector(quantized(load(x + i), *scale), Bytes);
            int8_t bytes[W];
            std::memcpy(bytes, &numbers, W);
            if (step == 1)
                std::memcpy(out + i, bytes, W);
            else
                for (int lane = 0; lane < W; ++lane) out[(i + lane) * step] = bytes[lane];
        }
        for (; i < kv.head_width; ++i) out[i * step] = static_cast<int8_t>(quantized(splat(x[i]), *scale)[0]);
    } else {
        float* out = static_cast<float*>(pool) + at;
        for (int64_t i = 0; i < kv.head_width; ++i) out[i * step] = x[i];
    }
}

// One token's row of the product [(N + 2K) * H], which is worked on in place: norms, rotation, q out, K and V into the slot.
INLINE void write_token(const Layer& layer, const KV& kv, float* row, int64_t position, int64_t slot, float* q) {
    const int64_t width = layer.head_width, num_heads = layer.num_heads, num_kv_heads = layer.num_kv_heads;
    const float* angles = layer.rotary + position * width;
    for (int64_t head = 0; head < num_heads; ++head) {
        float* x = row + head * width;
        if (layer.q_norm != nullptr) norm_row(x, layer.q_norm, layer.eps, x, width);
        rotate(x, angles, q + head * width, width / 2);
    }
    if (slot < 0) return;
    const int64_t block = slot / kv.block_size, place = slot % kv.block_size;
    for (int64_t head = 0; head < num_kv_heads; ++head) {
        float* k = row + (num_heads + head) * width;
        if (layer.k_norm != nullptr) norm_row(k, layer.k_norm, layer.eps, k, width);
        rotate(k, angles, k, width / 2);
        const int64_t scale = block * kv.scale_block + head * kv.scale_head + place;
        store_head(kv.keys, block * kv.key_block + head * kv.key_head + place * kv.key_place, kv.key_number, kv.key_scales + scale, k, kv);
        store_head(kv.values, block * kv.value_block + head * kv.value_head + place * kv.value_place, 1, kv.value_scales + scale,
                   k + num_kv_heads * width, kv);
    }
}

INLINE int64_t group_bytes(const Matrix& weight) { return weight.group_bits * 64 + 64; }
INLINE int64_t strip_bytes(const Matrix& weight) {
    return weight.group_bits == 0 ? ceil_div(weight.in, 4) * 64 : weight.in / kGroup * group_bytes(weight);
}

INLINE void embed_groups(const Matrix& table, const uint8_t* strip, int64_t of_strip, float* out) {
    const int64_t lines = table.group_bits * 64;
    for (const uint8_t* group = strip; group < strip + strip_bytes(table); group += group_bytes(table), out += kGroup) {
        uint16_t numbers[2];
        for (int n = 0; n < 2; ++n) std::memcpy(&numbers[n], group + lines + n * 32 + of_strip * 2, 2);
        const float scale = half_to_float(numbers[0]), offset = half_to_float(numbers[1]);
        for (int64_t i = 0; i < kGroup; ++i) {
            const int64_t line = table.group_bits == 8 ? i / 4 : i / 4 % 4;
            const uint8_t byte = group[line * 64 + of_strip * 4 + i % 4];
            const uint8_t number = table.group_bits == 8 ? byte : i < kGroup / 2 ? byte & 15 : byte >> 4;
            out[i] = scale * static_cast<float>(number) + offset;
        }
    }
}

template <bool kIsGelu>
INLINE void gated_row(const float* gate_up, float* out, int64_t width) {
    int64_t i = 0;
    for (; i + W <= width; i += W) store(out + i, activate<kIsGelu>(load(gate_up + i)) * load(gate_up + width + i));
    for (; i < width; ++i) out[i] = activate<kIsGelu>(splat(gate_up[i]))[0] * gate_up[width + i];
}

// A row of the table out of its strips.
INLINE void embed_row(const Matrix& table, int64_t id, float* out) {
    const uint8_t* strip = table.data + id / 16 * strip_bytes(table);
    if (table.group_bits != 0) return embed_groups(table, strip, id % 16, out);
    for (int64_t i = 0; i < table.in; ++i)
        out[i] = static_cast<float>(static_cast<int8_t>(strip[i / 4 * 64 + id % 16 * 4 + i % 4])) * table.scales[id];
}

}  // namespace
