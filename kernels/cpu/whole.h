// A tile of paged attention over int8 keys and values in whole numbers, for AVX-512 VNNI: queries and softmax weights become 16 bits with
// a scale for each row, every sum is exact, and a number of 16 bits is multiplied as two of 8 (high and low byte). The other instruction
// sets multiply as many floats in the same time, so they keep to tiles.h. Rounding to 16 bits adds little to what storing keys
// and values in 8 does. Included by attention.h.
#pragma once
#include "rows.h"
#include "tiles.h"

#if defined(BRAID_AVX512)
namespace {

INLINE __m512i four(const void* a, const void* b, const void* c, const void* d) {  // 16 bytes each, one behind another
    const auto at = [](const void* p) ALWAYS { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
    const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(at(a)), at(b), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(two, at(c), 2), at(d), 3);
}

// Four rows of 16 bytes become 16 quads, the rows' bytes side by side.
INLINE __m512i quads_of(__m512i rows) {
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, rows), bytes);
}

// 16 numbers of 16 bits as quads of their high and of their low bytes, [4][high, low][4].
INLINE __m256i split_quads(VI numbers) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
    return _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(numbers)), bytes);
}

// What a desk holds here: of each row q as quads of high and low bytes [H / 4][2][4], later its weights likewise [16][2][4]; keys + 128 as
// quads [H / 4][64][4]; values as quads [16][H][4].
struct Whole {
    const AttentionCall& call;
    Desk& desk;
    int8_t* q(int64_t row) const { return reinterpret_cast<int8_t*>(desk.q + row * call.width()); }
    uint8_t* weights(int64_t row) const { return reinterpret_cast<uint8_t*>(desk.scores + row * kTile); }
    uint8_t* keys() const { return reinterpret_cast<uint8_t*>(desk.keys); }
    int8_t* values() const { return reinterpret_cast<int8_t*>(desk.values); }
};

// Of one row: q = factor * (256 high + low), and what 128 too much in every key adds to its sums.
INLINE void split_query(const Whole& whole, int64_t row) {
    const int64_t width = whole.call.width();
    const float* x = whole.desk.q + row * width;
    // Both bytes are signed; and sums of products with keys stay within 32 bits for any width.
    const float most_of_it = static_cast<float>(least(127 * 256 + 127, INT32_MAX / (128 * width)));
    const float amax = largest(x, width), factor = amax > 1e-30f ? amax / most_of_it : 1.0f, inverse = 1.0f / factor;
    const __m256i sign_of_low = _mm256_set1_epi64x(static_cast<int64_t>(0x8080808000000000));
    VU total{};
    for (int64_t h = 0; h < width; h += W) {  // in place: behind what has been read
        const VI number = round_to_int(load(x + h) * splat(inverse));
        total += reinterpret_cast<VU>(number);
        const __m256i quads = _mm256_xor_si256(split_quads(reinterpret_cast<VI>(reinterpret_cast<VU>(number) + 128u)), sign_of_low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole.q(row) + 2 * h), quads);
    }
    whole.desk.factors[row] = factor * whole.call.spec.scale;
    whole.desk.excess[row] = static_cast<int32_t>(128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(reinterpret_cast<__m512i>(total))));
}

// A group of 16 keys that lie as columns in one block, and its values. Places that no query sees may hold anything: whole numbers spoil
// nothing when their weight is zero.
INLINE void load_group(const Whole& whole, const int8_t* keys, const int8_t* values, int64_t group) {
    const KV& kv = whole.call.kv;
    const int64_t width = whole.call.width(), step = kv.key_number, row = kv.value_place;
    uint8_t* to_keys = whole.keys() + group * 64;
    for (int64_t h = 0; h < width; h += 4, keys += 4 * step, to_keys += kTile * 4) {
        const __m512i columns = step == 16 ? _mm512_loadu_si512(keys) : four(keys, keys + step, keys + 2 * step, keys + 3 * step);
        _mm512_store_si512(to_keys, _mm512_xor_si512(quads_of(columns), _mm512_set1_epi8(-128)));
    }
    int8_t* to_values = whole.values() + group * 16 * width;
    for (int64_t i = 0; i < 16; i += 4, values += 4 * row)
        for (int64_t h = 0; h < width; h += W, to_values += 64)
            _mm512_store_si512(to_values, quads_of(four(values + h, values + row + h, values + 2 * row + h, values + 3 * row + h)));
}

