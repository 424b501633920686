// The int8 matrix product: u8 or s8 activations by s8 weights, summed exactly in int32, scaled once at the end.
// Exact sums make a row's result independent of how rows and outputs are cut into tiles. Included by the isa_*.cpp files.
#pragma once
#include "rows.h"

namespace {

// Two strips [quads][16][4] that are multiplied together, and the two that will be next: with few rows a product runs at the speed
// of memory, and the processor's own prefetching stops at the end of every page.
struct Pair {
    const int8_t *strip0, *strip1, *next0, *next1;
    int64_t quads;
    // 64 quads, 4 KiB of each strip, ahead; past the end into the strips to come.
    INLINE void prefetch_from(int64_t q) const {
        constexpr int64_t kAhead = 64;
        const bool is_inside = q + kAhead < quads;
        const int64_t at = (is_inside ? q + kAhead : q + kAhead - quads) * 64;
        prefetch((is_inside ? strip0 : next0) + at);
        prefetch((is_inside ? strip1 : next1) + at);
    }
};

// acc[r][0 ... 15] = row r of a group times strip0, acc[r][16 ... 31] times strip1.
using Dot = void (*)(const uint8_t* rows, const Pair& pair, int32_t (*acc)[32]);

#if defined(BRAID_AVX512)
template <int R>
void dot(const uint8_t* rows, const Pair& given, int32_t (*acc)[32]) {
    const Pair pair = given;
    __m512i sums[R][2];
    each<R>([&](auto r) ALWAYS { sums[r][0] = sums[r][1] = _mm512_setzero_si512(); });
    for (int64_t q = 0; q < pair.quads; ++q, rows += R * 4) {
        const __m512i w0 = _mm512_loadu_si512(pair.strip0 + q * 64), w1 = _mm512_loadu_si512(pair.strip1 + q * 64);
        pair.prefetch_from(q);
        each<R>([&](auto r) ALWAYS {
            int32_t quad;
            std::memcpy(&quad, rows + r * 4, 4);
            const __m512i x = _mm512_set1_epi32(quad);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, w0);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, w1);
        });
    }
    each<R>([&](auto r) ALWAYS {
        _mm512_storeu_si512(acc[r], sums[r][0]);
        _mm512_storeu_si512(acc[r] + 16, sums[r][1]);
    });
}
#elif defined(BRAID_AVX2)
// vpmaddubsw saturates at 16 bits, so the sign goes to the activation: |w| * (x * sign w) is at most 128 * 127 * 2 for a pair.
template <int R>
void dot_strip(const uint8_t* rows, const int8_t* strip, const int8_t* next, int64_t quads, int32_t (*acc)[32], int at) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[R][2];
    each<R>([&](auto r) ALWAYS { sums[r][0] = sums[r][1] = _mm256_setzero_si256(); });
    for (int64_t q = 0; q < quads; ++q, rows += R * 4) {
        prefetch(q + 64 < quads ? strip + (q + 64) * 64 : next + (q + 64 - quads) * 64);
        const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(strip + q * 64));
        const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(strip + q * 64 + 32));
        const __m256i size0 = _mm256_abs_epi8(w0), size1 = _mm256_abs_epi8(w1);
        each<R>([&](auto r) ALWAYS {
            int32_t quad;
            std::memcpy(&quad, rows + r * 4, 4);
            const __m256i x = _mm256_set1_epi32(quad);
            const __m256i pair0 = _mm256_maddubs_epi16(size0, _mm256_sign_epi8(x, w0));
            const __m256i pair1 = _mm256_maddubs_epi16(size1, _mm256_sign_epi8(x, w1));
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pair0, ones));
            sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pair1, ones));
        });
    }
    each<R>([&](auto r) ALWAYS {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc[r] + at), sums[r][0]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc[r] + at + 8), sums[r][1]);
    });
}
template <int R>
void dot(const uint8_t* rows, const Pair& pair, int32_t (*acc)[32]) {
    dot_strip<R>(rows, pair.strip0, pair.next0, pair.quads, acc, 0);
    dot_strip<R>(rows, pair.strip1, pair.next1, pair.quads, acc, 16);
}
#else
template <int R>
void dot(const uint8_t* rows, const Pair& pair, int32_t (*acc)[32]) {
    for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half) {
            const int8_t* strip = half == 0 ? pair.strip0 : pair.strip1;
            int32_t sums[16] = {};
            for (int64_t q = 0; q < pair.quads; ++q) {
                int8_t x[4];
                std::memcpy(x, rows + (q * R + r) * 4, 4);
                for (int o = 0; o < 16; ++o) {
                    const int8_t* w = strip + q * 64 + o * 4;
                    sums[o] += x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
                }
            }
            std::memcpy(acc[r] + half * 16, sums, sizeof sums);
        }
}
#endif

