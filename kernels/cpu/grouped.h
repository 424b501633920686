// A band of rows times two strips of a matrix whose numbers of 4 or 8 bits have a scale and an offset for every 32 inputs: each group summed
// exactly in int32, the groups in float32 one after another, so that a row's result is the same in every company. Included by product.h.
// y = sum over groups of (scale of x * scale of w * sum(x u) + offset of w * (scale of x * sum(x))).
// Source: the block formats Q4_0, Q4_1 and Q8_0 of ggml, whose products are these sums.
#pragma once
#include "dot.h"

namespace {

#if defined(BRAID_AVX512)
// Quads j of 16 outputs, as unsigned bytes.
template <int kBits>
INLINE __m512i load_quads(const uint8_t* group, int j) {
    const __m512i line = _mm512_loadu_si512(group + (kBits == 4 ? j % 4 : j) * 64);
    if (kBits == 8) return line;
    return _mm512_and_si512(j < 4 ? line : _mm512_srli_epi16(line, 4), _mm512_set1_epi8(15));
}

template <int R, int kBits>
void dot_grouped(const Band& band, const Pair& pair, float (*y)[32]) {
    constexpr int64_t kBytes = kBits * 64 + 64;
    const int64_t num_groups = pair.weight.in / kGroup;
    Fetcher fetcher(pair);
    for (int half = 0; half < 2; ++half) {
        const uint8_t *rows = band.bytes, *group = pair.strip(half == 0 ? pair.first : pair.second);
        const float *scales = band.scales, *sums = band.sums;
        __m512 totals[R];
        each<R>([&](auto r) ALWAYS { totals[r] = _mm512_setzero_ps(); });
        for (int64_t g = 0; g < num_groups; ++g, rows += R * kGroup, scales += R, sums += R, group += kBytes) {
            each<(kBits + 2) / 2>([&](auto) ALWAYS { fetcher.step(); });
            __m512i exact[R];  // rows side by side: one row's sums wait for each other
            each<R>([&](auto r) ALWAYS { exact[r] = _mm512_setzero_si512(); });
            each<8>([&](auto j) ALWAYS {
                const __m512i w = load_quads<kBits>(group, j);
                each<R>([&](auto r) ALWAYS {
                    int32_t quad;
                    std::memcpy(&quad, rows + (j * R + r) * 4, 4);
                    exact[r] = _mm512_dpbusd_epi32(exact[r], w, _mm512_set1_epi32(quad));
                });
            });
            const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + kBits * 64)));
            const __m512 offset = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + kBits * 64 + 32)));
            each<R>([&](auto r) ALWAYS {
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(scales[r]));
                totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[r]), both, totals[r]);
                totals[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(sums[r]), totals[r]);
            });
        }
        each<R>([&](auto r) ALWAYS { _mm512_storeu_ps(y[r] + half * 16, totals[r]); });
    }
}
#elif defined(BRAID_AVX2)
// Half a line, the quads of 8 outputs, as unsigned bytes.
template <int kBits>
INLINE __m256i load_quads(const uint8_t* group, int j, int part) {
    const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + (kBits == 4 ? j % 4 : j) * 64 + part * 32));
    if (kBits == 8) return line;
    return _mm256_and_si256(j < 4 ? line : _mm256_srli_epi16(line, 4), _mm256_set1_epi8(15));
}

template <int R, int kBits>
void dot_grouped(const Band& band, const Pair& pair, float (*y)[32]) {
    constexpr int64_t kBytes = kBits * 64 + 64;
    const __m256i ones = _mm256_set1_epi16(1), half_range = _mm256_set1_epi8(-128);
    const int64_t num_groups = pair.weight.in / kGroup;
    Fetcher fetcher(pair);
    for (int part = 0; part < 4; ++part) {  // 8 outputs each
        const uint8_t *rows = band.bytes, *group = pair.strip(part < 2 ? pair.first : pair.second);
        const float *scales = band.scales, *sums = band.sums;
        V totals[R];
        each<R>([&](auto r) ALWAYS { totals[r] = V{}; });
        for (int64_t g = 0; g < num_groups; ++g, rows += R * kGroup, scales += R, sums += R, group += kBytes) {
            if (part == 0) each<kBits + 1>([&](auto) ALWAYS { fetcher.step(); });
            __m256i exact[R];
            each<R>([&](auto r) ALWAYS { exact[r] = _mm256_setzero_si256(); });
            each<8>([&](auto j) ALWAYS {
                const __m256i w = load_quads<kBits>(group, j, part % 2);
                each<R>([&](auto r) ALWAYS {
                    int32_t quad;
                    std::memcpy(&quad, rows + (j * R + r) * 4, 4);
                    const __m256i x = _mm256_set1_epi32(quad);
                    if constexpr (kBits == 4) {  // 8 times 15 * 127 * 2 fits in 16 bits
                        exact[r] = _mm256_add_epi16(exact[r], _mm256_maddubs_epi16(w, x));
                    } else {  // vpmaddubsw would saturate: numbers minus 128, and their sign on the activation
                        const __m256i s = _mm256_xor_si256(w, half_range);
                        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
                        exact[r] = _mm256_add_epi32(exact[r], _mm256_madd_epi16(pairs, ones));
                    }
                });
            });
            const uint8_t* at = group + kBits * 64 + part % 2 * 16;
            const V scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            V offset = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 32)));
            if (kBits == 8) offset = fma(scale, splat(128.0f), offset);
            each<R>([&](auto r) ALWAYS {
                const __m256i whole = kBits == 4 ? _mm256_madd_epi16(exact[r], ones) : exact[r];
                totals[r] = fma(to_float(reinterpret_cast<VI>(whole)), scale * splat(scales[r]), totals[r]);
                totals[r] = fma(offset, splat(sums[r]), totals[r]);
            });
        }
        each<R>([&](auto r) ALWAYS { store(y[r] + part * 8, totals[r]); });
    }
}
#elif defined(BRAID_NEON)
// The quads of 4 outputs as signed bytes; with 8 bits minus 128.
template <int kBits>
INLINE int8x16_t load_quads(const uint8_t* group, int j, int part) {
    const uint8x16_t line = vld1q_u8(group + (kBits == 4 ? j % 4 : j) * 64 + part * 16);
    if (kBits == 8) return vreinterpretq_s8_u8(veorq_u8(line, vdupq_n_u8(128)));
    return vreinterpretq_s8_u8(j < 4 ? vandq_u8(line, vdupq_n_u8(15)) : vshrq_n_u8(line, 4));
}

