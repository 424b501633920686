// One tile of paged attention, 64 keys of one sequence and head: where they lie, scores, softmax, sums of values. Two ways give the
// same bits: over a copy in the thread's own memory (any number of queries), and straight from the pool (one query, keys as columns).
// Included by attention.h, which puts tiles together. More than 350 lines, because all of it is one loop nest and the fetching ahead in it.
#pragma once
#include "lanes.h"

namespace {

constexpr int64_t kTile = 64;    // keys
constexpr int64_t kSplit = 256;  // keys; a split's sums are closed and merged, whether or not other threads do its neighbours
constexpr int64_t kRows = 48;    // query rows (queries * heads of a group) that share the tiles they read
constexpr float kNothing = -1e30f;  // the maximum of no scores at all: finite, so that differences are never NaN

// A few queries of one sequence at one K/V head, over the splits [first_split, last_split). partial: where the sums go when
// another item merges them; -1 writes y.
struct Item {
    int32_t sequence, head, first_query, num_queries;
    int64_t first_split, last_split, partial;
};

struct AttentionCall {
    const KV& kv;
    const Batch& batch;
    const Spec& spec;
    const float* q;
    float* y;
    int64_t num_heads;
    float* partial;  // [items][rows][H + 2]: sums, then maximum and weight
    int64_t group() const { return num_heads / kv.num_kv_heads; }
    int64_t width() const { return kv.head_width; }
    int64_t queries_per_item() const { return most(1, kRows / group()); }
    int64_t rows_per_item() const { return queries_per_item() * group(); }
};

// A thread's memory for one item.
struct Desk {
    const void** lines;  // a tile's keys, values and scales
    float *key_scales, *value_scales;  // [64], of int8 alone
    float *q, *keys, *values, *scores, *sums, *total;  // [R, H], [H, 64], [64, H], [R, 64], [R, H], [R, H]
    float *maxima, *weights, *total_maxima, *total_weights;
    float *factors, *shares;  // of rows in whole numbers: what a score's count is worth, and a weight's
    int32_t* excess;          // what a row's sums are too large by
    static int64_t num_lines(int64_t width) { return 2 * kTile * (ceil_div(width * 4, 64) + 1); }
    static size_t bytes(int64_t rows, int64_t width) {
        const int64_t floats = 3 * rows * width + 2 * kTile * (width + 1) + rows * kTile + 7 * rows;
        return static_cast<size_t>(floats) * sizeof(float) + static_cast<size_t>(num_lines(width)) * sizeof(void*);
    }
    Desk(void* memory, int64_t rows, int64_t width) {
        lines = static_cast<const void**>(memory);
        float* next = reinterpret_cast<float*>(lines + num_lines(width));
        const auto take = [&](int64_t count) { return next += count, next - count; };
        keys = take(kTile * width), values = take(kTile * width), scores = take(rows * kTile);
        key_scales = take(kTile), value_scales = take(kTile);
        q = take(rows * width), sums = take(rows * width), total = take(rows * width);
        maxima = take(rows), weights = take(rows), total_maxima = take(rows), total_weights = take(rows);
        factors = take(rows), shares = take(rows), excess = reinterpret_cast<int32_t*>(take(rows));
    }
};

// Cache lines to ask for while something else is computed: a burst of hundreds would hold up the loads behind it.
struct Ahead {
    static constexpr int kEach = 2;  // lines a step of `accumulate`: what 64 steps of keys and 64 of values need at bfloat16 and H = 64
    const void** lines;
    int64_t count = 0, at = 0;
    INLINE void add(const void* row, int64_t bytes) {
        for (int64_t offset = 0; offset < bytes; offset += 64) lines[count++] = static_cast<const char*>(row) + offset;
    }
    // The lines for so many steps, or null when fewer are left.
    INLINE const void** take(int64_t steps) {
        if (at + steps * kEach > count) return nullptr;
        at += steps * kEach;
        return lines + at - steps * kEach;
    }
    void flush() {
        for (; at < count; ++at) prefetch(lines[at]);
    }
};

// c [R, C * W] += a [R, depth] b [depth, C * W], each number one chain of multiply-adds in order of depth.
template <int R, int C, bool kHasAhead>
void accumulate(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, const void** lines) {
    V sums[R][C];
    each<R>([&](auto r) ALWAYS { each<C>([&](auto j) ALWAYS { sums[r][j] = load(c + r * ldc + j * W); }); });
    for (int64_t k = 0; k < depth; ++k) {
        if (kHasAhead) each<Ahead::kEach>([&](auto i) ALWAYS { prefetch(lines[k * Ahead::kEach + i]); });
        V columns[C];
        each<C>([&](auto j) ALWAYS { columns[j] = load(b + k * ldb + j * W); });
        each<R>([&](auto r) ALWAYS {
            const V x = splat(a[r * lda + k]);
            each<C>([&](auto j) ALWAYS { sums[r][j] = fma(x, columns[j], sums[r][j]); });
        });
    }
    each<R>([&](auto r) ALWAYS { each<C>([&](auto j) ALWAYS { store(c + r * ldc + j * W, sums[r][j]); }); });
}

#if defined(BRAID_AVX512) || defined(BRAID_NEON)  // which have 32 registers
constexpr int kRowBlock = 6, kColumnBlock = 4;
#else
constexpr int kRowBlock = 3, kColumnBlock = 2;
#endif

template <int R, int C>
INLINE void accumulate_some(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, Ahead& ahead) {
    if (const void** lines = ahead.take(depth))
        accumulate<R, C, true>(a, lda, b, ldb, depth, c, ldc, lines);
    else
        accumulate<R, C, false>(a, lda, b, ldb, depth, c, ldc, nullptr);
}

template <int C>
void accumulate_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, Ahead& ahead) {
    for (; rows >= kRowBlock; rows -= kRowBlock, a += kRowBlock * lda, c += kRowBlock * ldc)
        accumulate_some<kRowBlock, C>(a, lda, b, ldb, depth, c, ldc, ahead);
    for (; rows >= 3; rows -= 3, a += 3 * lda, c += 3 * ldc) accumulate_some<3, C>(a, lda, b, ldb, depth, c, ldc, ahead);
    for (; rows > 0; --rows, a += lda, c += ldc) accumulate_some<1, C>(a, lda, b, ldb, depth, c, ldc, ahead);
}