INLINE void clear_group(const Whole& whole, int64_t group) {
    const int64_t width = whole.call.width();
    for (int64_t q = 0; q < width / 4; ++q) std::memset(whole.keys() + q * kTile * 4 + group * 64, 0, 64);
    std::memset(whole.values() + group * 16 * width, 0, static_cast<size_t>(16 * width));
}

// Any other layout, number by number.
void load_places(const AttentionCall& call, const Item& item, const Sight& sight, int64_t base, int64_t count, const Whole& whole) {
    const int64_t width = call.width();
    const int8_t *keys[kTile], *values[kTile];
    find_rows(call, item, sight, base, count, keys, values);
    for (int64_t i = 0; i < ceil_div(count, W) * W; ++i)
        for (int64_t h = 0; h < width; ++h) {
            whole.keys()[(h / 4 * kTile + i) * 4 + h % 4] = static_cast<uint8_t>((keys[i] != nullptr ? keys[i][h * call.kv.key_number] : 0) + 128);
            whole.values()[(i / 4 * width + h) * 4 + i % 4] = values[i] != nullptr ? values[i][h] : int8_t{0};
        }
}

void load_whole(const AttentionCall& call, const Item& item, const Sight& sight, int64_t base, int64_t count, const Whole& whole) {
    const KV& kv = call.kv;
    if (kv.key_place != 1 || kv.block_size % W != 0) return load_places(call, item, sight, base, count, whole);
    const int32_t* table = call.batch.block_table + item.sequence * call.batch.table_stride;
    const int8_t *keys = static_cast<const int8_t*>(kv.keys) + item.head * kv.key_head, *values = static_cast<const int8_t*>(kv.values) + item.head * kv.value_head;
    const uint64_t seen = sight.any_bits(base) & below(count);
    for (int64_t i = 0; i < count; i += W) {
        if ((seen >> i & 0xffff) == 0) {  // its block may be another's by now
            clear_group(whole, i / W);
            continue;
        }
        const int64_t block = table[(base + i) / kv.block_size], place = (base + i) % kv.block_size;
        load_group(whole, keys + block * kv.key_block + place, values + block * kv.value_block + place * kv.value_place, i / W);
    }
}

INLINE __m512i quad_at(const uint8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
}

// What sums of high and of low bytes are together.
// Unsigned, because before the excess is taken off they may pass 2^31.
INLINE VU joined(const int32_t (&sums)[2][16]) { return (reinterpret_cast<VU>(load_int(sums[0])) << 8) + reinterpret_cast<VU>(load_int(sums[1])); }

// sums[r][j] = rows of bytes a [R][depth][high, low][4] times quads b [depth][columns][4], C * 16 columns of them. kIsKeys: b is the
// unsigned factor, else a. Never inlined, and high and low sums leave it apart: else GCC 12 keeps them on the stack (2.5 x as slow).
template <int R, int C, bool kIsKeys>
__attribute__((noinline)) void multiply_whole(const uint8_t* a, int64_t row_bytes, const uint8_t* b, int64_t columns, int64_t depth, const void** lines, int32_t (*sums)[C][2][16]) {
    __m512i high[R][C], low[R][C];
    each<R>([&](auto r) ALWAYS { each<C>([&](auto j) ALWAYS { high[r][j] = low[r][j] = _mm512_setzero_si512(); }); });
    for (int64_t k = 0; k < depth; ++k, a += 8, b += columns * 4) {
        if (lines != nullptr) each<2 * Ahead::kEach>([&](auto i) ALWAYS { prefetch(lines[k * 2 * Ahead::kEach + i]); });
        __m512i quads[C];
        each<C>([&](auto j) ALWAYS { quads[j] = _mm512_load_si512(b + j * 64); });
        each<R>([&](auto r) ALWAYS {
            const __m512i x = quad_at(a + r * row_bytes), y = quad_at(a + r * row_bytes + 4);
            each<C>([&](auto j) ALWAYS {
                high[r][j] = kIsKeys ? _mm512_dpbusd_epi32(high[r][j], quads[j], x) : _mm512_dpbusd_epi32(high[r][j], x, quads[j]);
                low[r][j] = kIsKeys ? _mm512_dpbusd_epi32(low[r][j], quads[j], y) : _mm512_dpbusd_epi32(low[r][j], y, quads[j]);
            });
        });
    }
    each<R>([&](auto r) ALWAYS {
        each<C>([&](auto j) ALWAYS {
            _mm512_store_si512(sums[r][j][0], high[r][j]);
            _mm512_store_si512(sums[r][j][1], low[r][j]);
        });
    });
}

