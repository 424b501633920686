// A band of rows times two strips of an int8 matrix with one scale per output: summed exactly in int32, scaled once at the end. Exact sums
// make a row's result independent of how rows and outputs are cut into tiles. Included by product.h.
#pragma once
#include "rows.h"

namespace {

struct Band {
    const uint8_t* bytes;
    const float *scales, *sums;
};

// Two strips that are multiplied together, and the two that will be next: with few rows a product runs at the speed of memory, and the
// processor's own prefetching stops at the end of every page. first, second: the outputs that the strips begin with.
struct Pair {
    const Matrix& weight;
    int64_t first, second, next_first, next_second;
    int64_t band, num_bands;  // of the rows that this thread multiplies with the pair, one after another
    INLINE const uint8_t* strip(int64_t output) const { return weight.data + output / 16 * strip_bytes(weight); }
};

// Fetches lines of the strips to come while `step()` is called once for every line of the present ones.
struct Fetcher {
    const uint8_t *strips[2], *next[2];
    int64_t size, at, num_bands, tick = 0;
    INLINE explicit Fetcher(const Pair& pair) : size(strip_bytes(pair.weight)), num_bands(pair.num_bands) {
        // Of one band the strips are read from memory, so the fetched lines run 4 KiB ahead of the read ones. Of more, they come out of the
        // nearest caches from the second band on, and all bands together fetch the next pair, each its share.
        const bool is_single = num_bands == 1;
        strips[0] = pair.strip(pair.first), strips[1] = pair.strip(pair.second);
        next[0] = pair.strip(pair.next_first), next[1] = pair.strip(pair.next_second);
        at = is_single ? kAhead : pair.band * ceil_div(size / 64, num_bands) * 64;
    }
    INLINE void step() {
        if (num_bands == 1) {
            for (int s = 0; s < 2; ++s) prefetch(at < size ? strips[s] + at : next[s] + (at - size));
            at += 64;
        } else if (++tick == num_bands) {
            tick = 0;
            for (int s = 0; s < 2; ++s) prefetch(next[s] + least(at, size - 64));
            at += 64;
        }
    }
    static constexpr int64_t kAhead = 4096;
};

// y[r][0 ... 15] = row r of a band times the first strip, y[r][16 ... 31] times the second.
using Dot = void (*)(const Band& band, const Pair& pair, float (*y)[32]);

// W sums of one row as floats, starting at output `at` of the matrix.
INLINE V scaled(const Matrix& weight, const int32_t* sums, int64_t at, float row_scale) {
    const VI exact = load_int(sums) - kOffset * load_int(weight.sums + at);
    return to_float(exact) * splat(row_scale) * load(weight.scales + at);
}

template <int R>
INLINE void finish_dot(const Band& band, const Pair& pair, const int32_t (*sums)[32], float (*y)[32]) {
    for (int r = 0; r < R; ++r)
        for (int lane = 0; lane < 16; lane += W) {
            store(y[r] + lane, scaled(pair.weight, sums[r] + lane, pair.first + lane, band.scales[r]));
            store(y[r] + 16 + lane, scaled(pair.weight, sums[r] + 16 + lane, pair.second + lane, band.scales[r]));
        }
}

#if defined(BRAID_AVX512)
template <int R>
void dot(const Band& band, const Pair& pair, float (*y)[32]) {
    const uint8_t *rows = band.bytes, *strip0 = pair.strip(pair.first), *strip1 = pair.strip(pair.second);
    const int64_t quads = ceil_div(pair.weight.in, 4);
    Fetcher fetcher(pair);
    __m512i sums[R][2];
    each<R>([&](auto r) ALWAYS { sums[r][0] = sums[r][1] = _mm512_setzero_si512(); });
    for (int64_t q = 0; q < quads; ++q, rows += R * 4) {
        const __m512i w0 = _mm512_loadu_si512(strip0 + q * 64), w1 = _mm512_loadu_si512(strip1 + q * 64);
        fetcher.step();
        each<R>([&](auto r) ALWAYS {
            int32_t quad;
            std::memcpy(&quad, rows + r * 4, 4);
            const __m512i x = _mm512_set1_epi32(quad);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, w0);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, w1);
        });
    }
    alignas(64) int32_t exact[R][32];
    each<R>([&](auto r) ALWAYS {
        _mm512_store_si512(exact[r], sums[r][0]);
        _mm512_store_si512(exact[r] + 16, sums[r][1]);
    });
    finish_dot<R>(band, pair, exact, y);
}
#elif defined(BRAID_AVX2)
// vpmaddubsw saturates at 16 bits, so the sign goes to the activation: |w| * (x * sign w) is at most 128 * 127 * 2 for a pair.
template <int R>
void dot(const Band& band, const Pair& pair, float (*y)[32]) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int64_t quads = ceil_div(pair.weight.in, 4);
    alignas(64) int32_t exact[R][32];
    Fetcher fetcher(pair);
    for (int half = 0; half < 2; ++half) {
        const uint8_t *rows = band.bytes, *strip = pair.strip(half == 0 ? pair.first : pair.second);
        __m256i sums[R][2];
        each<R>([&](auto r) ALWAYS { sums[r][0] = sums[r][1] = _mm256_setzero_si256(); });
        for (int64_t q = 0; q < quads; ++q, rows += R * 4) {
            if (half == 0) fetcher.step();
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
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(exact[r] + half * 16), sums[r][0]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(exact[r] + half * 16 + 8), sums[r][1]);
        });
    }
    finish_dot<R>(band, pair, exact, y);
}
#elif defined(BRAID_NEON)
INLINE int8x16_t load_quad(const uint8_t* p) {  // four times
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

template <int R>
void dot(const Band& band, const Pair& pair, float (*y)[32]) {
    const int64_t quads = ceil_div(pair.weight.in, 4);
    int32_t exact[R][32];
    Fetcher fetcher(pair);
    for (int half = 0; half < 2; ++half) {
        const uint8_t *rows = band.bytes, *strip = pair.strip(half == 0 ? pair.first : pair.second);
        int32x4_t sums[R][4];
        each<R>([&](auto r) ALWAYS { each<4>([&](auto i) ALWAYS { sums[r][i] = vdupq_n_s32(0); }); });
        for (int64_t q = 0; q < quads; ++q, rows += R * 4, strip += 64) {
            if (half == 0) fetcher.step();
            int8x16_t w[4];
            each<4>([&](auto i) ALWAYS { w[i] = vreinterpretq_s8_u8(vld1q_u8(strip + i * 16)); });
            each<R>([&](auto r) ALWAYS {
                const int8x16_t x = load_quad(rows + r * 4);
                each<4>([&](auto i) ALWAYS { sums[r][i] = vdotq_s32(sums[r][i], w[i], x); });
            });
        }
        each<R>([&](auto r) ALWAYS { each<4>([&](auto i) ALWAYS { vst1q_s32(exact[r] + half * 16 + i * 4, sums[r][i]); }); });
    }
    finish_dot<R>(band, pair, exact, y);
}
#else
template <int R>
void dot(const Band& band, const Pair& pair, float (*y)[32]) {
    const int64_t quads = ceil_div(pair.weight.in, 4);
    int32_t exact[R][32] = {};
    for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half) {
            const uint8_t* strip = pair.strip(half == 0 ? pair.first : pair.second);
            int32_t* sums = exact[r] + half * 16;
            for (int64_t q = 0; q < quads; ++q) {
                int8_t x[4], w[64];
                std::memcpy(x, band.bytes + (q * R + r) * 4, 4);
                std::memcpy(w, strip + q * 64, 64);
                for (int o = 0; o < 16; ++o) sums[o] += x[0] * w[o * 4] + x[1] * w[o * 4 + 1] + x[2] * w[o * 4 + 2] + x[3] * w[o * 4 + 3];
            }
        }
    finish_dot<R>(band, pair, exact, y);
}
#endif

#if defined(BRAID_AVX512)
constexpr Dot kDots[] = {dot<1>, dot<2>, dot<3>, dot<4>, dot<5>, dot<6>, dot<7>, dot<8>, dot<9>, dot<10>, dot<11>, dot<12>};
#else
constexpr Dot kDots[] = {dot<1>, dot<2>, dot<3>, dot<4>};
#endif

}  // namespace
