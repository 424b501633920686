// Paged attention over all sequences of a step: online softmax over tiles of 64 keys, float32 sums, grouped heads share a tile.
// Tiles and splits lie at absolute positions and every query walks through them in the same order, so a query's result depends
// neither on how its prompt was cut nor on its neighbours, and decode is the same code as prefill. Included by isa_*.cpp.
// Source: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (tiles); Dao et al. 2023 (splits).
#pragma once
#include "whole.h"

namespace {

INLINE void clear(float* sums, float* maxima, float* weights, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows * width; ++i) sums[i] = 0.0f;
    for (int64_t r = 0; r < rows; ++r) maxima[r] = kNothing, weights[r] = 0.0f;
}

// One row's closed split joins the row's total.
INLINE void merge(float* total, float& total_maximum, float& total_weight, const float* sums, float maximum, float weight, int64_t width) {
    const float now = maximum > total_maximum ? maximum : total_maximum;
    const float kept = exponential_of(total_maximum - now), added = exponential_of(maximum - now);
    for (int64_t h = 0; h < width; h += W) store(total + h, fma(load(total + h), splat(kept), load(sums + h) * splat(added)));
    total_weight = total_weight * kept + weight * added;
    total_maximum = now;
}

INLINE void finish(float* y, const float* total, float weight, int64_t width) {
    const V divisor = splat(weight > 0.0f ? weight : 1.0f);
    for (int64_t h = 0; h < width; h += W) store(y + h, load(total + h) / divisor);
}

INLINE Sight sight_of(const AttentionCall& call, const Item& item) {
    const int64_t start = call.batch.query_start[item.sequence], length = call.batch.query_start[item.sequence + 1] - start;
    const int64_t first = call.batch.context_len[item.sequence] - length + item.first_query;
    const bool has_grid = call.spec.near.columns > 0 && call.batch.grid_start != nullptr;
    const int32_t* grid_start = has_grid ? call.batch.grid_start + start + item.first_query : nullptr;
    return Sight{first, first + item.num_queries - 1, call.spec.window, call.spec.sink, grid_start, call.spec.near};
}

// The sums, maxima and weights of one split, in the desk. While a tile is worked on, the one after it is fetched: of this item, or
// the first one of `next`, which this thread will likely take then (null: none).
template <class T>
void attend_split(const AttentionCall& call, const Item& item, const Item* next, const Sight& sight, int64_t rows, int64_t split, Desk& desk) {
    clear(desk.sums, desk.maxima, desk.weights, rows, call.width());
    const int64_t end = least((split + 1) * kSplit, sight.last + 1), item_end = least(item.last_split * kSplit, sight.last + 1);
    for (int64_t base = split * kSplit; base < end; base += kTile) {
        const int64_t count = least(kTile, end - base), columns = ceil_div(count, W) * W, after = base + kTile;
        if ((sight.any_bits(base) & below(count)) == 0) continue;  // behind the window and past the sink, or codes far from all queries
        Ahead ahead{desk.lines};
        if (after < item_end) {
            list_tile<T>(call, item, sight, after, least(kTile, item_end - after), ahead);
        } else if (next != nullptr) {
            const Sight other = sight_of(call, *next);
            const int64_t first = next->first_split * kSplit;
            list_tile<T>(call, *next, other, first, least(kTile, other.last + 1 - first), ahead);
        }
#if defined(BRAID_AVX512)
        if constexpr (sizeof(T) == 1) {
            attend_whole(call, item, sight, rows, base, count, desk, ahead);
            ahead.flush();
            continue;
        }
#endif
        if (is_direct(call, item, sight, base, count)) {
            attend_direct<T>(call, item, sight, rows, base, count, desk, ahead);
            ahead.flush();
            continue;
        }
        load_tile<T>(call, item, sight, base, count, desk);
        for (int64_t i = 0; i < rows * kTile; ++i) desk.scores[i] = 0.0f;
        multiply_add(rows, kTile, desk.q, call.width(), desk.keys, call.width(), desk.scores, ahead);
        if constexpr (sizeof(T) == 1) find_scales(call, item, sight, base, count, desk), scale_scores(desk.key_scales, rows, columns, desk);
        for (int64_t row = 0; row < rows; ++row) soften(call, sight, sight.first + row / call.group(), base, columns, row, desk);
        if constexpr (sizeof(T) == 1) scale_scores(desk.value_scales, rows, columns, desk);
        multiply_add(rows, call.width(), desk.scores, kTile, desk.values, count, desk.sums, ahead);
        ahead.flush();
    }
}

template <class T>
void attend_item(const AttentionCall& call, const Item& item, const Item* next, Desk desk) {
    const int64_t group = call.group(), width = call.width(), rows = item.num_queries * group;
    const int64_t start = call.batch.query_start[item.sequence] + item.first_query;
    const Sight sight = sight_of(call, item);
    const int64_t stride = call.num_heads * width, from = start * stride + item.head * group * width;
    for (int64_t row = 0; row < rows; ++row)
        std::memcpy(desk.q + row * width, call.q + from + row / group * stride + row % group * width, static_cast<size_t>(width) * 4);
#if defined(BRAID_AVX512)
    if constexpr (sizeof(T) == 1)
        for (int64_t row = 0; row < rows; ++row) split_query(Whole{call, desk}, row);
#endif
    clear(desk.total, desk.total_maxima, desk.total_weights, rows, width);
    for (int64_t split = item.first_split; split < item.last_split; ++split) {
        attend_split<T>(call, item, next, sight, rows, split, desk);
        if (item.partial >= 0) {
            float* out = call.partial + item.partial * call.rows_per_item() * (width + 2);
            for (int64_t row = 0; row < rows; ++row, out += width + 2) {
                std::memcpy(out, desk.sums + row * width, static_cast<size_t>(width) * 4);
                out[width] = desk.maxima[row], out[width + 1] = desk.weights[row];
            }
            return;
        }
        for (int64_t row = 0; row < rows; ++row)
            merge(desk.total + row * width, desk.total_maxima[row], desk.total_weights[row], desk.sums + row * width, desk.maxima[row], desk.weights[row], width);
    }
    for (int64_t row = 0; row < rows; ++row)
        finish(call.y + from + row / group * stride + row % group * width, desk.total + row * width, desk.total_weights[row], width);
}

