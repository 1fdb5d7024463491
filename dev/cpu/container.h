// What Linux grants this process, where that is less than the machine has: the memory and the CPUs of a container are
// limits of control groups. Each group and all above it have files with theirs: version 2 of the interface under
// /sys/fs/cgroup, version 1 under /sys/fs/cgroup/memory and /cpu.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <string>

namespace cuda_on_cpu {

struct Container {
    double memory = INFINITY, memory_left = INFINITY; // bytes
    double cpus = INFINITY;
};

// The number after `key` on the first line that begins with it, or the second number there; if there is none, -1.
inline double number_in_file(const std::string &path, const char *key, bool second = false) {
    double found = -1;
    char line[256];
    FILE *file = fopen(path.c_str(), "r");
    while (file != nullptr && fgets(line, sizeof(line), file)) {
        double number[2] = {-1, -1};
        if (strncmp(line, key, strlen(key)) != 0 || sscanf(line + strlen(key), "%lf %lf", number, number + 1) < 1)
            continue;
        found = number[second];
        break;
    }
    if (file != nullptr) fclose(file);
    return found;
}

inline void container_memory(Container *c, const std::string &group, bool v2) {
    const double limit = number_in_file(group + (v2 ? "/memory.max" : "/memory.limit_in_bytes"), "");
    if (limit < 0) return; // "max", or no such file
    // What files are held in memory for would be given up: it counts as free.
    double used = number_in_file(group + (v2 ? "/memory.current" : "/memory.usage_in_bytes"), "");
    for (const char *key : {"inactive_file ", "active_file "})
        used -=
            std::max(0.0, number_in_file(group + "/memory.stat", ((v2 ? "" : "total_") + std::string(key)).c_str()));
    c->memory = std::min(c->memory, limit);
    c->memory_left = std::min(c->memory_left, std::max(0.0, limit - std::max(0.0, used)));
}

inline void container_cpus(Container *c, const std::string &group, bool v2) { // quota and period, in microseconds
    const double quota = number_in_file(group + (v2 ? "/cpu.max" : "/cpu.cfs_quota_us"), "");
    const double period =
        v2 ? number_in_file(group + "/cpu.max", "", true) : number_in_file(group + "/cpu.cfs_period_us", "");
    if (quota > 0 && period > 0) c->cpus = std::min(c->cpus, quota / period);
}

inline Container container_now() {
    Container c;
    char line[1024];
    FILE *file = fopen("/proc/self/cgroup", "r");
    while (file != nullptr && fgets(line, sizeof(line), file)) { // "0::/a/b", or with version 1 "4:memory:/a/b"
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : nullptr;
        if (path == nullptr) continue;
        *path++ = '\0';
        const std::string names = std::string(controllers) + ":";
        const bool v2 = names == "::", memory = v2 || names == ":memory:";
        if (!memory && names != ":cpu:" && names != ":cpu,cpuacct:" && names != ":cpuacct,cpu:") continue;
        std::string group(path, strcspn(path, "\n"));
        for (bool more = true; more;) { // this group, and those above it
            while (!group.empty() && group.back() == '/') group.pop_back();
            const std::string folder = std::string("/sys/fs/cgroup") + (v2 ? "" : memory ? "/memory" : "/cpu") + group;
            if (memory) container_memory(&c, folder, v2);
            if (v2 || !memory) container_cpus(&c, folder, v2);
            more = !group.empty();
            group.resize(group.find_last_of('/') == std::string::npos ? 0 : group.find_last_of('/'));
        }
    }
    if (file != nullptr) fclose(file);
    return c;
}

// OS threads to compute with: as many as OpenMP would use, but no more than the container's share of the CPUs.
inline int os_threads_here() {
    static const int cpus = getenv("OMP_NUM_THREADS") ? INT_MAX : (int)std::min(ceil(container_now().cpus), 1e9);
    return std::min(cpus, omp_get_max_threads());
}

} // namespace cuda_on_cpu
