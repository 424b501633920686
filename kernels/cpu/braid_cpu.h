// The C ABI of the CPU back end (plain structs, raw pointers), and what its translation units share: the thread pool, the scratch
// memory and the table of operations that each instruction set fills in. No arithmetic here. Mirrored by library.py.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

// A matrix [out, in] in strips of 16 outputs, zeros where it is padded. Two forms.
// group_bits 0: int8 with one scale per output. data [strips][quads][16][4], quads = ceil(in / 4); scales and sums (of a row's int8
// values) are padded to whole strips.
// group_bits 4 or 8: unsigned numbers of so many bits with a scale and an offset for every 32 inputs of an output, w = scale * u +
// offset. data [strips][in / 32] of: lines of 64 bytes [16][4], with 8 bits one for each quad of inputs, with 4 bits one for quads j (low
// nibbles) and j + 4 (high ones); then 16 scales and 16 offsets in float16. scales and sums are null.
struct Matrix {
    const uint8_t* data;
    const float* scales;
    const int32_t* sums;
    int64_t out, in, group_bits;
};

// One decoder layer. A null pointer is an absent part; the matrices are empty (data null) when the weights are dense.
struct Layer {
    Matrix qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm, *qkv_bias, *q_norm, *k_norm, *rotary, *out_norm, *down_norm;
    int64_t num_heads, num_kv_heads, head_width, width, gelu;
    float eps;
};

// The paged pool of one layer; strides in elements, the last dimension is contiguous.
struct KV {
    void *keys, *values;
    float *key_scales, *value_scales;  // of int8 alone: one for each token and head, [blocks][heads][block_size]
    int64_t key_block, key_head, key_place, value_block, value_head, value_place, scale_block, scale_head;
    int64_t block_size, num_kv_heads, head_width;
    int64_t bits;        // 32: float32, 16: bfloat16, 8: int8
    int64_t key_number;  // between two numbers of a key: 1, or block_size where a block holds its keys as columns
};

// grid_start: null when no token is a code.
struct Batch {
    const int64_t* slots;
    const int32_t* block_table;
    int64_t table_stride;
    const int32_t *query_start, *context_len;
    int64_t num_sequences;
    const int32_t* grid_start;
};

// Which codes of its own picture a code sees; columns 0: all of them.
struct Near {
    int64_t columns, row_radius, column_radius;
};

struct Spec {
    float scale, softcap;
    int64_t window, sink;  // window: INT64_MAX sees everything
    Near near;
};

// What one row of logits is drawn with; see kernels/sample/reference.py. mask: null, or a bit per token in words of 32 for each row.
struct Draw {
    const float *temperature, *top_p, *min_p;
    const int32_t* top_k;
    const int64_t *seeds, *positions;
    const int32_t* mask;
};

// Threads that wait for numbered tiles. The caller is thread 0 and works too; a tile belongs to whoever takes its number first, so a
// thread that the system has put aside delays nobody unless it holds a tile.
class Pool {
  public:
    using Tile = void (*)(void* argument, int64_t tile, int thread);
    Pool(int num_threads, int spin_us);
    ~Pool();
    int size() const { return static_cast<int>(workers_.size()) + 1; }
    void run(Tile tile, void* argument, int64_t num_tiles);

  private:
    void work(int thread);
    void loop(int thread);
    bool wait_briefly() const;
    const int spin_us_;
    // Phase number in the high half, tiles not yet taken in the low half: taking one is one compare-and-swap that also proves that
    // the phase it was read from is still running, so tile_, argument_ and total_ are stable until the tile is reported done.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) Tile tile_ = nullptr;
    void* argument_ = nullptr;
    int64_t total_ = 0;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> is_stopping_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

// Memory that only grows, so that a steady state allocates nothing. 64-byte aligned.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch();
    void* reserve(size_t bytes);

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

struct Context;

// The operations of one instruction set. Shapes and meanings are those of kernels/ops.py.
struct Table {
    const char* name;
    void (*qkv)(Context&, const Layer&, const KV&, const Batch&, const float* x, float* residual, bool has_residual,
                const int64_t* positions, float* q, int64_t num_tokens);
    void (*attend)(Context&, const KV&, const Batch&, const Spec&, const float* q, float* y, int64_t num_heads, int64_t num_tokens);
    void (*out_mlp)(Context&, const Layer&, const float* y, float* residual, float* x, int64_t num_tokens);
    void (*linear)(Context&, const Matrix&, const float* x, float* out, int64_t num_rows);
    void (*embed)(Context&, const Matrix&, const int64_t* ids, float* out, int64_t num_tokens);
    void (*rms_norm)(Context&, const float* x, const float* residual, const float* weight, float eps, float* normed, float* sum,
                     int64_t num_rows, int64_t width);
    void (*kv_write)(Context&, const Layer&, const KV&, const Batch&, const float* product, const int64_t* positions, float* q,
                     int64_t num_tokens);
    void (*gated)(Context&, const float* gate_up, float* out, int64_t num_rows, int64_t width, bool is_gelu);
    void (*sample)(Context&, const float* logits, const Draw&, int64_t* ids, int64_t num_rows, int64_t vocab_size);
    bool (*draw)(Context&, const Matrix& head, const float* x, const Draw&, int64_t* ids, int64_t num_rows);
};

const Table* generic_table();
const Table* avx2_table();    // null where the library is not built for x86
const Table* avx512_table();  // the same
const Table* neon_table();    // null where it is not built for AArch64

// One back end: its instruction set, its threads and its memory. Not to be entered by two threads at once.
struct Context {
    Context(const Table* operations, int num_threads, int spin_us)
        : table(operations), pool(num_threads, spin_us), of_thread(static_cast<size_t>(pool.size())) {}
    const Table* table;
    Pool pool;
    Scratch bytes, scales, product, hidden, items, partial, contests, queries, answers;
    std::vector<Scratch> of_thread;
};
