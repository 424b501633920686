// The thread pool and the growing scratch memory. No arithmetic. Used by the operations through `parallel` in lanes.h.
#include <chrono>
#include <cstdlib>
#include <new>
#include <system_error>

#if defined(__linux__)
#include <pthread.h>
#endif

#include "braid_cpu.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPausesPerLook = 32;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int num_threads, int spin_us) : spin_us_(spin_us) {
    try {
        for (int thread = 1; thread < num_threads; ++thread) workers_.emplace_back([this, thread] { loop(thread); });
    } catch (const std::system_error&) {  // the system grants no more threads: fewer do the same work
    }
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(Tile tile, void* argument, int64_t num_tiles) {
    tile_ = tile;
    argument_ = argument;
    total_ = num_tiles;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t phase = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(phase << 32 | static_cast<uint32_t>(num_tiles));  // sequentially consistent: see loop()
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    work(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) != num_tiles; ++spins) {
        if (spins < 4096)
            pause_cpu();
        else
            std::this_thread::yield();  // whoever holds the last tile may need this very core
    }
}

void Pool::work(int thread) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(ticket) != 0) {
        if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        tile_(argument_, total_ - static_cast<int64_t>(static_cast<uint32_t>(ticket)), thread);
        done_.fetch_add(1, std::memory_order_release);
        ticket = ticket_.load(std::memory_order_acquire);
    }
}

bool Pool::wait_briefly() const {
    const auto end = Clock::now() + std::chrono::microseconds(spin_us_);
    do {
        for (int look = 0; look < kPausesPerLook; ++look) {
            if (static_cast<uint32_t>(ticket_.load(std::memory_order_relaxed)) != 0) return true;
            pause_cpu();
        }
    } while (Clock::now() < end);
    return false;
}

void Pool::loop(int thread) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "braid-cpu");  // for those who look into the process
#endif
    while (!is_stopping_.load(std::memory_order_relaxed)) {
        work(thread);
        if (wait_briefly()) continue;
        // A sleeper counts itself before it looks at the ticket, run() writes the ticket before it looks at the count: one sees the other.
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [this] { return is_stopping_.load() || static_cast<uint32_t>(ticket_.load()) != 0; });
        sleepers_.fetch_sub(1);
    }
}

Scratch::~Scratch() { std::free(data_); }

void* Scratch::reserve(size_t bytes) {
    if (bytes > size_) {
        const size_t size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
        void* grown = std::aligned_alloc(4096, size);
        if (grown == nullptr) throw std::bad_alloc();
        std::free(data_);
        data_ = grown;
        size_ = size;
    }
    return data_;
}
