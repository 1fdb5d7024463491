// Signals: what tells that tiles have come to shared memory (mbarrier on a GPU). A signal counts arrivals and bytes;
// when all have come its phase ends, and it counts anew.
#pragma once

#include "block.h"

namespace cuda_on_cpu {

struct Signal {                // the same 8 bytes as on a GPU
    int16_t expected, missing; // arrivals
    int32_t bytes;             // that were announced and have not come
};
// expected > 0 in phase 0, < 0 in phase 1
inline Signal *signal_at(uint64_t *s) { return reinterpret_cast<Signal *>(s); }
inline int signal_phase(uint64_t *s) { return signal_at(s)->expected < 0; }

inline void signal_init(uint64_t *s, int arrivals) {
    *signal_at(s) = {static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0};
}

inline void signal_end_phase(Signal *s) {
    if (s->missing > 0 || s->bytes > 0) return;
    s->missing = static_cast<int16_t>(abs(s->expected));
    s->expected = static_cast<int16_t>(-s->expected);
}

inline void signal_arrive(uint64_t *s, int bytes) {
    Signal *signal = signal_at(s);
    signal->bytes += bytes;
    if (signal->missing == 0) fail("more arrivals at a signal than it was made for");
    signal->missing--;
    signal_end_phase(signal);
}

inline void signal_bytes(uint64_t *s, size_t bytes) {
    Signal *signal = signal_at(s);
    signal->bytes -= static_cast<int>(bytes);
    if (signal->bytes < 0) fail("more bytes for a signal than were announced");
    signal_end_phase(signal);
}

// Until this phase has ended, others run; threads that have not started first.
inline void signal_wait(uint64_t *s, int phase, Site site) {
    Fiber *self = block->self;
    for (int turns = 0; signal_phase(s) == phase; turns++) {
        self->waits_at = "signal_wait";
        self->site = site;
        if (turns == 100000) fail("a signal does not come");
        block->push_ready(self);
        const bool starts = block->started < block->n_threads;
        Fiber *to = starts ? block->idle[--block->n_idle] : block->pop_ready();
        if (to == self) continue;
        block->self = to;
        threadIdx = to->index;
        context_switch(&self->context, &to->context, starts ? fiber_main : nullptr);
    }
    self->waits_at = nullptr;
}

} // namespace cuda_on_cpu
