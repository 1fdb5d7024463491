// NCCL for the CPU build: ranks are processes of one machine, and what they exchange goes through memory that they
// share. Only what the project uses. Every call returns when its work is done; sums are taken in the order of the
// ranks, so that n ranks give the bits of one rank that adds up n micro-batches.
//
// All ranks make the same calls in the same order. A call works in rounds: each rank copies the next part of its data
// to its slot, all meet, each takes what it needs from all slots, all meet again. A rank that never comes is not
// noticed here: section 9 of train_goldfinch.cu ends the process then.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda_runtime.h>

enum ncclResult_t { ncclSuccess = 0, ncclSystemError = 2, ncclInvalidArgument = 4, ncclInProgress = 7 };
enum ncclDataType_t { ncclChar = 0, ncclFloat = 7, ncclDouble = 8 };
enum ncclRedOp_t { ncclSum = 0 };
struct ncclUniqueId {
    char internal[128]; // where rank 0 has the shared memory open, so that it has no other name and goes with the ranks
};

namespace cuda_on_cpu {

constexpr size_t slot_bytes = 1 << 18;

struct SharedMemory { // at its beginning; the slots follow. New shared memory is zero.
    std::atomic<int> arrived;
    std::atomic<unsigned> meetings;
    alignas(256) char slots[1];
};

} // namespace cuda_on_cpu

struct ncclComm {
    int rank, n;
    cuda_on_cpu::SharedMemory *shared;

    char *slot(int of) const { return shared->slots + static_cast<size_t>(of) * cuda_on_cpu::slot_bytes; }

    void meet() const { // the last one to come lets all go on
        const unsigned now = shared->meetings;
        if (shared->arrived.fetch_add(1) == n - 1) {
            shared->arrived = 0;
            shared->meetings = now + 1;
        }
        for (int turn = 0; shared->meetings == now; turn++)
            if (turn < 1000) cuda_on_cpu::spin(turn);
            else usleep(50);
    }

    // data: `count` numbers. Calls take(begin, end) when numbers begin .. end - 1 of all ranks lie in the slots.
    template <typename T, typename Take> void exchange(const void *data, size_t count, Take take) const {
        const size_t part = cuda_on_cpu::slot_bytes / sizeof(T);
        for (size_t begin = 0; begin < count; begin += part) {
            const size_t end = std::min(begin + part, count);
            memcpy(slot(rank), static_cast<const T *>(data) + begin, (end - begin) * sizeof(T));
            meet();
            take(begin, end);
            meet();
        }
    }

    template <typename T> T sum(size_t i) const { // of number i of all slots
        T total = reinterpret_cast<T *>(slot(0))[i];
        for (int r = 1; r < n; r++) total += reinterpret_cast<T *>(slot(r))[i];
        return total;
    }

    // Number i of the sum goes to to[i - first], if first <= i < last.
    template <typename T> void reduce(const void *from, void *to, size_t count, size_t first, size_t last) const {
        exchange<T>(
            from, count,
            [&](size_t begin, size_t end) {
                for (size_t i = std::max(begin, first); i < std::min(end, last); i++)
                    static_cast<T *>(to)[i - first] = sum<T>(i - begin);
            });
    }
};
using ncclComm_t = ncclComm *;

inline const char *ncclGetErrorString(ncclResult_t result) {
    switch (result) {
    case ncclSuccess: return "no error";
    case ncclSystemError: return "no shared memory";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInProgress: return "in progress";
    }
    return "unknown error";
}

inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    const int file = memfd_create("ranks", MFD_CLOEXEC);
    snprintf(id->internal, sizeof(id->internal), "/proc/%ld/fd/%d", static_cast<long>(getpid()), file);
    return file < 0 ? ncclSystemError : ncclSuccess;
}

inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int n, ncclUniqueId id, int rank) {
    const auto bytes = sizeof(cuda_on_cpu::SharedMemory) + static_cast<size_t>(n) * cuda_on_cpu::slot_bytes;
    const int file = open(id.internal, O_RDWR);
    if (file < 0 || posix_fallocate(file, 0, static_cast<off_t>(bytes)) != 0) return ncclSystemError;
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return ncclSystemError;
    *comm = new ncclComm{rank, n, static_cast<cuda_on_cpu::SharedMemory *>(memory)};
    (*comm)->meet();
    return ncclSuccess;
}

inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    munmap(comm->shared, sizeof(cuda_on_cpu::SharedMemory) + static_cast<size_t>(comm->n) * cuda_on_cpu::slot_bytes);
    delete comm;
    return ncclSuccess;
}

inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *result) {
    *result = ncclSuccess;
    return ncclSuccess;
}

// to (count): the sum over ranks of from (count)
inline ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t,
                                  ncclComm_t comm, cudaStream_t) {
    if (type == ncclFloat) comm->reduce<float>(from, to, count, 0, count);
    else if (type == ncclDouble) comm->reduce<double>(from, to, count, 0, count);
    else return ncclInvalidArgument;
    return ncclSuccess;
}

// Calls between these are one launch on a GPU; here each is done at once.
inline ncclResult_t ncclGroupStart() { return ncclSuccess; }
inline ncclResult_t ncclGroupEnd() { return ncclSuccess; }

// to (count): the sum over ranks of this rank's part of from (n count)
inline ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t,
                                      ncclComm_t comm, cudaStream_t) {
    const auto first = static_cast<size_t>(comm->rank) * count, all = static_cast<size_t>(comm->n) * count;
    if (type == ncclFloat) comm->reduce<float>(from, to, all, first, first + count);
    else if (type == ncclDouble) comm->reduce<double>(from, to, all, first, first + count);
    else return ncclInvalidArgument;
    return ncclSuccess;
}

// to (n count): the from (count) of all ranks
inline ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t) {
    const size_t bytes = count * (type == ncclDouble ? 8 : type == ncclFloat ? 4 : 1);
    comm->exchange<char>(from, bytes, [&](size_t begin, size_t end) {
        for (int r = 0; r < comm->n; r++)
            memcpy(static_cast<char *>(to) + static_cast<size_t>(r) * bytes + begin, comm->slot(r), end - begin);
    });
    return ncclSuccess;
}