#if defined(BRAID_AVX512)
constexpr Dot kDots[] = {dot<1>, dot<2>, dot<3>, dot<4>, dot<5>, dot<6>, dot<7>, dot<8>, dot<9>, dot<10>, dot<11>, dot<12>};
#else
constexpr Dot kDots[] = {dot<1>, dot<2>, dot<3>, dot<4>};
#endif

// W sums of one row, starting at output `at` of the matrix, as floats.
INLINE V scaled(const Matrix& weight, const int32_t* acc, int64_t at, float row_scale) {
    const VI exact = load_int(acc) - kOffset * load_int(weight.sums + at);
    return to_float(exact) * splat(row_scale) * load(weight.scales + at);
}

// Where a product's numbers go: plainly into out [rows, weight.out], with a bias if there is one.
struct PlainStore {
    const Matrix& weight;
    const float* bias;
    float* out;
    int64_t num_pairs() const { return ceil_div(weight.out, 32); }
    int64_t first(int64_t pair) const { return pair * 32; }
    int64_t second(int64_t pair) const { return pair * 32 + 16 < weight.out ? pair * 32 + 16 : pair * 32; }
    void operator()(int64_t pair, int64_t row, const int32_t* acc, float row_scale) const {
        for (int half = 0; half < 32; half += W) {
            const int64_t at = pair * 32 + half;
            if (at >= weight.out) return;
            const V y = scaled(weight, acc + half, at, row_scale);
            float* to = out + row * weight.out + at;
            if (at + W <= weight.out) {
                store(to, bias == nullptr ? y : y + load(bias + at));
            } else {
                for (int64_t lane = 0; at + lane < weight.out; ++lane) to[lane] = bias == nullptr ? y[lane] : y[lane] + bias[at + lane];
            }
        }
    }
};

// The gate's strip beside the up strip of the same 16 channels: out [rows, F] = activation(gate) * up. F is a multiple of 16.
template <bool kIsGelu>
struct GatedStore {
    const Matrix& weight;
    float* out;
    int64_t width() const { return weight.out / 2; }
    int64_t num_pairs() const { return width() / 16; }
    int64_t first(int64_t pair) const { return pair * 16; }
    int64_t second(int64_t pair) const { return width() + pair * 16; }
    void operator()(int64_t pair, int64_t row, const int32_t* acc, float row_scale) const {
        for (int lane = 0; lane < 16; lane += W) {
            const V gate = scaled(weight, acc + lane, first(pair) + lane, row_scale);
            const V up = scaled(weight, acc + 16 + lane, second(pair) + lane, row_scale);
            store(out + row * width() + first(pair) + lane, activate<kIsGelu>(gate) * up);
        }
    }
};

// All rows by all outputs. A tile is some pairs of strips by some groups of rows: at least a dozen tiles a thread while the tiles
// stay large, and 8 groups, so that with many rows a pair of strips is used 96 times out of the nearest cache.
template <class Store>
void product(Context& context, const Activations& a, const Matrix& weight, const Store& out) {
    constexpr int64_t kGroupsPerTile = 8, kMostPairs = 32;
    const int64_t num_pairs = out.num_pairs(), num_groups = a.num_groups();
    const int64_t pairs = most(1, least(kMostPairs, num_pairs / (12 * context.pool.size())));
    const int64_t chunks = ceil_div(num_groups, kGroupsPerTile);
    const int64_t stride = chunks == 1 ? pairs * (context.pool.size() - 1) : 0;  // from a tile to the one this thread likely takes next
    const auto strip = [&](int64_t output) { return weight.data + output / 16 * a.quads * 64; };
    const Dot multiply = kDots[a.rows - 1];
    parallel(context, ceil_div(num_pairs, pairs) * chunks, [&](int64_t tile, int) {
        alignas(64) int32_t acc[kMostRows][32];
        const int64_t first_group = tile % chunks * kGroupsPerTile, first_pair = tile / chunks * pairs;
        for (int64_t pair = first_pair; pair < least(num_pairs, first_pair + pairs); ++pair) {
            const int64_t next = least(num_pairs - 1, pair + 1 < first_pair + pairs ? pair + 1 : pair + 1 + stride);
            const Pair strips{strip(out.first(pair)), strip(out.second(pair)), strip(out.first(next)), strip(out.second(next)), a.quads};
            for (int64_t group = first_group; group < least(num_groups, first_group + kGroupsPerTile); ++group) {
                multiply(a.group(group), strips, acc);
                const int64_t row = group * a.rows;
                for (int64_t r = 0; r < least(a.rows, a.num_rows - row); ++r) out(pair, row + r, acc[r], a.scales[row + r]);
            }
        }
    });
}

}  // namespace
