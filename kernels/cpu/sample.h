// Draws one id a row: thresholds of min-p, top-k and top-p found without sorting the vocabulary, then the arg-max of score + noise.
// The rules and their order are those of kernels/sample/reference.py, the noise that of kernels/sample/noise.py. No penalties here:
// the caller puts them into the scores. Over all logits of a row, or over those that head.h has left of them.
#pragma once
#include "lanes.h"

// In dispatch.cpp.
void sort_descending(float* first, float* last);
float nth_highest(float* first, float* last, int64_t n);

namespace {

constexpr float kGreedyBelow = 1e-5f, kLargestLogit = 1e30f;
// Gumbel noise from 32 bits lies between -3.2 and 22.9: a score further below the highest one can't win.
constexpr float kNoiseSpan = 27.0f;
constexpr int kBuckets = 2048;
constexpr float kBucketsPerNat = 32.0f;

INLINE VU mix32(VU x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

INLINE uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// ln x to about 1 ulp for normal x > 0. Source: Cephes, logf.
INLINE V logarithm(V x) {
    const VI bits = reinterpret_cast<VI>(x);
    VI power = (bits >> 23) - 126;
    V m = reinterpret_cast<V>((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
    const VI is_low = m < splat(0.707106781186547524f);
    power += is_low;  // -1 where low
    m = (is_low ? m + m : m) - splat(1.0f);
    V p = splat(7.0376836292e-2f);
    for (const float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f,
                          3.3333331174e-1f})
        p = fma(p, m, splat(c));
    const V square = m * m, e = to_float(power);
    V y = p * m * square;
    y = fma(e, splat(-2.12194440e-4f), y);
    y = fma(square, splat(-0.5f), y);
    return fma(e, splat(0.693359375f), m + y);
}

INLINE V gumbel(VU word) {
    const V u = (__builtin_convertvector(word, V) + splat(0.5f)) * splat(0x1p-32f);
    const V rest = (__builtin_convertvector(~word, V) + splat(0.5f)) * splat(0x1p-32f);
    const V series = u * (splat(1.0f) + u * (splat(0.5f) + u * (splat(1.0f / 3) + u * (splat(0.25f) + u * splat(0.2f)))));
    return V{} - logarithm(u < splat(0.03125f) ? series : V{} - logarithm(rest));
}

INLINE bool any(VI mask) {
#if defined(BRAID_AVX512)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(BRAID_AVX2)
    return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#elif defined(BRAID_NEON)
    return vmaxvq_u32(reinterpret_cast<uint32x4_t>(mask)) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// The largest value and the lowest index that has it, lane by lane; ids ascend between calls.
struct Best {
    V value = splat(-INFINITY);
    VI index{};
    INLINE void see(V v, VI at) {
        const VI is_better = v > value;
        value = is_better ? v : value;
        index = is_better ? at : index;
    }
    INLINE int64_t winner() const {
        int64_t id = index[0];
        float top = value[0];
        for (int lane = 1; lane < W; ++lane)
            if (value[lane] > top || (value[lane] == top && index[lane] < id)) top = value[lane], id = index[lane];
        return id;
    }
};

// scores [count], count a multiple of W, behind the vocabulary minus infinity.
struct Scores {
    float* scores;
    float* members;  // as much memory again
    int64_t count;
    float top;
    int bucket(float score) const {  // 0 holds the highest
        const float depth = (top - score) * kBucketsPerNat;
        return depth < kBuckets - 1 ? static_cast<int>(depth) : kBuckets - 1;
    }
    int64_t sorted_members(int wanted, float floor) const {
        int64_t found = 0;
        for (int64_t i = 0; i < count; ++i)
            if (scores[i] >= floor && bucket(scores[i]) == wanted) members[found++] = scores[i];
        sort_descending(members, members + found);
        return found;
    }
};

// The k-th highest score, k <= vocabulary.
float find_rank(const Scores& row, int64_t k) {
    int32_t sizes[kBuckets] = {};
    for (int64_t i = 0; i < row.count; ++i) ++sizes[row.bucket(row.scores[i])];
    int bucket = 0;
    for (; k > sizes[bucket]; ++bucket) k -= sizes[bucket];
    row.sorted_members(bucket, -INFINITY);
    return row.members[k - 1];
}

// The lowest score of the smallest set of highest scores >= floor that has share p of their mass.
float find_nucleus(const Scores& row, float floor, float p) {
    double masses[kBuckets] = {};
    double total = 0.0;
    for (int64_t i = 0; i < row.count; i += W) {
        const V s = load(row.scores + i);
        const VI is_kept = s >= splat(floor);
        if (!any(is_kept)) continue;
        const V mass = is_kept ? exponential(s - splat(row.top)) : V{};
        for (int lane = 0; lane < W; ++lane)
            if (mass[lane] > 0.0f) masses[row.bucket(s[lane])] += static_cast<double>(mass[lane]);
    }
    for (const double mass : masses) total += mass;
    const double target = static_cast<double>(p) * total;
    double reached = 0.0;
    int bucket = 0, filled = 0;
    for (int b = 0; b < kBuckets; ++b)
        if (masses[b] > 0.0) filled = b;
    for (; bucket < filled && reached + masses[bucket] < target; ++bucket) reached += masses[bucket];
    const int64_t found = row.sorted_members(bucket, floor);
    for (int64_t i = 0; i < found; ++i) {
        reached += static_cast<double>(exponential_of(row.members[i] - row.top));
        if (reached >= target) return row.members[i];
    }
    return found > 0 ? row.members[found - 1] : floor;
}

INLINE V cleaned(V logit) {
    const V cut = logit > splat(kLargestLogit) ? splat(kLargestLogit) : logit;
    return cut == cut ? cut : splat(-INFINITY);
}

// Minus infinity where the bits of a row, null or one per token from its first on, do not allow tokens i ... i + W - 1.
INLINE V allowed(V scores, const int32_t* bits, int64_t i) {
    if (bits == nullptr) return scores;
    const VU word = VU{} + (static_cast<uint32_t>(bits[i / 32]) >> (i % 32));
    const VI is_set = reinterpret_cast<VI>((word >> reinterpret_cast<VU>(lane_index())) & 1u) != 0;
    return is_set ? scores : splat(-INFINITY);
}

int64_t greedy_id(const float* logits, const int32_t* bits, int64_t vocab_size) {
    Best best;
    int64_t i = 0;
    for (; i + W <= vocab_size; i += W) best.see(allowed(cleaned(load(logits + i)), bits, i), lane_index() + static_cast<int32_t>(i));
    if (i < vocab_size) {
        V last = splat(-INFINITY);
        for (int64_t j = i; j < vocab_size; ++j) last[j - i] = logits[j];
        best.see(allowed(cleaned(last), bits, i), lane_index() + static_cast<int32_t>(i));
    }
    return best.winner();
}

float lowest_kept(const Scores& row, const Draw& draw, int64_t at, int64_t vocab_size) {
    float floor = -INFINITY;
    if (draw.min_p[at] > 0.0f) floor = row.top + std::log(draw.min_p[at]);
    if (draw.top_k[at] > 0 && draw.top_k[at] < vocab_size) {
        const float last = find_rank(row, draw.top_k[at]);
        floor = last > floor ? last : floor;
    }
    if (draw.top_p[at] < 1.0f) {
        const float nucleus = find_nucleus(row, floor, draw.top_p[at]);
        floor = nucleus > floor ? nucleus : floor;
    }
    return floor;
}

// The noise of a row's tokens.
struct Noise {
    uint32_t low, high;
    INLINE explicit Noise(const Draw& draw, int64_t at) {
        const uint64_t key = mix64(mix64(static_cast<uint64_t>(draw.seeds[at]) + 0x9e3779b97f4a7c15u) + static_cast<uint64_t>(draw.positions[at]));
        low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
    }
    INLINE V of(VI ids) const { return gumbel(mix32(mix32(reinterpret_cast<VU>(ids) ^ low) + high)); }
};

// Of `num` scores, with row.top. ids: theirs, ascending, as many as there are scores; null: 0, 1, 2, ...
int64_t chosen_id(const Scores& row, const int32_t* ids, const Draw& draw, int64_t at, int64_t num) {
    const float floor = lowest_kept(row, draw, at, num), reach = row.top - kNoiseSpan;
    const V kept = splat(floor > reach ? floor : reach);
    const Noise noise(draw, at);
    Best best;
    for (int64_t i = 0; i < row.count; i += W) {
        const V s = load(row.scores + i);
        const VI is_kept = s >= kept;
        if (!any(is_kept)) continue;
        const VI of_lane = ids == nullptr ? lane_index() + static_cast<int32_t>(i) : load_int(ids + i);
        best.see(is_kept ? s + noise.of(of_lane) : splat(-INFINITY), of_lane);
    }
    return best.winner();
}

int64_t drawn_id(const float* logits, const int32_t* bits, const Draw& draw, int64_t at, int64_t vocab_size, float* memory) {
    Scores row{memory, memory + ceil_div(vocab_size, W) * W, ceil_div(vocab_size, W) * W, -INFINITY};
    const V temperature = splat(draw.temperature[at]);
    V top = splat(-INFINITY);
    std::memcpy(row.scores, logits, static_cast<size_t>(vocab_size) * sizeof(float));
    for (int64_t i = vocab_size; i < row.count; ++i) row.scores[i] = -INFINITY;
    for (int64_t i = 0; i < row.count; i += W) {
        const V s = allowed(cleaned(load(row.scores + i)) / temperature, bits, i);
        store(row.scores + i, s);
        top = max(top, s);
    }
    row.top = max_lanes(top);
    return row.top == -INFINITY ? 0 : chosen_id(row, nullptr, draw, at, vocab_size);
}

void sample(Context& context, const float* logits, const Draw& draw, int64_t* ids, int64_t num_rows, int64_t vocab_size) {
    const size_t bytes = static_cast<size_t>(2 * ceil_div(vocab_size, W) * W) * sizeof(float);
    for (auto& memory : context.of_thread) memory.reserve(bytes);
    parallel(context, num_rows, [&](int64_t row, int thread) {
        const float* from = logits + row * vocab_size;
        float* memory = static_cast<float*>(context.of_thread[static_cast<size_t>(thread)].reserve(0));
        const int32_t* bits = draw.mask == nullptr ? nullptr : draw.mask + row * ceil_div(vocab_size, 32);
        ids[row] = draw.temperature[row] < kGreedyBelow ? greedy_id(from, bits, vocab_size)
                                                        : drawn_id(from, bits, draw, row, vocab_size, memory);
    });
}

}  // namespace
