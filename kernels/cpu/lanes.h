// Vectors of one instruction set (BRAID_AVX512, BRAID_AVX2, BRAID_NEON or none) and elementary functions on them, all in one fixed order.
// Everything is in an anonymous namespace, because several translation units compile it with different flags.
#pragma once
#include <cmath>
#include <cstring>
#include <utility>
#if defined(BRAID_AVX512) || defined(BRAID_AVX2)
#include <immintrin.h>
#elif defined(BRAID_NEON)
#include <arm_neon.h>
#endif

#include "braid_cpu.h"

#define INLINE inline __attribute__((always_inline))

namespace {

// body(0) ... body(N - 1) with constants for arguments: the compiler keeps arrays of vectors in registers only when no index into
// them is ever a variable, and it unrolls ordinary loops too late for that.
template <class Body, int... I>
INLINE void each_of(Body&& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
INLINE void each(Body&& body) {
    each_of(body, std::make_integer_sequence<int, N>{});
}
// A lambda that is always inlined: `each<3>([&](auto i) ALWAYS { ... })`.
#define ALWAYS __attribute__((always_inline))

#if defined(BRAID_AVX512)
constexpr int W = 16;  // float lanes
#elif defined(BRAID_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef int8_t Bytes __attribute__((vector_size(W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

INLINE V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

#if defined(BRAID_AVX512)
INLINE V splat(float x) { return _mm512_set1_ps(x); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE VI round_to_int(V x) { return reinterpret_cast<VI>(_mm512_cvtps_epi32(x)); }  // ties to even
INLINE V load_bf16(const uint16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return reinterpret_cast<V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
INLINE V load_int8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
#elif defined(BRAID_AVX2)
INLINE V splat(float x) { return _mm256_set1_ps(x); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE VI round_to_int(V x) { return reinterpret_cast<VI>(_mm256_cvtps_epi32(x)); }
INLINE V load_bf16(const uint16_t* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<V>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
INLINE V load_int8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
#elif defined(BRAID_NEON)
INLINE V splat(float x) { return vdupq_n_f32(x); }
INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
INLINE VI round_to_int(V x) { return vcvtnq_s32_f32(x); }
INLINE V load_bf16(const uint16_t* p) { return reinterpret_cast<V>(vshll_n_u16(vld1_u16(p), 16)); }
INLINE V load_half(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }  // W numbers of float16
INLINE V load_int8(const int8_t* p) {
    const VI numbers = {p[0], p[1], p[2], p[3]};
    return vcvtq_f32_s32(numbers);
}
#else
INLINE V splat(float x) { return V{x, x, x, x}; }
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE VI round_to_int(V x) {
    // Adding 1.5 * 2^23 leaves the rounded number in the low bits of the sum, for |x| < 2^22.
    return reinterpret_cast<VI>(x + splat(12582912.0f)) - reinterpret_cast<VI>(splat(12582912.0f));
}
INLINE V load_bf16(const uint16_t* p) {
    const VU words = {p[0], p[1], p[2], p[3]};
    return reinterpret_cast<V>(words << 16);
}
INLINE V load_int8(const int8_t* p) {
    const VI numbers = {p[0], p[1], p[2], p[3]};
    return __builtin_convertvector(numbers, V);
}
#endif

// 16 numbers of float16 in memory become floats; a single one likewise.
INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
    uint32_t bits = sign | ((rest << 13) + (112u << 23));
    if (rest >= 0x7c00u) bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;  // infinite, or no number
    float result;
    std::memcpy(&result, &bits, 4);
    if (rest < 0x400u) result = (sign != 0 ? -1.0f : 1.0f) * static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: times 2^-24
    return result;
}

INLINE V max(V a, V b) { return a > b ? a : b; }
INLINE V min(V a, V b) { return a < b ? a : b; }
INLINE V to_float(VI x) { return __builtin_convertvector(x, V); }
INLINE VI load_int(const int32_t* p) {
    VI v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
INLINE VI lane_index() {
    alignas(64) static constexpr int32_t index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_int(index);
}

// The numbers at `index` of a and, behind it, b.
INLINE V shuffled(V a, V b, VI index) {
#if defined(__clang__)  // it has no shuffle by a vector, but makes one of this
    V v{};
    for (int lane = 0; lane < W; ++lane) v[lane] = index[lane] < W ? a[index[lane]] : b[index[lane] - W];
    return v;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

// Each half of the lanes joins the other, down to one.
template <class Join>
INLINE float fold(V v, Join&& join) {
    constexpr int kStages = W == 16 ? 4 : W == 8 ? 3 : 2;
    each<kStages>([&](auto stage) ALWAYS { v = join(v, shuffled(v, v, lane_index() ^ (W >> (stage + 1)))); });
    return v[0];
}
INLINE float sum_lanes(V v) {
    return fold(v, [](V a, V b) ALWAYS { return a + b; });
}
INLINE float max_lanes(V v) {
    return fold(v, [](V a, V b) ALWAYS { return max(a, b); });
}
INLINE V absolute(V x) { return reinterpret_cast<V>(reinterpret_cast<VU>(x) & 0x7fffffffu); }

INLINE uint16_t to_bf16(float x) {  // ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// e^x to about 2 ulp; exactly 0 below -87, exactly 1 at 0, cut at 88.
// Source: Cephes, expf: reduction by multiples of ln 2 split in two, then a polynomial of degree 5 for the rest.
INLINE V exponential(V x) {
    const V low = splat(-87.0f);
    const V cut = min(max(x, low), splat(88.0f));
    const VI n = round_to_int(cut * splat(1.44269504088896341f));
    const V whole = to_float(n);
    const V r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), cut));
    V p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    const V y = fma(p, r * r, r) + splat(1.0f);
    const V scaled = y * reinterpret_cast<V>((n + 127) << 23);
    return x < low ? V{} : scaled;
}

INLINE float exponential_of(float x) { return exponential(splat(x))[0]; }

// x * sigmoid(x), or the tanh form of GELU written as x * sigmoid(2 z).
template <bool kIsGelu>
INLINE V activate(V x) {
    V z = x;
    if (kIsGelu) z = splat(1.5957691216057308f) * fma(splat(0.044715f) * x, x * x, x);
    return x / (splat(1.0f) + exponential(V{} - z));
}

// Rows become columns: v[i][j] and v[j][i] change places. Source: repeated perfect shuffles, log2(W) of them (Stone 1971).
INLINE V zip(V a, V b, bool is_high) {
#if defined(BRAID_AVX512)
    const VI low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    return shuffled(a, b, is_high ? low + 8 : low);
#elif defined(BRAID_AVX2)
    const VI low = {0, 8, 1, 9, 2, 10, 3, 11};
    return shuffled(a, b, is_high ? low + 4 : low);
#else
    const VI low = {0, 4, 1, 5};
    return shuffled(a, b, is_high ? low + 2 : low);
#endif
}
INLINE void transpose(V (&v)[W]) {
    constexpr int kStages = W == 16 ? 4 : W == 8 ? 3 : 2;
    each<kStages>([&](auto) ALWAYS {
        V t[W];
        each<W / 2>([&](auto i) ALWAYS {
            t[2 * i] = zip(v[i], v[i + W / 2], false);
            t[2 * i + 1] = zip(v[i], v[i + W / 2], true);
        });
        each<W>([&](auto i) ALWAYS { v[i] = t[i]; });
    });
}

INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls body(tile, thread) for every tile, on all threads; a single tile stays with the caller.
template <class Body>
void parallel(Context& context, int64_t num_tiles, Body&& body) {
    if (num_tiles <= 1 || context.pool.size() == 1) {
        for (int64_t tile = 0; tile < num_tiles; ++tile) body(tile, 0);
        return;
    }
    const auto call = [](void* argument, int64_t tile, int thread) { (*static_cast<Body*>(argument))(tile, thread); };
    context.pool.run(call, &body, num_tiles);
}

// Calls body(row) for every row; few or short rows stay with the caller, for whom they cost less than waking another thread.
template <class Body>
void parallel_rows(Context& context, int64_t num_rows, int64_t width, Body&& body) {
    constexpr int64_t kNumbersPerTile = 8192;
    const int64_t rows = most(1, kNumbersPerTile / width);
    parallel(context, ceil_div(num_rows, rows), [&](int64_t tile, int) {
        for (int64_t row = tile * rows; row < least(num_rows, (tile + 1) * rows); ++row) body(row);
    });
}

}  // namespace