void multiply_add(int64_t rows, int64_t columns, const float* a, int64_t lda, const float* b, int64_t depth, float* c, Ahead& ahead) {
    int64_t j = 0;
    for (; j + kColumnBlock * W <= columns; j += kColumnBlock * W)
        accumulate_rows<kColumnBlock>(rows, a, lda, b + j, columns, depth, c + j, columns, ahead);
    for (; j < columns; j += W) accumulate_rows<1>(rows, a, lda, b + j, columns, depth, c + j, columns, ahead);
}

// The bits before bit n, for any n; and those from begin to before end.
INLINE uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= kTile ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }
INLINE uint64_t between(int64_t begin, int64_t end) { return below(end) & ~below(begin); }

// What the queries of an item, positions first ... last, may see of the tile of keys from `base` on: bit i is key base + i.
// grid_start: of each query; null where no code is hidden.
struct Sight {
    int64_t first, last, window, sink;
    const int32_t* grid_start;
    Near near;
    // The keys up to `end` that are in the window of a query at `query` or of one behind it, or in the sink.
    uint64_t bound_bits(int64_t query, int64_t end, int64_t base) const {
        const int64_t low = window > query ? 0 : query - window + 1;
        return below(end + 1 - base) & (~below(low - base) | below(sink - base));
    }
    // What the neighbourhood leaves of the keys up to a query: all before its picture, itself, and a run in each near row of codes.
    uint64_t near_bits(int64_t query, int64_t base) const {
        const int64_t start = grid_start != nullptr ? grid_start[query - first] : -1;
        if (start < 0 || start >= base + kTile) return ~uint64_t{0};
        const int64_t columns = near.columns, following = query + 1 - start, row = following / columns, column = following % columns;
        const int64_t left = most(0, column - near.column_radius), right = least(columns, column + near.column_radius + 1);
        uint64_t bits = below(start - base) | between(query - base, query + 1 - base);
        const int64_t first_row = most(row - near.row_radius, most(0, base - start) / columns);
        for (int64_t at = start + first_row * columns - base, end = least(kTile, query + 1 - base); at < end; at += columns)
            bits |= between(at + left, at + right);
        return bits;
    }
    // The keys that some query of the item sees.
    uint64_t any_bits(int64_t base) const {
        if (grid_start == nullptr) return bound_bits(first, last, base);
        uint64_t bits = 0;
        for (int64_t query = first; query <= last; ++query) bits |= bound_bits(query, query, base) & near_bits(query, base);
        return bits;
    }
};

