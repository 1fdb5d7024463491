#!/usr/bin/env bash
# nvcc: zeroing the accumulators of a product in the usual way can make all wgmma of a kernel wait for each other, if the
# product is still in flight when the next turn of its loop begins.
#
# Seen with nvcc 13.0.88 for sm_90a. Three products a turn: `s` and `t` are overwritten, `sum` is added to and still in
# flight when the next turn begins. `float sum[32] = {}` stands before the loop, but the compiler zeroes the registers where they are
# first used, after the first product has started. It then serializes every wgmma ("Potential Performance Loss", C7515),
# and says so as an `info` line: no warning, exit 0, right results, and the overlap is gone. An empty asm that names the
# registers (`"+f"`) after they are zeroed keeps the zeros before the loop, and the message goes away.
#
# Prints what it saw; exit 0 if it is still so, 1 if that has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-runtime==13.0.96 || exit 2
cuda=$(dirname "$(dirname "$(find "$folder/venv" -name nvcc -type f | head -n 1)")")

cat > "$folder/kernel.cu" <<'CU'
#include <cstdint>
#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define F32(x) F4(x, 0), F4(x, 4), F4(x, 8), F4(x, 12), F4(x, 16), F4(x, 20), F4(x, 24), F4(x, 28)
#define REGISTERS \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
    "%27,%28,%29,%30,%31}"
__device__ void multiply(float (&x)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 REGISTERS ", %32, %33, p, 1, 1, 0, 0;\n}" : F32(x) : "l"(a), "l"(b), "r"(add));
}
__device__ void hold(float (&x)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(x[i])::"memory");
}
__global__ void __launch_bounds__(128, 1) kernel(float *out, uint64_t a, uint64_t b, int turns) {
    float s[32], t[32], sum[32] = {};
#ifdef PINNED
    hold(sum);
#endif
    for (int i = 0; i < turns; i++) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        multiply(s, a, b, 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        multiply(t, a + 4, b + 4, 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        hold(s), hold(sum);
        float q = 0;
        for (int j = 0; j < 32; j++) q += s[j];
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(t);
        for (int j = 0; j < 32; j++) q *= t[j];
        out[i * 128 + threadIdx.x] = q;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        multiply(sum, a + 2, b + 2, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(sum);
    for (int i = 0; i < 32; i++) out[128 * i + threadIdx.x] = sum[i];
}
CU
build() {                                               # build FLAGS...: what the compiler says of serialized products
    "$cuda/bin/nvcc" -gencode arch=compute_90a,code=sm_90a -cubin -o "$folder/kernel.cubin" "$@" "$folder/kernel.cu" 2>&1 |
        grep -o 'C75[0-9]*.*serialized due to[^'"'"']*' || echo "nothing"
}
plain=$(build) pinned=$(build -DPINNED)
echo "sum[32] = {} alone:       $plain"
echo "held by an empty asm too: $pinned"
[[ $plain == C7515* && $pinned == nothing ]] || { echo "this has changed"; exit 1; }