// The scores of R rows from `row` on as whole numbers, for so many groups of 16 keys.
template <int R>
void score_whole(const Whole& whole, int64_t row, int64_t num_groups, Ahead& ahead) {
    const int64_t width = whole.call.width();
    constexpr int C = R > 3 ? 2 : 4;
    const auto some = [&](auto c, int64_t group) ALWAYS {
        alignas(64) int32_t sums[R][decltype(c)::value][2][16];
        multiply_whole<R, decltype(c)::value, true>(reinterpret_cast<const uint8_t*>(whole.q(row)), 4 * width, whole.keys() + group * 64, kTile, width / 4, ahead.take(width / 2), sums);
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < decltype(c)::value; ++j) {
                const VU exact = joined(sums[r][j]) - static_cast<uint32_t>(whole.desk.excess[row + r]);
                std::memcpy(whole.desk.scores + (row + r) * kTile + (group + j) * W, &exact, sizeof exact);
            }
    };
    int64_t group = 0;
    for (; group + C <= num_groups; group += C) some(std::integral_constant<int, C>{}, group);
    for (; group < num_groups; ++group) some(std::integral_constant<int, 1>{}, group);
}

// sums += weights times values, of R rows from `row` on, over so many quads of keys.
template <int R>
void add_whole(const Whole& whole, int64_t row, int64_t num_quads, Ahead& ahead) {
    const int64_t width = whole.call.width();
    constexpr int C = R > 3 ? 2 : 4;
    const auto some = [&](auto c, int64_t h) ALWAYS {
        alignas(64) int32_t sums[R][decltype(c)::value][2][16];
        multiply_whole<R, decltype(c)::value, false>(whole.weights(row), kTile * 4, reinterpret_cast<const uint8_t*>(whole.values()) + h * 4, width, num_quads, ahead.take(num_quads * 2), sums);
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < decltype(c)::value; ++j) {
                float* to = whole.desk.sums + (row + r) * width + h + j * W;
                store(to, fma(to_float(reinterpret_cast<VI>(joined(sums[r][j]))), splat(whole.desk.shares[row + r]), load(to)));
            }
    };
    int64_t h = 0;
    for (; h + C * W <= width; h += C * W) some(std::integral_constant<int, C>{}, h);
    for (; h < width; h += W) some(std::integral_constant<int, 1>{}, h);
}

// e^(x - top) to about 3 ulp, exactly 1 at the top. Source: 2^n times a polynomial of degree 5 for the rest, fitted to the least largest
// relative error (9e-8) with its first coefficient held at 1.
INLINE V power(V x, float top) {
    const V scaled = (x - splat(top)) * splat(1.44269504088896341f);
    const V whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = scaled - whole;
    V p = splat(1.326472e-3f);
    p = fma(p, rest, splat(9.671513e-3f));
    p = fma(p, rest, splat(5.5507336e-2f));
    p = fma(p, rest, splat(2.4022242e-1f));
    p = fma(p, rest, splat(6.93147e-1f));
    p = fma(p, rest, splat(1.0f));
    return _mm512_scalef_ps(p, whole);
}

// The keys of a tile that each of N rows from `row` on sees.
template <int N>
INLINE bool see(const Whole& whole, const Sight& sight, int64_t base, int64_t columns, int64_t row, uint64_t (&seen)[N]) {
    bool is_open = true;
    for (int n = 0; n < N; ++n) {
        const int64_t position = sight.first + (row + n) / whole.call.group();
        seen[n] = sight.bound_bits(position, position, base) & sight.near_bits(position, base);
        is_open &= (~seen[n] & below(columns)) == 0;
    }
    return is_open;
}