INLINE V load_number(const float* p) { return load(p); }
INLINE V load_number(const uint16_t* p) { return load_bf16(p); }
INLINE V load_number(const int8_t* p) { return load_int8(p); }
INLINE float as_float(float x) { return x; }
INLINE float as_float(int8_t x) { return static_cast<float>(x); }
INLINE float as_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// Numbers [W keys][W] become columns [W][keys]. A null row gives zeros.
template <class T>
INLINE void turn(const T* const* rows, int64_t h, float* columns) {
    V square[W];
    each<W>([&](auto i) ALWAYS { square[i] = rows[i] != nullptr ? load_number(rows[i] + h) : V{}; });
    transpose(square);
    each<W>([&](auto i) ALWAYS { store(columns + i * kTile, square[i]); });
}

// The same for [W keys][2 W] of bfloat16: a pair of numbers travels as one word, which halves the shuffles.
INLINE void turn_pairs(const uint16_t* const* rows, int64_t h, float* columns) {
    V square[W];
    each<W>([&](auto i) ALWAYS { square[i] = rows[i] != nullptr ? load(reinterpret_cast<const float*>(rows[i] + h)) : V{}; });
    transpose(square);
    each<W>([&](auto i) ALWAYS {
        const VU words = reinterpret_cast<VU>(square[i]);
        store(columns + 2 * i * kTile, reinterpret_cast<V>(words << 16));
        store(columns + (2 * i + 1) * kTile, reinterpret_cast<V>(words & 0xffff0000u));
    });
}

// Where the tile's keys and values are; null for what no query of the item sees, and behind the count up to the next W.
template <class T>
INLINE void find_rows(const AttentionCall& call, const Item& item, const Sight& sight, int64_t base, int64_t count, const T** keys, const T** values) {
    const KV& kv = call.kv;
    const int32_t* table = call.batch.block_table + item.sequence * call.batch.table_stride;
    const T *first_key = static_cast<const T*>(kv.keys) + item.head * kv.key_head, *first_value = static_cast<const T*>(kv.values) + item.head * kv.value_head;
    int64_t at = base / kv.block_size, place = base % kv.block_size;
    const uint64_t seen = sight.any_bits(base) & below(count);
    for (int64_t i = 0; i < ceil_div(count, W) * W; ++i) {
        const bool is_seen = (seen >> i & 1) != 0;
        const int64_t block = is_seen ? table[at] : 0;
        keys[i] = is_seen ? first_key + block * kv.key_block + place * kv.key_place : nullptr;
        values[i] = is_seen ? first_value + block * kv.value_block + place * kv.value_place : nullptr;
        if (++place == kv.block_size) place = 0, ++at;
    }
}

// Whether one position can go straight over a tile: its blocks hold keys as columns that no group of W straddles, and no key of the
// tile is hidden from it, so that nothing which was never written, or is another's by now, is multiplied.
INLINE bool is_direct(const AttentionCall& call, const Item& item, const Sight& sight, int64_t base, int64_t count) {
    return item.num_queries == 1 && call.kv.key_place == 1 && call.kv.key_number != 1 && call.kv.block_size % W == 0 && kTile % call.kv.block_size == 0 &&
           (sight.last - base < sight.window || base + count <= sight.sink) && (~sight.near_bits(sight.last, base) & below(count)) == 0;
}

// Lists a tile's keys and values, to be fetched before they are needed: the blocks of a sequence lie apart, which hardware can't foresee.
template <class T>
INLINE void list_tile(const AttentionCall& call, const Item& item, const Sight& sight, int64_t base, int64_t count, Ahead& ahead) {
    const KV& kv = call.kv;
    const int64_t bytes = call.width() * static_cast<int64_t>(sizeof(T));
    if (is_direct(call, item, sight, base, count) && kv.value_place == call.width()) {  // whole blocks, each in one piece
        const int32_t* table = call.batch.block_table + item.sequence * call.batch.table_stride;
        const T *first_key = static_cast<const T*>(kv.keys) + item.head * kv.key_head, *first_value = static_cast<const T*>(kv.values) + item.head * kv.value_head;
        for (int64_t at = base / kv.block_size; at * kv.block_size < base + count; ++at) {
            ahead.add(first_key + table[at] * kv.key_block, bytes * kv.block_size);
            ahead.add(first_value + table[at] * kv.value_block, bytes * least(kv.block_size, base + count - at * kv.block_size));
            const int64_t scale = table[at] * kv.scale_block + item.head * kv.scale_head;
            if constexpr (sizeof(T) == 1) ahead.add(kv.key_scales + scale, 1), ahead.add(kv.value_scales + scale, 1);
        }
        return;
    }
    const T *keys[kTile], *values[kTile];
    find_rows(call, item, sight, base, count, keys, values);
    for (int64_t i = 0; i < count; ++i)
        if (keys[i] != nullptr && kv.key_number == 1) ahead.add(keys[i], bytes);
    for (int64_t i = 0; i < count; ++i)
        if (values[i] != nullptr) ahead.add(values[i], bytes);
}

