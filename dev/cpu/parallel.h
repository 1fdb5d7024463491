// Loops over several OS threads: as many as OpenMP would use (OMP_NUM_THREADS, or the CPUs we may have), but not its
// own. OpenMP's threads all wait for each other at the end of a loop and spin for milliseconds meanwhile; where other
// programs wanted the same cores, a training step took several times as long. Here the caller waits only for threads
// that took part, and the others soon go to sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <sched.h>
#include <thread>

#include "container.h"

namespace cuda_on_cpu {

inline void spin(int turn) {
    if (turn % 64 == 63) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Team {
    struct Loop { // valid while `open`
        void (*body)(void *);
        void *argument;
        int64_t n, chunk;
        int threads;
    } loop;
    std::atomic<int64_t> next{0}; // the first index that nobody has taken
    std::atomic<bool> open{false};
    std::atomic<int> active{0};     // helpers that look at `loop`
    std::atomic<uint64_t> loops{0}; // counts them; a change is the signal to come
    std::atomic<int> asleep{0};
    std::mutex in_use, mutex;
    std::condition_variable wake;
    int helpers = 0;

    bool take(int64_t *begin, int64_t *end) {
        *begin = next.fetch_add(loop.chunk);
        *end = std::min(*begin + loop.chunk, loop.n);
        return *begin < loop.n;
    }

    void help(int number) { // a helper's life
        for (uint64_t seen = 0;;) {
            for (int turn = 0; turn < 2000 && loops == seen; turn++) spin(turn);
            if (loops == seen) {
                std::unique_lock<std::mutex> lock(mutex);
                asleep++;
                wake.wait(lock, [&] { return loops != seen; });
                asleep--;
            }
            seen = loops;
            active++; // first announced, then looked: `run` closes first, then looks
            if (open && number < loop.threads - 1) loop.body(loop.argument);
            active--;
        }
    }

    void run(const Loop &new_loop) {
        loop = new_loop;
        next = 0;
        while (helpers < loop.threads - 1) {
            std::thread([this, number = helpers] { help(number); }).detach();
            helpers++;
        }
        const bool together = loop.threads > 1;
        if (together) {
            open = true;
            loops++;
            if (asleep > 0) {
                std::lock_guard<std::mutex> lock(mutex);
                wake.notify_all();
            }
        }
        loop.body(loop.argument);
        open = false;
        for (int turn = 0; together && active > 0; turn++) spin(turn);
    }
};

inline Team &team = *new Team; // never destroyed: at exit the helpers still look at it

// Calls body on up to `threads` OS threads at once, each with a function that hands out the next piece of 0 .. n-1:
//     parallel(threads, n, chunk, [&](auto take) { for (int64_t i, end; take(&i, &end);) for (; i < end; i++) ...; });
template <typename Body> void parallel(int threads, int64_t n, int64_t chunk, Body body) {
    auto run = [&] { body([](int64_t *begin, int64_t *end) { return team.take(begin, end); }); };
    std::lock_guard<std::mutex> lock(team.in_use);
    team.run({[](void *p) { (*static_cast<decltype(run) *>(p))(); }, &run, n, chunk, threads});
}

// work(i) for i in 0 .. n-1, each of about `cost` additions: on this OS thread alone if that is little.
template <typename Work> void for_each(int64_t n, int64_t cost, Work work) {
    const int threads = n * cost < 50000 ? 1 : os_threads_here();
    parallel(threads, n, std::max<int64_t>(1, n / (threads * 8)), [&](auto take) {
        for (int64_t i, end; take(&i, &end);)
            for (; i < end; i++) work(i);
    });
}

} // namespace cuda_on_cpu
