// Threads that work through one token together: OpenMP's, which torch's own operations use as well.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>

struct Team {
    int size;
    std::atomic<int> arrived{0};
    std::atomic<int> round{0};

    explicit Team(int size) : size(size) {}

    // Waits for all. Spinning is what makes it cheap; when a thread has lost its core, the others give theirs up.
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

// Thread `rank`'s share of `total` pieces of work.
struct Share {
    int start, stop;
    Share(int total, int rank, int size)
        : start(int(int64_t(total) * rank / size)), stop(int(int64_t(total) * (rank + 1) / size)) {}
};
