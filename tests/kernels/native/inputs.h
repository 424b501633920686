// Seeded inputs in memory of exactly their size, so that a sanitizer sees each read past an end; outputs between guard bytes. No
// expected result here. Included by reference.h and calls.h.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../../kernels/cpu/braid_cpu.h"

using Floats = std::vector<float>;
using Ids = std::vector<int64_t>;

// SplitMix64: the same numbers with every standard library.
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t x = state += 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
    float normal() {  // nearly
        double sum = -6.0;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return static_cast<float>(sum);
    }
    Floats normals(int64_t count, float scale = 1.0f, float mean = 0.0f) {
        Floats numbers(static_cast<size_t>(count));
        for (float& x : numbers) x = mean + scale * normal();
        return numbers;
    }
};

// What a check has found: the first reason for failing, and the largest error as a share of what is allowed.
struct Finding {
    std::string reason;
    double worst = 0.0;
    void expect(bool is_true, const std::string& otherwise) {
        if (!is_true && reason.empty()) reason = otherwise;
    }
    void near(double found, double expected, double allowed, const char* what) {
        const double error = std::fabs(found - expected);
        if (error > 0.0) worst = allowed > 0.0 && !(error / allowed < worst) ? error / allowed : worst;
        if (error <= allowed) return;  // false for NaN
        char text[160];
        std::snprintf(text, sizeof text, "%s: %.9g, expected %.9g, at most %.3g apart", what, found, expected, allowed);
        expect(false, text);
    }
};

// The memory of an output, with a guard on both sides that no function may touch.
template <class T>
class Output {
  public:
    explicit Output(int64_t count) : count_(static_cast<size_t>(count)), whole_(count_ + 2 * kGuard) {
        std::memset(whole_.data(), kByte, whole_.size() * sizeof(T));
    }
    T* data() { return whole_.data() + kGuard; }
    std::vector<T> taken(Finding& finding, int status) const {
        finding.expect(status == 0, "status " + std::to_string(status));
        const auto* bytes = reinterpret_cast<const unsigned char*>(whole_.data());
        const size_t size = whole_.size() * sizeof(T), guard = kGuard * sizeof(T);
        for (size_t i = 0; i < guard; ++i)
            finding.expect(bytes[i] == kByte && bytes[size - 1 - i] == kByte, "an output's guard is overwritten");
        return std::vector<T>(whole_.begin() + kGuard, whole_.end() - kGuard);
    }

  private:
    static constexpr size_t kGuard = 64;
    static constexpr unsigned char kByte = 0xa5;
    size_t count_;
    std::vector<T> whole_;
};

inline double half_value(uint16_t half) {
    const int exponent = half >> 10 & 31, rest = half & 1023;
    const double size = exponent == 0 ? std::ldexp(rest, -24) : std::ldexp(1024 + rest, exponent - 25);
    return (half & 0x8000) != 0 ? -size : size;
}

// A matrix as strips (see Matrix), and beside them what it stands for. values: int8, or unsigned numbers of 4 or 8 bits.
struct Weights {
    int64_t out, in, bits;
    std::vector<int> values;          // [out, in]
    Floats scales;                    // [strips * 16], for int8
    std::vector<int32_t> sums;        // the same
    std::vector<uint16_t> halves[2];  // scales and offsets [out, in / 32], for groups
    std::vector<uint8_t> data;

    Weights(Random& random, int64_t num_out, int64_t num_in, int64_t num_bits, bool is_extreme = false)
        : out(num_out), in(num_in), bits(num_bits) {
        values.resize(static_cast<size_t>(out * in));
        for (int& value : values) {
            const bool is_high = random.below(2) != 0;
            if (bits == 0) value = is_extreme ? (is_high ? 127 : -128) : static_cast<int>(random.below(256)) - 128;
            else value = is_extreme ? (is_high ? (1 << bits) - 1 : 0) : static_cast<int>(random.below(int64_t{1} << bits));
        }
        bits == 0 ? pack_rows(random) : pack_groups(random);
    }
    int value(int64_t o, int64_t i) const { return values[static_cast<size_t>(o * in + i)]; }
    double group_number(int which, int64_t o, int64_t g) const { return half_value(halves[which][static_cast<size_t>(o * (in / 32) + g)]); }
    Matrix matrix() const {
        return Matrix{data.data(), bits == 0 ? scales.data() : nullptr, bits == 0 ? sums.data() : nullptr, out, in, bits};
    }