// Joins the partial sums of items [first, first + count), which are the splits of the same queries in order.
void merge_items(const AttentionCall& call, const Item* first, int64_t count, Desk desk) {
    const int64_t group = call.group(), width = call.width(), rows = first->num_queries * group;
    const int64_t stride = call.num_heads * width;
    const int64_t from = (call.batch.query_start[first->sequence] + first->first_query) * stride + first->head * group * width;
    clear(desk.total, desk.total_maxima, desk.total_weights, rows, width);
    for (int64_t split = 0; split < count; ++split)
        for (int64_t row = 0; row < rows; ++row) {
            const float* sums = call.partial + ((first + split)->partial * call.rows_per_item() + row) * (width + 2);
            merge(desk.total + row * width, desk.total_maxima[row], desk.total_weights[row], sums, sums[width], sums[width + 1], width);
        }
    for (int64_t row = 0; row < rows; ++row)
        finish(call.y + from + row / group * stride + row % group * width, desk.total + row * width, desk.total_weights[row], width);
}

INLINE int64_t num_splits_of(const AttentionCall& call, int64_t sequence, int64_t last_query) {
    const int64_t length = call.batch.query_start[sequence + 1] - call.batch.query_start[sequence];
    return ceil_div(call.batch.context_len[sequence] - length + last_query + 1, kSplit);
}

// Lists the items; with items == nullptr only counts them. has_parallel_splits: an item per split, else one for all of them.
int64_t list_items(const AttentionCall& call, bool has_parallel_splits, Item* items) {
    int64_t count = 0, partial = 0;
    const int64_t queries = call.queries_per_item();
    for (int64_t sequence = 0; sequence < call.batch.num_sequences; ++sequence) {
        const int64_t length = call.batch.query_start[sequence + 1] - call.batch.query_start[sequence];
        for (int64_t first = 0; call.batch.context_len[sequence] > 0 && first < length; first += queries) {
            const int64_t taken = least(queries, length - first), splits = num_splits_of(call, sequence, first + taken - 1);
            const int64_t pieces = has_parallel_splits ? splits : 1;
            for (int64_t head = 0; head < call.kv.num_kv_heads; ++head)
                for (int64_t piece = 0; piece < pieces; ++piece, ++count) {
                    if (items == nullptr) continue;
                    items[count] = Item{static_cast<int32_t>(sequence), static_cast<int32_t>(head), static_cast<int32_t>(first), static_cast<int32_t>(taken),
                                        pieces > 1 ? piece : 0, pieces > 1 ? piece + 1 : splits, pieces > 1 ? partial++ : -1};
                }
        }
    }
    return count;
}

void attend(Context& context, const KV& kv, const Batch& batch, const Spec& spec, const float* q, float* y, int64_t num_heads, int64_t num_tokens) {
    AttentionCall call{kv, batch, spec, q, y, num_heads, nullptr};
    const int64_t width = kv.head_width, row_size = num_heads * width;
    for (int64_t s = 0; s < batch.num_sequences; ++s)  // a padded sequence, and the padding behind the last one, give zeros
        if (batch.context_len[s] == 0)
            std::memset(y + batch.query_start[s] * row_size, 0, static_cast<size_t>((batch.query_start[s + 1] - batch.query_start[s]) * row_size) * 4);
    const int64_t used = batch.query_start[batch.num_sequences];
    std::memset(y + used * row_size, 0, static_cast<size_t>((num_tokens - used) * row_size) * 4);

    const int64_t whole = list_items(call, false, nullptr), threads = context.pool.size();
    const bool has_parallel_splits = threads > 1 && whole < 4 * threads;
    const int64_t count = has_parallel_splits ? list_items(call, true, nullptr) : whole;
    Item* items = static_cast<Item*>(context.items.reserve(static_cast<size_t>(most(count, 1)) * sizeof(Item)));
    list_items(call, has_parallel_splits, items);
    if (count > whole) call.partial = static_cast<float*>(context.partial.reserve(static_cast<size_t>(count * call.rows_per_item() * (width + 2)) * 4));
    const int64_t rows = call.rows_per_item();
    for (auto& memory : context.of_thread) memory.reserve(Desk::bytes(rows, width));
    parallel(context, count, [&](int64_t tile, int thread) {
        const Desk desk(context.of_thread[static_cast<size_t>(thread)].reserve(0), rows, width);
        const int64_t at = count - 1 - tile;  // the later a query, the more keys: long items first
        const Item* next = at >= threads ? items + at - threads : nullptr;
        const auto attend_one = kv.bits == 16 ? attend_item<uint16_t> : kv.bits == 8 ? attend_item<int8_t> : attend_item<float>;
        attend_one(call, items[at], next, desk);
    });
    const Desk desk(context.of_thread[0].reserve(0), rows, width);
    for (int64_t at = 0; at < count;) {
        int64_t end = at + 1;
        while (items[at].partial >= 0 && end < count && items[end].partial >= 0 && items[end].first_split > 0) ++end;
        if (items[at].partial >= 0) merge_items(call, items + at, end - at, desk);
        at = end;
    }
}

}  // namespace
