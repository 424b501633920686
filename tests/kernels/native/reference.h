// What every operation should give, written plainly and in double, and how far a float32 result may be from it. Included by check.cpp.
#pragma once
#include <algorithm>
#include <functional>

#include "inputs.h"

constexpr double kHalfUlp = 0x1p-24;  // relative error of one float32 operation

struct Expected {
    std::vector<double> values, allowed;
};

// The contract's quantisation, in float32 itself: the rounding of x / scale is part of it.
inline double quantized_row(const float* x, int64_t width, std::vector<int>& numbers) {
    float largest = 0.0f;
    for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float scale = largest / 127.0f > 0.0f ? largest / 127.0f : 1.0f;
    numbers.resize(static_cast<size_t>(width));
    for (int64_t i = 0; i < width; ++i)
        numbers[static_cast<size_t>(i)] = static_cast<int>(std::nearbyint(std::min(std::max(x[i] / scale, -127.0f), 127.0f)));
    return static_cast<double>(scale);
}

// int8: exact sums, then three roundings. Groups: each sum is exact, so what is rounded are two terms a group and the adding up of them;
// a kernel may move the number 128 from the weights into the offset.
inline Expected product_of(const Weights& w, const Floats& x, int64_t num_rows) {
    Expected result;
    std::vector<int> q;
    for (int64_t r = 0; r < num_rows; ++r) {
        const float* row = x.data() + r * w.in;
        const double row_scale = w.bits == 0 ? quantized_row(row, w.in, q) : 0.0;
        for (int64_t o = 0; o < w.out; ++o) {
            double total = 0.0, size = 0.0;
            for (int64_t i = 0; w.bits == 0 && i < w.in; ++i) total += q[static_cast<size_t>(i)] * w.value(o, i);
            if (w.bits == 0) total *= row_scale * static_cast<double>(w.scales[static_cast<size_t>(o)]), size = std::fabs(total);
            for (int64_t g = 0; w.bits != 0 && g < w.in / 32; ++g) {
                std::vector<int> of_group;
                const double scale = quantized_row(row + g * 32, 32, of_group);
                double exact = 0.0, sum = 0.0;
                for (int64_t i = 0; i < 32; ++i)
                    exact += of_group[static_cast<size_t>(i)] * w.value(o, g * 32 + i), sum += of_group[static_cast<size_t>(i)];
                const double of_weight = w.group_number(0, o, g), offset = w.group_number(1, o, g);
                total += scale * (of_weight * exact + offset * sum);
                size += scale * (std::fabs(of_weight) * (std::fabs(exact) + 256.0 * std::fabs(sum)) + std::fabs(offset * sum));
            }
            result.values.push_back(total);
            result.allowed.push_back(size * kHalfUlp * (w.bits == 0 ? 4.0 : 4.0 + 2.0 * static_cast<double>(w.in / 32)));
        }
    }
    return result;
}

// A mean of squares whose adding up is short, a root, two products.
inline Expected norm_of(const Floats& x, const Floats& weight, float eps) {
    Expected result;
    const auto width = weight.size();
    for (size_t at = 0; at < x.size(); at += width) {
        double squares = 0.0;
        for (size_t i = 0; i < width; ++i) squares += static_cast<double>(x[at + i]) * static_cast<double>(x[at + i]);
        const double factor = 1.0 / std::sqrt(squares / static_cast<double>(width) + static_cast<double>(eps));
        for (size_t i = 0; i < width; ++i) {
            result.values.push_back(static_cast<double>(x[at + i]) * factor * static_cast<double>(weight[i]));
            result.allowed.push_back(std::fabs(result.values.back()) * kHalfUlp * (8.0 + static_cast<double>(width) / 4.0));
        }
    }
    return result;
}

inline double activated(double x, bool is_gelu) {
    const double z = is_gelu ? 1.5957691216057308 * (x + 0.044715 * x * x * x) : x;
    return x / (1.0 + std::exp(-z));
}

// What one head's vector becomes: normed if there is a weight, turned by its position's angles.
inline std::vector<double> rotated(const float* x, const float* norm, const float* angles, int64_t width, float eps) {
    std::vector<double> numbers(x, x + width), turned(static_cast<size_t>(width));
    if (norm != nullptr) numbers = norm_of(Floats(x, x + width), Floats(norm, norm + width), eps).values;
    for (int64_t i = 0; i < width / 2; ++i) {
        const double low = numbers[static_cast<size_t>(i)], high = numbers[static_cast<size_t>(i + width / 2)];
        const auto cosine = static_cast<double>(angles[i]), sine = static_cast<double>(angles[i + width / 2]);
        turned[static_cast<size_t>(i)] = low * cosine - high * sine;
        turned[static_cast<size_t>(i + width / 2)] = high * cosine + low * sine;
    }
    return turned;
}

inline bool is_seen(const Spec& spec, int64_t query, int64_t key, int64_t grid_start) {
    if (key > query || (query - key >= spec.window && key >= spec.sink)) return false;
    if (spec.near.columns == 0 || grid_start < 0 || key < grid_start || key == query) return true;
    const int64_t next = query + 1 - grid_start, code = key - grid_start;  // the query's position holds the code before the one it draws
    const int64_t row = next / spec.near.columns, column = next % spec.near.columns;
    return row - code / spec.near.columns <= spec.near.row_radius && std::abs(column - code % spec.near.columns) <= spec.near.column_radius;
}