// The tile's keys, columns [H, 64], and values, rows [64, H], as float32; zeros for what no query of the item sees, unread.
template <class T>
void load_tile(const AttentionCall& call, const Item& item, const Sight& sight, int64_t base, int64_t count, Desk& desk) {
    const int64_t width = call.width();
    const T *keys[kTile], *values[kTile];
    find_rows(call, item, sight, base, count, keys, values);
    const int64_t step = call.kv.key_number;
    for (int64_t first = 0; step != 1 && first < count; first += W) {  // columns already: copied
        bool is_whole = call.kv.key_place == 1 && call.kv.block_size % W == 0;
        for (int i = 0; i < W; ++i) is_whole &= keys[first + i] != nullptr;
        for (int64_t h = 0; is_whole && h < width; ++h) store(desk.keys + h * kTile + first, load_number(keys[first] + h * step));
        for (int64_t i = first; !is_whole && i < first + W; ++i)
            for (int64_t h = 0; h < width; ++h) desk.keys[h * kTile + i] = keys[i] != nullptr ? as_float(keys[i][h * step]) : 0.0f;
    }
    for (int64_t first = 0; step == 1 && first < count; first += W) {
        int64_t h = 0;
        if constexpr (sizeof(T) == 2)
            for (; h + 2 * W <= width; h += 2 * W) turn_pairs(keys + first, h, desk.keys + h * kTile + first);
        for (; h < width; h += W) turn(keys + first, h, desk.keys + h * kTile + first);
    }
    for (int64_t i = 0; i < count; ++i)
        for (int64_t h = 0; h < width; h += W) store(desk.values + i * width + h, values[i] != nullptr ? load_number(values[i] + h) : V{});
}

INLINE V softcapped(V s, const Spec& spec) {
    if (spec.softcap == 0.0f) return s;
    // tanh(z) = 1 - 2 / (e^2z + 1)
    const V power = exponential(s * splat(2.0f / spec.softcap));
    return splat(spec.softcap) * (splat(1.0f) - splat(2.0f) / (power + splat(1.0f)));
}

// A row's sums and weights so far, against a new maximum.
INLINE void rescale(const Desk& desk, int64_t row, float now, int64_t width) {
    const float factor = exponential_of(desk.maxima[row] - now);
    desk.weights[row] *= factor;
    float* sums = desk.sums + row * width;
    for (int64_t h = 0; h < width; h += W) store(sums + h, load(sums + h) * splat(factor));
    desk.maxima[row] = now;
}

// Scores of one row become weights against the running maximum; sums so far are scaled to a new maximum. columns: a multiple of W.
INLINE void soften(const AttentionCall& call, const Sight& sight, int64_t position, int64_t base, int64_t columns, int64_t row, Desk& desk) {
    float* scores = desk.scores + row * kTile;
    const uint64_t near = sight.near_bits(position, base);
    const bool has_far = near != ~uint64_t{0};
    const bool is_open = base + columns - 1 <= position && (position - base < sight.window || base + columns <= sight.sink) && !has_far;
    const V hidden = splat(kNothing);
    V top = hidden;
    for (int64_t j = 0; j < columns; j += W) {
        V s = softcapped(load(scores + j) * splat(call.spec.scale), call.spec);
        if (!is_open) {
            const VI key = lane_index() + static_cast<int32_t>(base + j), last = VI{} + static_cast<int32_t>(position);
            const VI is_near = last - key < VI{} + static_cast<int32_t>(least(sight.window, INT32_MAX)), is_sink = key < VI{} + static_cast<int32_t>(sight.sink);
            s = ((key <= last) & (is_near | is_sink)) != 0 ? s : hidden;
            if (has_far) {
                const VI bits = VI{} + static_cast<int32_t>(near >> j), of_lane = (VI{} + 1) << lane_index();
                s = (bits & of_lane) != 0 ? s : hidden;
            }
        }
        store(scores + j, s);
        top = max(top, s);
    }
    const float before = desk.maxima[row], now = max_lanes(top) > before ? max_lanes(top) : before;
    V weight{};
    for (int64_t j = 0; j < columns; j += W) {
        const V s = load(scores + j);
        const V p = s > hidden ? exponential(s - splat(now)) : V{};
        store(scores + j, p);
        weight += p;
    }
    if (now != before) rescale(desk, row, now, call.width());
    desk.weights[row] += sum_lanes(weight);
}

