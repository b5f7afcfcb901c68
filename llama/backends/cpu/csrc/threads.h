// Threads that compute together. They are those of the OpenMP that torch has loaded, so that its operations and these
// share them; where there is none, a calling thread keeps some of its own. So no compiler needs to know OpenMP, and the
// library runs with whichever one torch has.
#pragma once
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

// The share of a thread, of `size` threads, in `total` pieces of work.
struct Share {
    int start, stop;
    Share(int total, int thread, int size)
        : start(int(int64_t(total) * thread / size)), stop(int(int64_t(total) * (thread + 1) / size)) {}
};

// Threads that wait for each other.
class Team {
public:
    // Waits until all `size` threads are here. Spinning makes that cheap; where it takes long, as a thread has lost its core,
    // the others sleep, and leave theirs to it.
    void wait(int size) {
        if (size == 1) return;
        const int now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1);
            // Whoever is not seen asleep here sees the new round, and does not fall asleep.
            if (asleep.load()) {
                std::lock_guard<std::mutex> lock(mutex);
                wake.notify_all();
            }
            return;
        }
        for (int spins = 0; spins < SPINS; spins++) {
            if (round.load(std::memory_order_acquire) != now) return;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex);
        asleep.fetch_add(1);
        wake.wait(lock, [&] { return round.load() != now; });
        asleep.fetch_sub(1);
    }

private:
    static constexpr int SPINS = 4000;  // 60 to 300 us

    std::atomic<int> arrived{0}, round{0}, asleep{0};
    std::mutex mutex;
    std::condition_variable wake;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");  // `yield` takes no time on most processors
#endif
    }
};

// OpenMP by GCC's interface, which LLVM's runtime has as well.
struct OpenMP {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*thread)();
    int (*size)();
    void (*set_threads)(int);

    // `parallel` is null where the process has none.
    static const OpenMP &found() {
        static const OpenMP openmp;
        return openmp;
    }

private:
    template <class Function> static void find(const char *name, Function &function) {
        function = Function(dlsym(RTLD_DEFAULT, name));
    }
    OpenMP() {
        find("GOMP_parallel", parallel);
        find("omp_get_thread_num", thread);
        find("omp_get_num_threads", size);
        find("omp_set_num_threads", set_threads);
#if defined(OWN_THREADS)  // for tests
        parallel = nullptr;
#endif
        if (!thread || !size) parallel = nullptr;
    }
};

// A calling thread's own threads, which wait for its next call.
class Pool {
public:
    // The calling thread's pool of so many threads, itself among them.
    static Pool &of(int size) {
        static thread_local struct Owner {
            Pool *pool = nullptr;
            ~Owner() { drop(); }
            void drop() {
                if (pool && pool->process == getpid()) delete pool;  // a fork has no threads but the one that forked
                pool = nullptr;
            }
        } owner;
        if (!owner.pool || owner.pool->size != size || owner.pool->process != getpid()) {
            owner.drop();
            owner.pool = new Pool(size);
        }
        return *owner.pool;
    }

    // Calls f(thread) once for each thread.
    void run(const std::function<void(int)> &f) {
        work = &f;
        team.wait(size);
        f(0);
        team.wait(size);
    }

private:
    const int size;
    const pid_t process = getpid();
    Team team;
    const std::function<void(int)> *work = nullptr;  // null: the end
    std::vector<std::thread> threads;

    explicit Pool(int size) : size(size) {
        for (int thread = 1; thread < size; thread++) threads.emplace_back([this, thread] {
            for (team.wait(this->size); work; team.wait(this->size)) {
                (*work)(thread);
                team.wait(this->size);
            }
        });
    }
    ~Pool() {
        work = nullptr;
        team.wait(size);
        for (std::thread &thread : threads) thread.join();
    }
};

// Calls f(thread, size) on `threads` threads at once, and waits for all. `size` tells how many there are: OpenMP may
// give fewer.
template <class F> void parallel(int threads, const F &f) {
    const OpenMP &openmp = OpenMP::found();
    if (threads <= 1) {
        f(0, 1);
    } else if (openmp.parallel) {
        auto call = [](void *f) { (*(const F *)f)(OpenMP::found().thread(), OpenMP::found().size()); };
        openmp.parallel(call, (void *)&f, unsigned(threads), 0);
    } else {
        Pool::of(threads).run([&](int thread) { f(thread, threads); });
    }
}

// Calls f(piece) for each of `total` pieces of work, each thread for its share of them.
template <class F> void parallel_for(int threads, int total, const F &f) {
    parallel(threads, [&](int thread, int size) {
        const Share share(total, thread, size);
        for (int piece = share.start; piece < share.stop; piece++) f(piece);
    });
}

// Sets the number of threads of torch's operations, for the calling thread, where they are OpenMP's.
extern "C" void set_openmp_threads(int threads) {
    if (OpenMP::found().set_threads) OpenMP::found().set_threads(threads);
}