  private:
    void pack_rows(Random& random) {
        const int64_t strips = (out + 15) / 16, quads = (in + 3) / 4;
        scales.resize(static_cast<size_t>(strips * 16)), sums.resize(scales.size()), data.resize(static_cast<size_t>(strips * quads * 64));
        for (int64_t o = 0; o < out; ++o) {
            scales[static_cast<size_t>(o)] = static_cast<float>(0.5 + random.uniform()) / (100.0f * std::sqrt(static_cast<float>(in)));
            for (int64_t i = 0; i < in; ++i) {
                sums[static_cast<size_t>(o)] += value(o, i);
                data[static_cast<size_t>((o / 16 * quads + i / 4) * 64 + o % 16 * 4 + i % 4)] = static_cast<uint8_t>(value(o, i));
            }
        }
    }
    void pack_groups(Random& random) {
        const int64_t groups = in / 32, bytes = bits * 64 + 64;
        data.resize(static_cast<size_t>((out + 15) / 16 * groups * bytes));
        for (auto& numbers : halves) {
            for (int64_t i = 0; i < out * groups; ++i) {  // both signs, 2^-9 to 2^-7; some are 0 and some subnormal
                const auto bit = static_cast<uint16_t>(random.next());
                const int kind = static_cast<int>(random.below(16));
                numbers.push_back(kind == 0 ? 0 : kind == 1 ? bit & 0x83ff : (bit & 0x87ff) | 6 << 10);
            }
        }
        for (int64_t o = 0; o < out; ++o)
            for (int64_t g = 0; g < groups; ++g) {
                uint8_t* group = data.data() + (o / 16 * groups + g) * bytes;
                for (int64_t i = 0; i < 32; ++i) {
                    const int64_t line = bits == 8 ? i / 4 : i / 4 % 4;
                    group[line * 64 + o % 16 * 4 + i % 4] |= static_cast<uint8_t>(value(o, g * 32 + i) << (bits == 4 && i >= 16 ? 4 : 0));
                }
                for (int n = 0; n < 2; ++n)
                    std::memcpy(group + bits * 64 + n * 32 + o % 16 * 2, &halves[n][static_cast<size_t>(o * groups + g)], 2);
            }
    }
};

// Of one sequence: the tokens start ... start + length - 1, and the blocks that its positions lie in.
struct Slice {
    int64_t start, length;
    std::vector<int32_t> blocks;
    std::vector<int32_t> grid;  // for each position, where its picture begins, or -1
};

struct Step {
    Ids slots, positions;
    std::vector<int32_t> table, query_start{0}, context_len, grid;
    int64_t stride = 1;

    Step(const std::vector<Slice>& slices, int64_t block_size) {
        for (const Slice& slice : slices) stride = std::max(stride, static_cast<int64_t>(slice.blocks.size()));
        for (const Slice& slice : slices) {
            table.insert(table.end(), slice.blocks.begin(), slice.blocks.end());
            table.resize(static_cast<size_t>(stride) * (context_len.size() + 1));
            context_len.push_back(static_cast<int32_t>(slice.start + slice.length));
            for (int64_t at = slice.start; at < slice.start + slice.length; ++at) {
                slots.push_back(slice.blocks[static_cast<size_t>(at / block_size)] * block_size + at % block_size);
                positions.push_back(at);
                grid.push_back(slice.grid.empty() ? -1 : slice.grid[static_cast<size_t>(at)]);
            }
            query_start.push_back(static_cast<int32_t>(slots.size()));
        }
    }
    int64_t num_tokens() const { return static_cast<int64_t>(slots.size()); }
    Batch batch(bool has_grid) const {
        return Batch{slots.data(),
                     table.data(),
                     stride,
                     query_start.data(),
                     context_len.data(),
                     static_cast<int64_t>(context_len.size()),
                     has_grid ? grid.data() : nullptr};
    }
};

// Slices with blocks scattered over a pool; block 0 is nobody's.
inline std::vector<Slice> scattered(Random& random, const std::vector<std::pair<int64_t, int64_t>>& ranges, int64_t block_size,
                                    int64_t num_blocks) {
    std::vector<int32_t> order;
    for (int64_t block = 1; block < num_blocks; ++block) order.push_back(static_cast<int32_t>(block));
    for (size_t i = order.size() - 1; i > 0; --i)
        std::swap(order[i], order[static_cast<size_t>(random.below(static_cast<int64_t>(i) + 1))]);
    std::vector<Slice> slices;
    for (const auto& [start, length] : ranges) {
        Slice slice{start, length, {}, {}};
        for (int64_t block = 0; block * block_size < start + length; ++block) slice.blocks.push_back(order.back()), order.pop_back();
        slices.push_back(slice);
    }
    return slices;
}