// Scores of N rows become weights of 16 bits against the running maxima; sums so far are scaled to new ones. columns: a multiple of 16.
// kIsOpen: every key is seen. Several rows at once, because each is one long chain of dependent operations.
template <int N, bool kIsOpen>
INLINE void soften_some(const Whole& whole, const uint64_t (&seen)[N], int64_t columns, int64_t row) {
    const Desk& desk = whole.desk;
    const int64_t num_groups = columns / W;
    const V hidden = splat(kNothing);
    V s[N][kTile / W], top[N], weight[N], heaviest[N];
    float before[N], now[N];
    each<N>([&](auto n) ALWAYS { top[n] = hidden, weight[n] = heaviest[n] = V{}; });
    each<kTile / W>([&](auto j) ALWAYS {
        if (j >= num_groups) return;
        const V scales = load(desk.key_scales + j * W);
        each<N>([&](auto n) ALWAYS {
            const V exact = to_float(load_int(reinterpret_cast<const int32_t*>(desk.scores + (row + n) * kTile) + j * W));
            s[n][j] = softcapped(exact * (splat(desk.factors[row + n]) * scales), whole.call.spec);
            if (!kIsOpen) s[n][j] = _mm512_mask_blend_ps(static_cast<__mmask16>(seen[n] >> (j * W)), hidden, s[n][j]);
            top[n] = _mm512_max_ps(top[n], s[n][j]);
        });
    });
    each<N>([&](auto n) ALWAYS {
        before[n] = desk.maxima[row + n];
        const float here = _mm512_reduce_max_ps(top[n]);
        now[n] = here > before[n] ? here : before[n];
    });
    each<kTile / W>([&](auto j) ALWAYS {
        if (j >= num_groups) return;
        const V scales = load(desk.value_scales + j * W);
        each<N>([&](auto n) ALWAYS {
            V p = power(s[n][j], now[n]);
            if (!kIsOpen) p = _mm512_maskz_mov_ps(static_cast<__mmask16>(seen[n] >> (j * W)), p);
            weight[n] += p;
            s[n][j] = p * scales;
            heaviest[n] = _mm512_max_ps(heaviest[n], s[n][j]);
        });
    });
    each<N>([&](auto n) ALWAYS {
        const float most_of_it = _mm512_reduce_max_ps(heaviest[n]);
        const bool is_any = most_of_it > 1e-30f;
        const V inverse = splat(is_any ? 65535.0f / most_of_it : 1.0f);
        desk.shares[row + n] = is_any ? most_of_it * (1.0f / 65535.0f) : 1.0f;
        uint8_t* bytes = whole.weights(row + n);
        each<kTile / W>([&](auto j) ALWAYS {
            if (j >= num_groups) return;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + 2 * j * W), split_quads(round_to_int(s[n][j] * inverse)));
        });
    });
    each<N>([&](auto n) ALWAYS {
        if (now[n] != before[n]) rescale(desk, row + n, now[n], whole.call.width());
        desk.weights[row + n] += _mm512_reduce_add_ps(weight[n]);
    });
}

template <int N>
__attribute__((noinline)) void soften_whole(const Whole& whole, const Sight& sight, int64_t base, int64_t columns, int64_t row) {
    uint64_t seen[N];
    if (see(whole, sight, base, columns, row, seen))
        soften_some<N, true>(whole, seen, columns, row);
    else
        soften_some<N, false>(whole, seen, columns, row);
}

// body(rows from here on, as a constant) over all rows, six at a time.
template <class Body>
INLINE void in_sixes(int64_t rows, Body&& body) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) body(std::integral_constant<int, 6>{}, row);
    switch (rows - row) {
        case 5: return body(std::integral_constant<int, 5>{}, row);
        case 4: return body(std::integral_constant<int, 4>{}, row);
        case 3: return body(std::integral_constant<int, 3>{}, row);
        case 2: return body(std::integral_constant<int, 2>{}, row);
        case 1: return body(std::integral_constant<int, 1>{}, row);
    }
}

void attend_whole(const AttentionCall& call, const Item& item, const Sight& sight, int64_t rows, int64_t base, int64_t count, Desk& desk, Ahead& ahead) {
    const Whole whole{call, desk};
    const int64_t columns = ceil_div(count, W) * W;
    load_whole(call, item, sight, base, count, whole);
    find_scales(call, item, sight, base, count, desk);
    in_sixes(rows, [&](auto r, int64_t row) { score_whole<decltype(r)::value>(whole, row, columns / W, ahead); });
    int64_t row = 0;
    for (; row + 3 <= rows; row += 3) soften_whole<3>(whole, sight, base, columns, row);
    for (; row < rows; ++row) soften_whole<1>(whole, sight, base, columns, row);
    in_sixes(rows, [&](auto r, int64_t first) { add_whole<decltype(r)::value>(whole, first, columns / 4, ahead); });
}

}  // namespace
#endif
