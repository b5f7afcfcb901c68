// Threads that compute a token together: OpenMP's, which torch's own operations use as well.
#pragma once
#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>

struct Team {
    int size;
    std::atomic<int> arrived{0};
    std::atomic<int> round{0};
    std::atomic<int> asleep{0};

    explicit Team(int size) : size(size) {}

    // Waits until all threads are here. Spinning makes that cheap; where it takes long, as a thread has lost its core,
    // the others sleep, and leave theirs to it.
    void wait() {
        if (size == 1) return;
        int now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1);
            // Whoever is not seen asleep here sees the new round, and does not fall asleep.
            if (asleep.load()) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
            return;
        }
        for (int spins = 0; spins < SPINS; spins++) {
            if (round.load(std::memory_order_acquire) != now) return;
            pause();
        }
        asleep.fetch_add(1);
        while (round.load() == now) futex(FUTEX_WAIT_PRIVATE, now);
        asleep.fetch_sub(1);
    }

private:
    static constexpr int SPINS = 4000;  // 60 to 300 us

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    void futex(int operation, int value) { syscall(SYS_futex, &round, operation, value, nullptr, nullptr, 0); }
};

// The share of a thread, of `size` threads, in `total` pieces of work.
struct Share {
    int start, stop;
    Share(int total, int thread, int size)
        : start(int(int64_t(total) * thread / size)), stop(int(int64_t(total) * (thread + 1) / size)) {}
};