// Of int8, the scales of a tile's keys and values; zeros for what no query of the item sees, and behind the count up to the next W. Whole
// numbers are multiplied, and then the scores with the keys' scales and the weights with the values', in both ways over a tile.
INLINE void find_scales(const AttentionCall& call, const Item& item, const Sight& sight, int64_t base, int64_t count, Desk& desk) {
    const KV& kv = call.kv;
    const int32_t* table = call.batch.block_table + item.sequence * call.batch.table_stride;
    const uint64_t seen = sight.any_bits(base) & below(count);
    const int64_t whole = ceil_div(count, W) * W;
    for (int64_t i = 0, taken; i < whole; i += taken) {  // as much of a block at once as lies in the tile
        const int64_t block = (base + i) / kv.block_size, place = (base + i) % kv.block_size;
        taken = least(kv.block_size - place, whole - i);
        const uint64_t bits = seen >> i & below(taken);
        const int64_t first = bits == 0 ? 0 : table[block] * kv.scale_block + item.head * kv.scale_head + place;
        if (bits == below(taken)) {
            std::memcpy(desk.key_scales + i, kv.key_scales + first, static_cast<size_t>(taken) * sizeof(float));
            std::memcpy(desk.value_scales + i, kv.value_scales + first, static_cast<size_t>(taken) * sizeof(float));
            continue;
        }
        for (int64_t j = 0; j < taken; ++j) {
            const bool is_seen = (bits >> j & 1) != 0;
            desk.key_scales[i + j] = is_seen ? kv.key_scales[first + j] : 0.0f;
            desk.value_scales[i + j] = is_seen ? kv.value_scales[first + j] : 0.0f;
        }
    }
}

INLINE void scale_scores(const float* scales, int64_t rows, int64_t columns, Desk& desk) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < columns; j += W) store(desk.scores + row * kTile + j, load(desk.scores + row * kTile + j) * load(scales + j));
}

// Where the W keys of each group of a tile begin, when blocks hold keys as columns: numbers [H][W], key_number apart.
template <class T>
INLINE void find_groups(const AttentionCall& call, const Item& item, int64_t base, int64_t count, const T** groups) {
    const KV& kv = call.kv;
    const int32_t* table = call.batch.block_table + item.sequence * call.batch.table_stride;
    const T* first = static_cast<const T*>(kv.keys) + item.head * kv.key_head;
    for (int64_t i = 0; i < count; i += W) groups[i / W] = first + table[(base + i) / kv.block_size] * kv.key_block + (base + i) % kv.block_size;
}

// scores [R, C * W] of one position's rows, straight from the pool: the chain of multiply-adds is that of `accumulate`.
template <int R, int C, bool kHasAhead, class T>
INLINE void score_groups(const AttentionCall& call, const T* const* groups, const float* q, float* scores, const void** lines) {
    const int64_t width = call.width(), step = call.kv.key_number;
    V sums[R][C];
    each<R>([&](auto r) ALWAYS { each<C>([&](auto j) ALWAYS { sums[r][j] = V{}; }); });
    for (int64_t h = 0; h < width; ++h) {
        if (kHasAhead) each<Ahead::kEach>([&](auto i) ALWAYS { prefetch(lines[h * Ahead::kEach + i]); });
        V columns[C];
        each<C>([&](auto j) ALWAYS { columns[j] = load_number(groups[j] + h * step); });
        each<R>([&](auto r) ALWAYS {
            const V x = splat(q[r * width + h]);
            each<C>([&](auto j) ALWAYS { sums[r][j] = fma(x, columns[j], sums[r][j]); });
        });
    }
    each<R>([&](auto r) ALWAYS { each<C>([&](auto j) ALWAYS { store(scores + r * kTile + j * W, sums[r][j]); }); });
}