inline uint16_t bf16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float of_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

// K/V of [blocks, heads, block_size, width] in float32 (32 bits), bfloat16 or int8, NaN where nothing was put (of int8 the scales); keys of
// a block as rows or as columns.
struct Paged {
    int64_t num_blocks, heads, block_size, width, bits;
    bool has_columns;
    Floats floats[2], scales[2];
    std::vector<uint16_t> words[2];
    std::vector<int8_t> bytes[2];

    Paged(int64_t blocks, int64_t num_heads, int64_t places, int64_t head_width, int64_t num_bits, bool columns)
        : num_blocks(blocks), heads(num_heads), block_size(places), width(head_width), bits(num_bits), has_columns(columns) {
        const auto count = static_cast<size_t>(blocks * num_heads * places * head_width);
        for (int which = 0; which < 2; ++which) {
            if (bits == 32) floats[which].assign(count, NAN);
            if (bits == 16) words[which].assign(count, 0x7fc0);
            if (bits == 8) bytes[which].assign(count, 99), scales[which].assign(count / static_cast<size_t>(width), NAN);
        }
    }
    size_t scale_at(int64_t slot, int64_t head) const {
        return static_cast<size_t>((slot / block_size * heads + head) * block_size + slot % block_size);
    }
    size_t at(int which, int64_t slot, int64_t head, int64_t h) const {
        const int64_t place = slot % block_size, first = (slot / block_size * heads + head) * block_size * width;
        return static_cast<size_t>(first + (which == 0 && has_columns ? h * block_size + place : place * width + h));
    }
    double get(int which, int64_t slot, int64_t head, int64_t h) const {
        const size_t i = at(which, slot, head, h);
        if (bits == 8) return static_cast<double>(bytes[which][i]) * static_cast<double>(scales[which][scale_at(slot, head)]);
        return static_cast<double>(bits == 16 ? of_bf16(words[which][i]) : floats[which][i]);
    }
    void put(int which, int64_t slot, int64_t head, int64_t h, float x) {
        const size_t i = at(which, slot, head, h);
        if (bits == 32) floats[which][i] = x;
        if (bits == 16) words[which][i] = bf16_of(x);
        if (bits == 8) {  // scales that differ from token to token and from head to head
            const float scale = scales[which][scale_at(slot, head)] = 0.02f * static_cast<float>(1 + (slot + head) % 3);
            bytes[which][i] = static_cast<int8_t>(std::lround(std::fmin(std::fmax(x / scale, -127.0f), 127.0f)));
        }
    }
    KV kv() const {
        const auto memory = [&](int which) {
            return bits == 8    ? static_cast<const void*>(bytes[which].data())
                   : bits == 16 ? static_cast<const void*>(words[which].data())
                                : floats[which].data();
        };
        const auto scale = [&](int which) { return bits == 8 ? const_cast<float*>(scales[which].data()) : nullptr; };
        const int64_t head = block_size * width, block = heads * head;
        return KV{const_cast<void*>(memory(0)),
                  const_cast<void*>(memory(1)),
                  scale(0),
                  scale(1),
                  block,
                  head,
                  has_columns ? 1 : width,
                  block,
                  head,
                  width,
                  heads * block_size,
                  block_size,
                  block_size,
                  heads,
                  width,
                  bits,
                  has_columns ? block_size : 1};
    }
};

// The parameters of rows to be drawn.
struct Draws {
    Floats temperature, top_p, min_p;
    std::vector<int32_t> top_k, mask;
    Ids seeds, positions;
    void add(float t, int32_t k, float p, float m, int64_t seed) {
        temperature.push_back(t), top_k.push_back(k), top_p.push_back(p), min_p.push_back(m), seeds.push_back(seed),
            positions.push_back(seed / 3 + 5);
    }
    int64_t count() const { return static_cast<int64_t>(seeds.size()); }
    Draws only(int64_t row) const {
        Draws one;
        const auto at = static_cast<size_t>(row);
        const size_t words = mask.size() / seeds.size();
        one.add(temperature[at], top_k[at], top_p[at], min_p[at], seeds[at]);
        one.mask.assign(mask.begin() + static_cast<int64_t>(at * words), mask.begin() + static_cast<int64_t>((at + 1) * words));
        return one;
    }
    Draw draw() const {
        return Draw{temperature.data(),
                    top_p.data(),
                    min_p.data(),
                    top_k.data(),
                    seeds.data(),
                    positions.data(),
                    mask.empty() ? nullptr : mask.data()};
    }
};
