// The head's product and the draw in one: of each row's logits only those are kept that can still win, so they are never all written. The
// ids are those that sample.h draws from all logits. Included by layer.h.
#pragma once
#include "product.h"
#include "sample.h"

namespace {

constexpr int64_t kMostRank = 256, kCandidates = 1024;

// A nucleus needs the mass of all logits, unless a rank bounds what it is taken of.
INLINE bool needs_logits(const Draw& draw, int64_t row) {
    if (draw.temperature[row] < kGreedyBelow) return false;
    return draw.top_k[row] > kMostRank || (draw.top_p[row] < 1.0f && draw.top_k[row] <= 0);
}

// What one thread has seen of one row. Without thresholds the best of score + noise is enough; with them all scores that may pass them,
// in the order of their ids, and the least that any one must have.
struct Contest {
    Best best;
    float floor, top;
    int32_t count, is_full;
    float scores[kCandidates];
    int32_t ids[kCandidates];
    void clear() { best = Best{}, floor = top = -INFINITY, count = is_full = 0; }

    // Raises the floor and drops what lies below it.
    void prune(int64_t rank, float log_min_p) {
        if (rank > 0 && count > rank) {
            float copy[kCandidates];
            std::memcpy(copy, scores, static_cast<size_t>(count) * sizeof(float));
            const float last = nth_highest(copy, copy + count, rank);
            floor = last > floor ? last : floor;
        }
        floor = top + log_min_p > floor ? top + log_min_p : floor;
        int32_t kept = 0;
        for (int32_t i = 0; i < count; ++i)
            if (scores[i] >= floor) scores[kept] = scores[i], ids[kept++] = ids[i];
        count = kept;
    }
    INLINE void add(V s, VI of_lane, int64_t rank, float log_min_p) {
        const VI is_in = (s >= splat(floor)) & (s > splat(-INFINITY));
        if (!any(is_in)) return;
        if (count + W > kCandidates) prune(rank, log_min_p);
        if (count + W > kCandidates) {  // a thousand logits that are all alike
            is_full = 1;
            return;
        }
        for (int lane = 0; lane < W; ++lane)
            if (is_in[lane]) scores[count] = s[lane], ids[count++] = of_lane[lane], top = s[lane] > top ? s[lane] : top;
    }
};

struct HeadStore {
    const Draw& draw;
    int64_t num_outputs, num_rows;
    int num_threads;
    Contest* contests;  // [threads][rows]

    HeadStore(Context& context, const Draw& wanted, int64_t outputs, int64_t rows)
        : draw(wanted), num_outputs(outputs), num_rows(rows), num_threads(context.pool.size()) {
        const int64_t count = num_threads * num_rows;
        contests = static_cast<Contest*>(context.contests.reserve(static_cast<size_t>(count) * sizeof(Contest)));
        for (int64_t i = 0; i < count; ++i) contests[i].clear();
    }
    int64_t num_pairs() const { return ceil_div(num_outputs, 32); }
    int64_t first(int64_t pair) const { return pair * 32; }
    int64_t second(int64_t pair) const { return pair * 32 + 16 < num_outputs ? pair * 32 + 16 : pair * 32; }
    bool is_greedy(int64_t row) const { return draw.temperature[row] < kGreedyBelow; }
    bool has_thresholds(int64_t row) const { return !is_greedy(row) && (draw.top_k[row] > 0 || draw.min_p[row] > 0.0f); }
    float log_min_p(int64_t row) const { return draw.min_p[row] > 0.0f ? std::log(draw.min_p[row]) : -INFINITY; }

    void operator()(int64_t pair, int64_t row, const float* numbers, int thread) const {
        Contest& contest = contests[thread * num_rows + row];
        const int32_t* bits = draw.mask == nullptr ? nullptr : draw.mask + row * ceil_div(num_outputs, 32);
        const bool is_sampled = !is_greedy(row);
        for (int lane = 0; lane < 32; lane += W) {
            const int64_t at = pair * 32 + lane;
            if (at >= num_outputs) return;
            const VI of_lane = lane_index() + static_cast<int32_t>(at);
            V s = cleaned(load(numbers + lane));
            if (is_sampled) s = s / splat(draw.temperature[row]);
            s = allowed(s, bits, at);
            if (at + W > num_outputs) s = of_lane < VI{} + static_cast<int32_t>(num_outputs) ? s : splat(-INFINITY);
            if (has_thresholds(row))
                contest.add(s, of_lane, draw.top_k[row], log_min_p(row));
            else
                contest.best.see(is_sampled ? s + Noise(draw, row).of(of_lane) : s, of_lane);
        }
    }

    int64_t capacity() const { return num_threads * kCandidates; }
    size_t finish_bytes() const { return static_cast<size_t>(3 * capacity()) * sizeof(float); }

    // The row's id; -1 where a contest was full. memory: finish_bytes().
    int64_t winner(int64_t row, void* memory) const {
        if (!has_thresholds(row)) {
            Best best = contests[row].best;
            int64_t id = best.winner();
            float top = max_lanes(best.value);
            for (int thread = 1; thread < num_threads; ++thread) {
                const Best& other = contests[thread * num_rows + row].best;
                const float rival = max_lanes(other.value);
                if (rival > top || (rival == top && other.winner() < id)) top = rival, id = other.winner();
            }
            return top == -INFINITY ? 0 : id;
        }
        float* scores = static_cast<float*>(memory);
        Scores found{scores, scores + capacity(), 0, -INFINITY};
        int32_t* ids = reinterpret_cast<int32_t*>(scores + 2 * capacity());
        for (int thread = 0; thread < num_threads; ++thread) {
            const Contest& contest = contests[thread * num_rows + row];
            if (contest.is_full != 0) return -1;
            merge_in(contest, found, ids);
        }
        if (found.count == 0) return 0;
        const int64_t num = found.count;
        for (; found.count % W != 0; ++found.count) scores[found.count] = -INFINITY, ids[found.count] = 0;
        return chosen_id(found, ids, draw, row, num);
    }

    // From the back, so that what is there already moves once. Both are in the order of their ids.
    static void merge_in(const Contest& contest, Scores& found, int32_t* ids) {
        int64_t left = found.count, more = contest.count, to = left + more;
        found.count = to;
        found.top = contest.top > found.top ? contest.top : found.top;
        while (more > 0) {
            const bool is_old = left > 0 && ids[left - 1] > contest.ids[more - 1];
            found.scores[--to] = is_old ? found.scores[left - 1] : contest.scores[more - 1];
            ids[to] = is_old ? ids[left - 1] : contest.ids[more - 1];
            is_old ? --left : --more;
        }
    }
};

}  // namespace