// sums [R, C * W] += weights [R, count] times the values, straight from the pool.
template <int R, int C, bool kHasAhead, class T>
INLINE void add_values(const AttentionCall& call, const T* const* values, int64_t count, int64_t h, const float* weights, float* sums, const void** lines) {
    const int64_t width = call.width();
    V totals[R][C];
    each<R>([&](auto r) ALWAYS { each<C>([&](auto j) ALWAYS { totals[r][j] = load(sums + r * width + h + j * W); }); });
    for (int64_t i = 0; i < count; ++i) {
        if (kHasAhead) each<Ahead::kEach>([&](auto n) ALWAYS { prefetch(lines[i * Ahead::kEach + n]); });
        V row[C];
        each<C>([&](auto j) ALWAYS { row[j] = load_number(values[i] + h + j * W); });
        each<R>([&](auto r) ALWAYS {
            const V x = splat(weights[r * kTile + i]);
            each<C>([&](auto j) ALWAYS { totals[r][j] = fma(x, row[j], totals[r][j]); });
        });
    }
    each<R>([&](auto r) ALWAYS { each<C>([&](auto j) ALWAYS { store(sums + r * width + h + j * W, totals[r][j]); }); });
}

template <int R, class T>
void score_direct(const AttentionCall& call, const T* const* groups, int64_t num_groups, const float* q, float* scores, Ahead& ahead) {
    int64_t g = 0;
    for (; g + kColumnBlock <= num_groups; g += kColumnBlock)
        if (const void** lines = ahead.take(call.width()))
            score_groups<R, kColumnBlock, true>(call, groups + g, q, scores + g * W, lines);
        else
            score_groups<R, kColumnBlock, false>(call, groups + g, q, scores + g * W, nullptr);
    for (; g < num_groups; ++g) score_groups<R, 1, false>(call, groups + g, q, scores + g * W, nullptr);
}

template <int R, class T>
void add_direct(const AttentionCall& call, const T* const* values, int64_t count, const float* weights, float* sums, Ahead& ahead) {
    int64_t h = 0;
    for (; h + kColumnBlock * W <= call.width(); h += kColumnBlock * W)
        if (const void** lines = ahead.take(count))
            add_values<R, kColumnBlock, true>(call, values, count, h, weights, sums, lines);
        else
            add_values<R, kColumnBlock, false>(call, values, count, h, weights, sums, nullptr);
    for (; h < call.width(); h += W) add_values<R, 1, false>(call, values, count, h, weights, sums, nullptr);
}

// A tile of a decode: scores, softmax, sums. rows: heads of the group. The last group's places behind the context are scored too,
// and hidden by `soften`.
template <class T>
void attend_direct(const AttentionCall& call, const Item& item, const Sight& sight, int64_t rows, int64_t base, int64_t count, Desk& desk, Ahead& ahead) {
    const KV& kv = call.kv;
    const int64_t width = call.width(), num_groups = ceil_div(count, W);
    const T *groups[kTile / W], *values[kTile];
    find_groups(call, item, base, count, groups);
    const int32_t* table = call.batch.block_table + item.sequence * call.batch.table_stride;
    for (int64_t i = 0; i < count;) {
        const T* value = static_cast<const T*>(kv.values) + item.head * kv.value_head + table[(base + i) / kv.block_size] * kv.value_block;
        for (int64_t place = (base + i) % kv.block_size; place < kv.block_size && i < count; ++place, ++i) values[i] = value + place * kv.value_place;
    }
    int64_t row = 0;
    for (; row + 3 <= rows; row += 3) score_direct<3>(call, groups, num_groups, desk.q + row * width, desk.scores + row * kTile, ahead);
    for (; row < rows; ++row) score_direct<1>(call, groups, num_groups, desk.q + row * width, desk.scores + row * kTile, ahead);
    if constexpr (sizeof(T) == 1) find_scales(call, item, sight, base, count, desk), scale_scores(desk.key_scales, rows, num_groups * W, desk);
    for (row = 0; row < rows; ++row) soften(call, sight, sight.first, base, num_groups * W, row, desk);
    if constexpr (sizeof(T) == 1) scale_scores(desk.value_scales, rows, num_groups * W, desk);
    row = 0;
    for (; row + 3 <= rows; row += 3) add_direct<3>(call, values, count, desk.scores + row * kTile, desk.sums + row * width, ahead);
    for (; row < rows; ++row) add_direct<1>(call, values, count, desk.scores + row * kTile, desk.sums + row * width, ahead);
}

}  // namespace
