// Checks every exported operation at each instruction set that this machine can run, or at those named as arguments: against plain double,
// bit for bit with 1, 2 and 5 threads, and a row alone against the same row in a crowd. One line a check; exits with 1 when one fails, with
// 2 when an instruction set can't be run. For builds that Python can't load: sanitizers, and machines under emulation. One file, because
// the checks of all operations are one list.
#include "calls.h"
#include "reference.h"

namespace {

int num_failed = 0;

// One instruction set, with different numbers of threads.
struct Machine {
    const char* isa;
    std::vector<Context*> contexts;
    Context* one() const { return contexts[0]; }
};

// What a call gives with one thread; the same bits with more.
template <class Call>
auto same_with_all(const Machine& machine, Finding& finding, Call&& call) {
    const auto first = call(machine.one());
    for (size_t i = 1; i < machine.contexts.size(); ++i) {
        const auto other = call(machine.contexts[i]);
        finding.expect(other.size() == first.size() && std::memcmp(other.data(), first.data(), first.size() * sizeof first[0]) == 0,
                       "more threads change bits");
    }
    return first;
}

template <class T>
void expect_rows(Finding& finding, const std::vector<T>& rows, const std::vector<T>& all, int64_t first_row) {
    const bool is_equal =
        std::memcmp(rows.data(), all.data() + first_row * static_cast<int64_t>(rows.size()), rows.size() * sizeof(T)) == 0;
    finding.expect(is_equal, "alone and in a crowd differ");
}

template <class T>
std::vector<T> row_of(const std::vector<T>& all, int64_t row, int64_t width) {
    return std::vector<T>(all.begin() + row * width, all.begin() + (row + 1) * width);
}

void expect_near(Finding& finding, const Floats& found, const Expected& expected, const char* what) {
    finding.expect(found.size() == expected.values.size(), "sizes differ");
    for (size_t i = 0; i < found.size() && i < expected.values.size(); ++i)
        finding.near(static_cast<double>(found[i]), expected.values[i], expected.allowed[i], what);
}

void check_linear(const Machine& m, Finding& f, Random random, int64_t out, int64_t in, int64_t bits) {
    const Weights w(random, out, in, bits);
    for (const int64_t rows : {1, 2, 3, 4, 5, 12, 13, 50}) {
        Floats x = random.normals(rows * in);
        if (rows > 2) std::fill(x.begin(), x.begin() + in, 0.0f);
        if (rows > 4) x[static_cast<size_t>(3 * in)] = 1e30f;
        const Floats y = same_with_all(m, f, [&](Context* c) { return linear(c, f, w, x); });
        expect_near(f, y, product_of(w, x, rows), "a product");
        for (const int64_t row : {int64_t{0}, rows / 2, rows - 1}) expect_rows(f, linear(m.one(), f, w, row_of(x, row, in)), y, row);
    }
}

void check_largest(const Machine& m, Finding& f, Random random, int64_t bits) {
    const Weights w(random, 48, 2048, bits, true);
    Floats x(static_cast<size_t>(5 * w.in), 1.0f);
    for (size_t i = 0; i < x.size(); ++i) x[i] = i < 2048 || (i >= 4096 && random.below(2) != 0) ? 1.0f : -1.0f;
    const Floats y = same_with_all(m, f, [&](Context* c) { return linear(c, f, w, x); });
    expect_near(f, y, product_of(w, x, 5), "a product of the largest numbers");
}

void check_embed(const Machine& m, Finding& f, Random random, int64_t out, int64_t in, int64_t bits) {
    const Weights w(random, out, in, bits);
    const Matrix matrix = w.matrix();
    Ids ids{0, out - 1, out / 2};
    for (int i = 0; i < 20; ++i) ids.push_back(random.below(out));
    const auto count = static_cast<int64_t>(ids.size());
    const Floats rows = same_with_all(m, f, [&](Context* c) {
        Output<float> output(count * in);
        const int status = braid_embed(c, &matrix, ids.data(), output.data(), count);
        return output.taken(f, status);
    });
    Expected expected;
    for (const int64_t id : ids)
        for (int64_t i = 0; i < in; ++i) {
            const double scale = bits == 0 ? static_cast<double>(w.scales[static_cast<size_t>(id)]) : w.group_number(0, id, i / 32);
            const double offset = bits == 0 ? 0.0 : w.group_number(1, id, i / 32), number = scale * w.value(id, i);
            expected.values.push_back(number + offset);
            expected.allowed.push_back((std::fabs(number) + std::fabs(number + offset)) * kHalfUlp);
        }
    expect_near(f, rows, expected, "an embedding");
    ids[1] = out;
    Output<float> untouched(count * in);
    f.expect(braid_embed(m.one(), &matrix, ids.data(), untouched.data(), count) == 2, "an id outside the table is taken");
}

void check_norm(const Machine& m, Finding& f, Random random, int64_t width) {
    const Floats x = random.normals(37 * width, 3.0f), residual = random.normals(37 * width), weight = random.normals(width, 0.25f, 1.0f);
    for (const Floats* other : {static_cast<const Floats*>(nullptr), &residual}) {
        const Floats both = same_with_all(m, f, [&](Context* c) { return rms_norm(c, f, x, other, weight, 1e-5f); });
        const auto middle = both.begin() + static_cast<int64_t>(x.size());
        const Floats sums(middle, both.end());
        for (size_t i = 0; i < x.size(); ++i)
            f.expect(sums[i] == (other == nullptr ? x[i] : x[i] + residual[i]), "a sum of x and residual");
        expect_near(f, Floats(both.begin(), middle), norm_of(sums, weight, 1e-5f), "a norm");
    }
}

void check_gated(const Machine& m, Finding& f, Random random, int64_t width, bool is_gelu) {
    Floats gate_up = random.normals(29 * 2 * width, 4.0f);
    gate_up[0] = 200.0f, gate_up[1] = -200.0f, gate_up[static_cast<size_t>(width) - 1] = 0.0f;
    const Floats y = same_with_all(m, f, [&](Context* c) { return gated(c, f, gate_up, width, is_gelu); });
    Expected expected;  // an exponential whose argument has some roundings of its own size, which e^x makes relative ones
    for (int64_t row = 0; row < 29; ++row)
        for (int64_t i = 0; i < width; ++i) {
            const auto gate = static_cast<double>(gate_up[static_cast<size_t>(row * 2 * width + i)]),
                       up = static_cast<double>(gate_up[static_cast<size_t>((row * 2 + 1) * width + i)]);
            const double z = std::min(88.0, std::fabs(is_gelu ? 1.6 * gate + 0.0714 * gate * gate * gate : gate));
            expected.values.push_back(activated(gate, is_gelu) * up);
            expected.allowed.push_back(std::fabs(expected.values.back()) * kHalfUlp * (12.0 + 6.0 * z) + 1e-35);
        }
    expect_near(f, y, expected, "a gate");
}

struct Heads {
    int64_t num, num_kv, width;
};

// Angles of 64 positions: cosines, then sines.
Floats rotary_table(int64_t width) {
    Floats table;
    for (int64_t position = 0; position < 64; ++position)
        for (int64_t i = 0; i < width; ++i) {
            const double angle =
                static_cast<double>(position) * std::pow(1e4, -static_cast<double>(i % (width / 2)) / static_cast<double>(width / 2));
            table.push_back(static_cast<float>(i < width / 2 ? std::cos(angle) : std::sin(angle)));
        }
    return table;
}

// Of int8 over these numbers, and a little more for the rounding of their scale.
template <class Iterator>
double half_step(Iterator first, Iterator last) {
    const auto largest = *std::max_element(first, last, [](auto a, auto b) { return std::fabs(a) < std::fabs(b); });
    return std::fabs(static_cast<double>(largest)) / 127 * 0.501;
}

void check_kv_write(const Machine& m, Finding& f, Random random, Heads heads, int64_t bits, bool has_columns, bool has_norms) {
    const int64_t H = heads.width, row_size = (heads.num + 2 * heads.num_kv) * H;
    const Floats rotary = rotary_table(H), q_norm = random.normals(H, 0.25f, 1.0f), k_norm = random.normals(H, 0.25f, 1.0f);
    Layer layer{};
    layer.num_heads = heads.num, layer.num_kv_heads = heads.num_kv, layer.head_width = H, layer.eps = 1e-5f, layer.rotary = rotary.data();
    if (has_norms) layer.q_norm = q_norm.data(), layer.k_norm = k_norm.data();
    Step step(scattered(random, {{5, 1}, {0, 30}, {17, 3}}, 8, 12), 8);
    step.slots[3] = -1;  // a padded token
    const Floats product = random.normals(step.num_tokens() * row_size);
    const Paged empty(12, heads.num_kv, 8, H, bits, has_columns);
    Paged pool = empty;
    const Floats q = same_with_all(m, f, [&](Context* c) {
        pool = empty;
        return kv_write(c, f, layer, pool, step, product);
    });
    std::vector<bool> is_written(12 * 8);
    for (int64_t t = 0; t < step.num_tokens(); ++t) {
        const float* row = product.data() + t * row_size;
        const float* angles = rotary.data() + step.positions[static_cast<size_t>(t)] * H;
        const int64_t slot = step.slots[static_cast<size_t>(t)];
        if (slot >= 0) is_written[static_cast<size_t>(slot)] = true;
        const double play = 1e-6 * 8, of_word = bits == 16 ? 0x1p-8 : 0.0;  // numbers of at most 8; then half a unit of bfloat16
        for (int64_t head = 0; head < heads.num + heads.num_kv; ++head) {
            const bool is_key = head >= heads.num;
            const auto expected = rotated(row + head * H, !has_norms ? nullptr : is_key ? k_norm.data() : q_norm.data(), angles, H, 1e-5f);
            const double of_byte = bits == 8 ? half_step(expected.begin(), expected.end()) : 0.0;
            for (int64_t h = 0; h < H; ++h) {
                const double number = expected[static_cast<size_t>(h)];
                if (!is_key) f.near(static_cast<double>(q[static_cast<size_t>((t * heads.num + head) * H + h)]), number, play, "a query");
                else if (slot >= 0)
                    f.near(pool.get(0, slot, head - heads.num, h), number, play + of_word * std::fabs(number) + of_byte, "a key");
            }
        }
        for (int64_t i = 0; slot >= 0 && i < heads.num_kv * H; ++i) {
            const float* values = row + (heads.num + heads.num_kv) * H;
            const double stored = pool.get(1, slot, i / H, i % H), value = static_cast<double>(values[i]);
            if (bits == 8) {
                f.near(stored, value, half_step(values + i / H * H, values + i / H * H + H), "a value");
            } else {
                f.expect(stored == (bits == 16 ? static_cast<double>(of_bf16(bf16_of(values[i]))) : value), "a value is not as it was");
            }
        }
    }
    for (int64_t slot = 0; slot < 12 * 8; ++slot)
        for (int64_t i = 0; !is_written[static_cast<size_t>(slot)] && i < 2 * heads.num_kv * H; ++i)
            f.expect(std::isnan(pool.get(static_cast<int>(i % 2), slot, i / 2 / H, i / 2 % H)), "a slot of nobody's is written");
}

struct Attention {
    const char* name;
    Heads heads;
    int64_t block_size, window, sink;
    float softcap;
    Near near;
};

void check_attention(const Machine& m, Finding& f, Random random, const Attention& a, int64_t bits, bool has_columns) {
    auto slices = scattered(random, {{0, 1}, {70, 1}, {300, 1}, {0, 40}, {90, 33}}, a.block_size, 40 + 700 / a.block_size);
    for (Slice& slice : slices) {  // text, then a picture
        const int64_t end = slice.start + slice.length, picture = end / 3;
        for (int64_t at = 0; at < end; ++at) slice.grid.push_back(at < picture ? -1 : static_cast<int32_t>(picture));
    }
    Paged pool(40 + 700 / a.block_size, a.heads.num_kv, a.block_size, a.heads.width, bits, has_columns);  // NaN where no key is
    for (const Slice& slice : slices)
        for (int64_t at = 0; at < slice.start + slice.length; ++at)
            for (int64_t i = 0; i < 2 * a.heads.num_kv * a.heads.width; ++i)
                pool.put(static_cast<int>(i % 2), slice.blocks[static_cast<size_t>(at / a.block_size)] * a.block_size + at % a.block_size,
                         i / 2 / a.heads.width, i / 2 % a.heads.width, random.normal());
    const Step step(slices, a.block_size);
    const Spec spec{1.0f / std::sqrt(static_cast<float>(a.heads.width)), a.softcap, a.window, a.sink, a.near};
    const int64_t row_size = a.heads.num * a.heads.width;
    const Floats q = random.normals(step.num_tokens() * row_size);
    const Floats y = same_with_all(m, f, [&](Context* c) { return attend(c, f, pool, step, spec, q, a.heads.num); });
    expect_near(f, y, attention_of(pool, step, slices, spec, q, a.heads.num), "attention");
    for (size_t s = 0; s < slices.size(); ++s) {  // the last token of each sequence, as a decode
        Slice last = slices[s];
        last.start += last.length - 1, last.length = 1;
        const int64_t row = step.query_start[s + 1] - 1;
        for (Context* c : m.contexts)
            expect_rows(f, attend(c, f, pool, Step({last}, a.block_size), spec, row_of(q, row, row_size), a.heads.num), y, row);
    }
}

Draws many_draws(int64_t vocab, Random& random, bool has_mask, bool has_nucleus) {
    Draws draws;
    const float p = has_nucleus ? 0.8f : 1.0f;
    draws.add(0.0f, 0, 1.0f, 0.0f, 1);
    draws.add(1.0f, 0, 1.0f, 0.0f, 2);
    draws.add(0.7f, 20, 1.0f, 0.0f, -3);
    draws.add(1.3f, 3, 1.0f, 0.1f, 4);
    draws.add(1.0f, 0, 1.0f, 0.05f, 5);
    draws.add(1.0f, 40, 0.7f, 0.0f, 6);
    draws.add(2.0f, 0, p, 0.0f, INT64_MAX);
    draws.add(1.0f, 1, p, 0.0f, INT64_MIN);
    for (int64_t i = 0; has_mask && i < draws.count() * ((vocab + 31) / 32); ++i) draws.mask.push_back(static_cast<int32_t>(random.next()));
    return draws;
}

void check_sample(const Machine& m, Finding& f, Random random, int64_t vocab, bool has_mask) {
    Draws draws = many_draws(vocab, random, has_mask, true);
    Floats logits = random.normals(draws.count() * vocab, 3.0f);
    for (size_t i = 0; i < logits.size(); i += 11) logits[i] = i % 2 != 0 ? -INFINITY : NAN;
    if (vocab > 40) logits[static_cast<size_t>(vocab) + 36] = INFINITY;
    if (has_mask) std::fill(draws.mask.begin(), draws.mask.begin() + (vocab + 31) / 32, 0);  // a row without any token
    const Ids ids = same_with_all(m, f, [&](Context* c) { return sample(c, f, logits, draws); });
    for (int64_t row = 0; row < draws.count(); ++row) {
        const std::string wrong = wrong_draw(logits.data() + row * vocab, vocab, draws, row, ids[static_cast<size_t>(row)]);
        f.expect(wrong.empty(), "row " + std::to_string(row) + ": " + wrong);
        expect_rows(f, sample(m.one(), f, row_of(logits, row, vocab), draws.only(row)), ids, row);
    }
}

// The ids of the fused draw are those that the logits give.
void check_draw(const Machine& m, Finding& f, Random random, int64_t vocab, int64_t in, int64_t bits, bool has_mask) {
    const Weights head(random, vocab, in, bits);
    const Draws draws = many_draws(vocab, random, has_mask, false);
    const Floats x = random.normals(draws.count() * in, bits == 0 ? 1.0f : 10.0f);
    const Ids ids = same_with_all(m, f, [&](Context* c) { return draw_ids(c, f, head, x, draws); });
    f.expect(ids == sample(m.one(), f, linear(m.one(), f, head, x), draws), "the fused draw and that from all logits differ");
    for (int64_t row = 0; row < draws.count(); ++row)
        expect_rows(f, draw_ids(m.one(), f, head, row_of(x, row, in), draws.only(row)), ids, row);
    Draws nucleus = draws.only(1);
    nucleus.top_p[0] = 0.9f;
    const Draw draw = nucleus.draw();
    const Matrix matrix = head.matrix();
    int64_t id = 0;
    f.expect(braid_draw(m.one(), &matrix, x.data(), &draw, &id, 1) == 3, "a nucleus of all logits is drawn without them");
}

// A whole layer: its two fused operations are, to the bit, the fine ones that the other checks compare with double.
void check_layer(const Machine& m, Finding& f, Random random, int64_t bits, bool has_more) {
    const Heads heads{6, 2, 48};
    const int64_t width = bits == 0 ? 92 : 96, wide = 160, q_size = heads.num * heads.width,
                  product_size = (heads.num + 2 * heads.num_kv) * heads.width;
    const Weights qkv(random, product_size, width, bits), out(random, width, q_size, bits), gate_up(random, 2 * wide, width, bits),
        down(random, width, wide, bits);
    const Floats attention_norm = random.normals(width, 0.25f, 1.0f), mlp_norm = random.normals(width, 0.25f, 1.0f),
                 bias = random.normals(product_size);
    const Floats out_norm = random.normals(width, 0.25f, 1.0f), down_norm = random.normals(width, 0.25f, 1.0f);
    const Floats q_norm = random.normals(heads.width, 0.25f, 1.0f), k_norm = random.normals(heads.width, 0.25f, 1.0f),
                 rotary = rotary_table(heads.width);
    const Layer layer{qkv.matrix(),
                      out.matrix(),
                      gate_up.matrix(),
                      down.matrix(),
                      attention_norm.data(),
                      mlp_norm.data(),
                      has_more ? bias.data() : nullptr,
                      has_more ? q_norm.data() : nullptr,
                      has_more ? k_norm.data() : nullptr,
                      rotary.data(),
                      has_more ? out_norm.data() : nullptr,
                      has_more ? down_norm.data() : nullptr,
                      heads.num,
                      heads.num_kv,
                      heads.width,
                      width,
                      has_more,
                      1e-5f};
    const Step step(scattered(random, {{5, 1}, {0, 30}, {17, 3}}, 8, 12), 8);
    const int64_t tokens = step.num_tokens();
    const Floats x = random.normals(tokens * width), residual = random.normals(tokens * width), y = random.normals(tokens * q_size);
    Paged pool(12, heads.num_kv, 8, heads.width, 16, true);
    const auto split = [](const Floats& both) {
        const auto middle = both.begin() + static_cast<int64_t>(both.size() / 2);
        return std::make_pair(Floats(both.begin(), middle), Floats(middle, both.end()));
    };

    for (const bool has_residual : {false, true}) {
        const Floats found = same_with_all(m, f, [&](Context* c) {
            Output<float> q(tokens * q_size), total(tokens * width);
            if (has_residual) std::copy(residual.begin(), residual.end(), total.data());
            const KV kv = pool.kv();
            const Batch batch = step.batch(false);
            const int status =
                braid_qkv(c, &layer, &kv, &batch, x.data(), total.data(), has_residual, step.positions.data(), q.data(), tokens);
            Floats both = q.taken(f, status);
            const Floats sums = total.taken(f, status);
            both.insert(both.end(), sums.begin(), sums.end());
            return both;
        });
        const Paged fused = pool;
        const auto [normed, sums] = split(rms_norm(m.one(), f, x, has_residual ? &residual : nullptr, attention_norm, 1e-5f));
        Floats product = linear(m.one(), f, qkv, normed);
        for (size_t i = 0; has_more && i < product.size(); ++i) product[i] += bias[i % bias.size()];
        Floats expected = kv_write(m.one(), f, layer, pool, step, product);
        expected.insert(expected.end(), sums.begin(), sums.end());
        f.expect(found == expected && fused.words[0] == pool.words[0] && fused.words[1] == pool.words[1], "qkv differs from its parts");
    }
    const Floats found = same_with_all(m, f, [&](Context* c) {
        Output<float> sums(tokens * width), next(tokens * width);
        std::copy(residual.begin(), residual.end(), sums.data());
        const int status = braid_out_mlp(c, &layer, y.data(), sums.data(), next.data(), tokens);
        Floats both = next.taken(f, status);
        const Floats total = sums.taken(f, status);
        both.insert(both.end(), total.begin(), total.end());
        return both;
    });
    const auto after = [&](const Floats& numbers, const Floats& norm) {
        return has_more ? split(rms_norm(m.one(), f, numbers, nullptr, norm, 1e-5f)).first : numbers;
    };
    const auto [normed, sums] = split(rms_norm(m.one(), f, after(linear(m.one(), f, out, y), out_norm), &residual, mlp_norm, 1e-5f));
    Floats expected = after(linear(m.one(), f, down, gated(m.one(), f, linear(m.one(), f, gate_up, normed), wide, has_more)), down_norm);
    expected.insert(expected.end(), sums.begin(), sums.end());
    f.expect(found == expected, "out_mlp differs from its parts");
}

template <class Check, class... Arguments>
void run(const Machine& machine, const std::string& name, Check&& check, Arguments... arguments) {
    Finding finding;
    check(machine, finding, Random{11}, arguments...);
    num_failed += finding.reason.empty() ? 0 : 1;
    if (finding.reason.empty())
        std::printf("ok    %s %s (largest error: %.2f of what is allowed)\n", machine.isa, name.c_str(), finding.worst);
    else std::printf("FAIL  %s %s: %s\n", machine.isa, name.c_str(), finding.reason.c_str());
    std::fflush(stdout);
}

void check_all(const Machine& m) {
    const auto size = [](int64_t out, int64_t in, int64_t bits) {
        return std::to_string(out) + "x" + std::to_string(in) + (bits == 0 ? " int8" : bits == 4 ? " int4" : " 8 bits");
    };
    for (const int64_t bits : {0, 4, 8}) {
        const std::vector<std::pair<int64_t, int64_t>> odd{{1, 1}, {16, 4}, {33, 7}, {100, 92}, {513, 67}, {40, 1536}},
            grouped{{1, 32}, {16, 64}, {33, 96}, {513, 64}, {40, 1536}};
        for (const auto& [out, in] : bits == 0 ? odd : grouped) {
            run(m, "linear " + size(out, in, bits), check_linear, out, in, bits);
            run(m, "embed " + size(out, in, bits), check_embed, out, in, bits);
        }
        run(m, "largest numbers " + size(48, 2048, bits), check_largest, bits);
        for (const bool has_more : {false, true})
            run(m, std::string("layer") + (has_more ? " with bias, head norms and GELU," : "") + size(0, 0, bits).substr(3), check_layer,
                bits, has_more);
        for (const bool has_mask : {false, true})
            run(m, "draw " + size(1003, 64, bits) + (has_mask ? " masked" : ""), check_draw, 1003, 64, bits, has_mask);
        run(m, "draw " + size(5, 32, bits), check_draw, 5, 32, bits, false);
    }
    for (const int64_t width : {1, 7, 64, 92, 576}) run(m, "norm " + std::to_string(width), check_norm, width);
    for (const int64_t width : {3, 48, 1536})
        for (const bool is_gelu : {false, true}) run(m, (is_gelu ? "gelu " : "silu ") + std::to_string(width), check_gated, width, is_gelu);
    for (const int64_t bits : {32, 16, 8})
        for (const bool has_columns : {false, true}) {
            const std::string form = " " + std::to_string(bits) + " bits" + (has_columns ? " columns" : " rows");
            run(m, "kv_write 3/1/20" + form, check_kv_write, Heads{3, 1, 20}, bits, has_columns, has_columns);
            run(m, "kv_write 6/2/48" + form, check_kv_write, Heads{6, 2, 48}, bits, has_columns, !has_columns);
            const Attention cases[] = {
                {"all", {3, 1, 64}, 16, INT64_MAX, 0, 0.0f, {0, 0, 0}},
                {"odd blocks", {8, 8, 16}, 12, INT64_MAX, 0, 0.0f, {0, 0, 0}},
                {"window and sink", {8, 2, 48}, 16, 37, 4, 0.0f, {0, 0, 0}},
                {"softcap", {7, 1, 32}, 64, 100, 0, 20.0f, {0, 0, 0}},
                {"neighbourhood", {4, 2, 32}, 16, INT64_MAX, 0, 0.0f, {9, 2, 1}},
                {"neighbourhood and window", {4, 2, 32}, 16, 50, 3, 0.0f, {7, 3, 2}},
            };
            for (const Attention& one : cases) run(m, std::string("attention ") + one.name + form, check_attention, one, bits, has_columns);
        }
    for (const int64_t vocab : {1, 5, 37, 1003, 5000})
        for (const bool has_mask : {false, true})
            run(m, "sample " + std::to_string(vocab) + (has_mask ? " masked" : ""), check_sample, vocab, has_mask);
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<const char*> names(argv + 1, argv + argc);
    const bool is_named = !names.empty();
    if (Context* best = braid_create("", 1, 50)) {
        std::printf("the best here is %s\n", braid_isa(best));
        braid_destroy(best);
    }
    if (!is_named) names = {"avx512", "avx2", "neon", "generic"};
    for (const char* name : names) {
        Machine machine{name, {}};
        for (const int threads : {1, 2, 5})
            if (Context* context = braid_create(name, threads, 50)) machine.contexts.push_back(context);
        if (machine.contexts.empty()) {
            std::printf("%s can't be run here\n", name);
            if (is_named) return 2;
            continue;
        }
        check_all(machine);
        for (Context* context : machine.contexts) braid_destroy(context);
    }
    return num_failed == 0 ? 0 : 1;
}
