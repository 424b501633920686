// The matrix product: all rows by all outputs, cut into tiles, and where its numbers go: a store takes 32 of one row, and which thread
// brings them; a thread's tiles ascend. What a band of rows makes of two strips is in dot.h
// and grouped.h. Included by the isa_*.cpp files.
#pragma once
#include "grouped.h"

namespace {

// Plainly into out [rows, num_outputs], with a bias if there is one.
struct PlainStore {
    int64_t num_outputs;
    const float* bias;
    float* out;
    int64_t num_pairs() const { return ceil_div(num_outputs, 32); }
    int64_t first(int64_t pair) const { return pair * 32; }
    int64_t second(int64_t pair) const { return pair * 32 + 16 < num_outputs ? pair * 32 + 16 : pair * 32; }
    void operator()(int64_t pair, int64_t row, const float* numbers, int) const {
        for (int half = 0; half < 32; half += W) {
            const int64_t at = pair * 32 + half;
            if (at >= num_outputs) return;
            const V y = load(numbers + half);
            float* to = out + row * num_outputs + at;
            if (at + W <= num_outputs) {
                store(to, bias == nullptr ? y : y + load(bias + at));
            } else {
                for (int64_t lane = 0; at + lane < num_outputs; ++lane) to[lane] = bias == nullptr ? y[lane] : y[lane] + bias[at + lane];
            }
        }
    }
};

// The gate's strip beside the up strip of the same 16 channels: out [rows, F] = activation(gate) * up. F is a multiple of 16.
template <bool kIsGelu>
struct GatedStore {
    int64_t width;
    float* out;
    int64_t num_pairs() const { return width / 16; }
    int64_t first(int64_t pair) const { return pair * 16; }
    int64_t second(int64_t pair) const { return width + pair * 16; }
    void operator()(int64_t pair, int64_t row, const float* numbers, int) const {
        for (int lane = 0; lane < 16; lane += W)
            store(out + row * width + pair * 16 + lane, activate<kIsGelu>(load(numbers + lane)) * load(numbers + 16 + lane));
    }
};

// All rows by all outputs. A tile is some pairs of strips by some bands of rows: at least a dozen tiles a thread while the tiles
// stay large, and 8 bands, so that with many rows a pair of strips is used 96 times out of the nearest cache.
template <class Store>
void product(Context& context, const Activations& a, const Matrix& weight, const Store& out) {
    constexpr int64_t kBandsPerTile = 8, kMostPairs = 32;
    const int64_t num_pairs = out.num_pairs(), num_bands = a.num_bands();
    const int64_t pairs = most(1, least(kMostPairs, num_pairs / (12 * context.pool.size())));
    const int64_t chunks = ceil_div(num_bands, kBandsPerTile);
    const int64_t stride = chunks == 1 ? pairs * (context.pool.size() - 1) : 0;  // from a tile to the one this thread likely takes next
    const int64_t of_rows = a.rows - 1;
    const Dot multiply = weight.group_bits == 0   ? kDots[of_rows]
                         : weight.group_bits == 4 ? kGroupedDots<4>[of_rows]
                                                  : kGroupedDots<8>[of_rows];
    parallel(context, ceil_div(num_pairs, pairs) * chunks, [&](int64_t tile, int thread) {
        alignas(64) float y[kMostRows][32];
        const int64_t first_band = tile % chunks * kBandsPerTile, first_pair = tile / chunks * pairs;
        const int64_t bands = least(num_bands - first_band, kBandsPerTile);
        for (int64_t pair = first_pair; pair < least(num_pairs, first_pair + pairs); ++pair) {
            const int64_t next = least(num_pairs - 1, pair + 1 < first_pair + pairs ? pair + 1 : pair + 1 + stride);
            for (int64_t band = first_band; band < first_band + bands; ++band) {
                const int64_t row = band * a.rows, at = a.scale_of(band);
                const Pair strips{weight, out.first(pair), out.second(pair), out.first(next), out.second(next), band - first_band, bands};
                multiply(Band{a.band(band), a.scales + at, a.sums + at}, strips, y);
                for (int64_t r = 0; r < least(a.rows, a.num_rows - row); ++r) out(pair, row + r, y[r], thread);
            }
        }
    });
}

}  // namespace