template <int R, int kBits>
void dot_grouped(const Band& band, const Pair& pair, float (*y)[32]) {
    constexpr int64_t kBytes = kBits * 64 + 64;
    const int64_t num_groups = pair.weight.in / kGroup;
    Fetcher fetcher(pair);
    for (int part = 0; part < 8; part += 2) {  // 8 outputs each
        const uint8_t *rows = band.bytes, *group = pair.strip(part < 4 ? pair.first : pair.second);
        const float *scales = band.scales, *sums = band.sums;
        V totals[R][2];
        each<R>([&](auto r) ALWAYS { totals[r][0] = totals[r][1] = V{}; });
        for (int64_t g = 0; g < num_groups; ++g, rows += R * kGroup, scales += R, sums += R, group += kBytes) {
            if (part == 0) each<kBits + 1>([&](auto) ALWAYS { fetcher.step(); });
            int32x4_t exact[R][2];
            each<R>([&](auto r) ALWAYS { exact[r][0] = exact[r][1] = vdupq_n_s32(0); });
            each<8>([&](auto j) ALWAYS {
                const int8x16_t w0 = load_quads<kBits>(group, j, part % 4), w1 = load_quads<kBits>(group, j, part % 4 + 1);
                each<R>([&](auto r) ALWAYS {
                    const int8x16_t x = load_quad(rows + (j * R + r) * 4);
                    exact[r][0] = vdotq_s32(exact[r][0], w0, x);
                    exact[r][1] = vdotq_s32(exact[r][1], w1, x);
                });
            });
            each<2>([&](auto i) ALWAYS {
                const uint8_t* at = group + kBits * 64 + (part % 4 + i) * 8;
                const V scale = load_half(at);
                V offset = load_half(at + 32);
                if (kBits == 8) offset = fma(scale, splat(128.0f), offset);
                each<R>([&](auto r) ALWAYS {
                    totals[r][i] = fma(to_float(exact[r][i]), scale * splat(scales[r]), totals[r][i]);
                    totals[r][i] = fma(offset, splat(sums[r]), totals[r][i]);
                });
            });
        }
        each<R>([&](auto r) ALWAYS { each<2>([&](auto i) ALWAYS { store(y[r] + (part + i) * 4, totals[r][i]); }); });
    }
}
#else
template <int R, int kBits>
void dot_grouped(const Band& band, const Pair& pair, float (*y)[32]) {
    constexpr int64_t kBytes = kBits * 64 + 64;
    const int64_t num_groups = pair.weight.in / kGroup;
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < 32; ++o) {
            const uint8_t* group = pair.strip(o < 16 ? pair.first : pair.second);
            float total = 0.0f;
            for (int64_t g = 0; g < num_groups; ++g, group += kBytes) {
                int32_t exact = 0;
                for (int64_t i = 0; i < kGroup; ++i) {
                    const uint8_t byte = group[(kBits == 8 ? i / 4 : i / 4 % 4) * 64 + o % 16 * 4 + i % 4];
                    const int32_t number = kBits == 8 ? byte : i < kGroup / 2 ? byte & 15 : byte >> 4;
                    exact += number * static_cast<int8_t>(band.bytes[((g * kGroup + i) / 4 * R + r) * 4 + i % 4]);
                }
                uint16_t halves[2];
                for (int n = 0; n < 2; ++n) std::memcpy(&halves[n], group + kBits * 64 + n * 32 + o % 16 * 2, 2);
                total += static_cast<float>(exact) * (half_to_float(halves[0]) * band.scales[g * R + r]);
                total += half_to_float(halves[1]) * band.sums[g * R + r];
            }
            y[r][o] = total;
        }
}
#endif

#if defined(BRAID_AVX512)
template <int kBits>
constexpr Dot kGroupedDots[] = {dot_grouped<1, kBits>, dot_grouped<2, kBits>, dot_grouped<3, kBits>, dot_grouped<4, kBits>,
                                dot_grouped<5, kBits>, dot_grouped<6, kBits>, dot_grouped<7, kBits>, dot_grouped<8, kBits>,
                                dot_grouped<9, kBits>, dot_grouped<10, kBits>, dot_grouped<11, kBits>, dot_grouped<12, kBits>};
#else
template <int kBits>
constexpr Dot kGroupedDots[] = {dot_grouped<1, kBits>, dot_grouped<2, kBits>, dot_grouped<3, kBits>, dot_grouped<4, kBits>};
#endif

}  // namespace
