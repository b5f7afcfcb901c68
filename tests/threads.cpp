// Ends with 0 and "done" if the kernels' threads do each piece of work once: see tests/e2e/test_kernels.py.
#include "../llama/backends/cpu/csrc/threads.h"

#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>

// Many calls, each of which waits for all threads between two halves: the second reads what others wrote in the first.
static void compute(int seed) {
    for (int call = 0; call < 300; call++) {
        const int threads = 1 + (call / 20 + seed) % 5, total = 37 + call % 3;
        std::vector<int> first(total), second(total);
        Team team;
        parallel(threads, [&](int thread, int size) {
            if (size != threads) abort();
            const Share share(total, thread, size);
            for (int i = share.start; i < share.stop; i++) first[i] += i + 1;
            team.wait(size);
            for (int i = share.start; i < share.stop; i++) second[i] += first[total - 1 - i];
        });
        parallel_for(threads, total, [&](int i) { second[i] -= total - i; });
        for (int i = 0; i < total; i++)
            if (first[i] != i + 1 || second[i] != 0) abort();
    }
}

int main() {
    compute(0);
    std::vector<std::thread> callers;
    for (int seed = 0; seed < 3; seed++) callers.emplace_back(compute, seed);
    for (std::thread &caller : callers) caller.join();
    const pid_t child = fork();
    if (child == 0) {
        compute(1);
        exit(0);  // with what a process does at its end
    }
    int status = -1;
    if (waitpid(child, &status, 0) != child || status != 0) abort();
    compute(2);
    puts("done");
}
