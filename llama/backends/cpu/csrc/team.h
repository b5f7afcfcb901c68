// Threads that compute a token together: OpenMP's, which torch's own operations use as well.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>

struct Team {
    int size;
    std::atomic<int> arrived{0};
    std::atomic<int> round{0};

    explicit Team(int size) : size(size) {}

    // Waits until all threads are here. Spinning makes that cheap; where it takes long, as a thread has lost its core,
    // the others yield theirs.
    void wait() {
        if (size == 1) return;
        int now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
            if (spins < 4000) pause();
            else yield();
        }
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    static void yield() { sched_yield(); }
};

// The share of a thread, of `size` threads, in `total` pieces of work.
struct Share {
    int start, stop;
    Share(int total, int thread, int size)
        : start(int(int64_t(total) * thread / size)), stop(int(int64_t(total) * (thread + 1) / size)) {}
};