// Scores with errors of some 2^-20 of the products' size, and values of at most some units: 1e-5 is twice the largest error seen.
// Beside int8, queries and weights may be rounded to 1 / 32,639 of a row's largest: some 5e-5 of a score, and of what it weighs.
inline Expected attention_of(const Paged& pool, const Step& step, const std::vector<Slice>& slices, const Spec& spec, const Floats& q,
                             int64_t num_heads) {
    Expected result;
    int64_t token = 0;
    for (const Slice& slice : slices)
        for (int64_t query = slice.start; query < slice.start + slice.length; ++query, ++token)
            for (int64_t head = 0; head < num_heads; ++head) {
                const int64_t of_kv = head / (num_heads / pool.heads);
                const float* x = q.data() + (token * num_heads + head) * pool.width;
                std::vector<double> sums(static_cast<size_t>(pool.width));
                double weight = 0.0;
                for (int64_t key = 0; key <= query; ++key) {
                    if (!is_seen(spec, query, key, step.grid[static_cast<size_t>(token)])) continue;
                    const int64_t slot = slice.blocks[static_cast<size_t>(key / pool.block_size)] * pool.block_size + key % pool.block_size;
                    double score = 0.0;
                    for (int64_t h = 0; h < pool.width; ++h) score += static_cast<double>(x[h]) * pool.get(0, slot, of_kv, h);
                    score *= static_cast<double>(spec.scale);
                    if (spec.softcap != 0.0f)
                        score = static_cast<double>(spec.softcap) * std::tanh(score / static_cast<double>(spec.softcap));
                    const double p = std::exp(score);
                    weight += p;
                    for (int64_t h = 0; h < pool.width; ++h) sums[static_cast<size_t>(h)] += p * pool.get(1, slot, of_kv, h);
                }
                for (const double sum : sums) result.values.push_back(sum / weight), result.allowed.push_back(pool.bits == 8 ? 1e-4 : 1e-5);
            }
    return result;
}

inline double noise_of(int64_t seed, int64_t position, uint32_t token) {
    const auto mix64 = [](uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    };
    const auto mix32 = [](uint32_t x) {
        x = (x ^ (x >> 16)) * 0x7feb352du;
        x = (x ^ (x >> 15)) * 0x846ca68bu;
        return x ^ (x >> 16);
    };
    const uint64_t key = mix64(mix64(static_cast<uint64_t>(seed) + 0x9e3779b97f4a7c15u) + static_cast<uint64_t>(position));
    const uint32_t word = mix32(mix32(token ^ static_cast<uint32_t>(key)) + static_cast<uint32_t>(key >> 32));
    return -std::log(-std::log1p(-(word + 0.5) * 0x1p-32));
}

// Why an id can't be what a row of logits draws, or nothing. Scores are float32 by contract; noise and masses have 1e-5 of play.
inline std::string wrong_draw(const float* logits, int64_t vocab, const Draws& draws, int64_t row, int64_t id) {
    constexpr double kPlay = 1e-5;
    const auto at = static_cast<size_t>(row);
    const bool is_greedy = draws.temperature[at] < 1e-5f;
    std::vector<double> scores;
    for (int64_t i = 0; i < vocab; ++i) {
        const bool is_allowed =
            draws.mask.empty() ||
            (draws.mask[at * static_cast<size_t>((vocab + 31) / 32) + static_cast<size_t>(i / 32)] >> (i % 32) & 1) != 0;
        const float logit = std::min(logits[i], 1e30f);
        scores.push_back(is_allowed && !std::isnan(logits[i]) ? static_cast<double>(is_greedy ? logit : logit / draws.temperature[at])
                                                              : -INFINITY);
    }
    std::vector<double> sorted = scores;
    std::sort(sorted.begin(), sorted.end(), std::greater<double>());
    if (id < 0 || id >= vocab) return "an id outside the vocabulary";
    if (sorted[0] == -INFINITY) return id == 0 ? "" : "a row without any token gives 0";
    double floor = -INFINITY;
    if (!is_greedy) {
        if (draws.min_p[at] > 0.0f) floor = sorted[0] + std::log(static_cast<double>(draws.min_p[at]));
        if (draws.top_k[at] > 0 && draws.top_k[at] < vocab) floor = std::max(floor, sorted[static_cast<size_t>(draws.top_k[at]) - 1]);
        double total = 0.0, reached = 0.0;
        for (const double score : sorted) total += score >= floor ? std::exp(score - sorted[0]) : 0.0;
        for (size_t i = 0; draws.top_p[at] < 1.0f && i < sorted.size() && sorted[i] >= floor; ++i) {
            reached += std::exp(sorted[i] - sorted[0]);
            if (reached >= static_cast<double>(draws.top_p[at]) * total) floor = sorted[i];
        }
    }
    const auto rank = [&](int64_t i) {
        const double noise = is_greedy ? 0.0 : noise_of(draws.seeds[at], draws.positions[at], static_cast<uint32_t>(i));
        return scores[static_cast<size_t>(i)] + noise;
    };
    if (scores[static_cast<size_t>(id)] < floor - kPlay) return "an id that the thresholds leave out";
    for (int64_t i = 0; i < vocab; ++i)
        if (scores[static_cast<size_t>(i)] >= floor && rank(i) > rank(id) + (is_greedy ? 0.0 : kPlay)) return "another id stands higher";
    return "";
}
