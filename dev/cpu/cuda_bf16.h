// bfloat16: the upper half of a float. A type to store numbers in; arithmetic is done in float.
#pragma once

#include "cuda_runtime.h"

namespace cuda_on_cpu {

inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

inline uint16_t to_bf16(float x) { // to nearest, ties to even; NaN as the device gives it
    unsigned bits = __float_as_uint(x);
    unsigned rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : rounded);
}

} // namespace cuda_on_cpu

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default; // uninitialized, so that it can lie in shared memory
    __nv_bfloat16(float x) : bits(cuda_on_cpu::to_bf16(x)) {}
    operator float() const { return cuda_on_cpu::from_bf16(bits); }
};

// On the device these would round to bf16, here they would not: say float.
__nv_bfloat16 operator+(__nv_bfloat16, __nv_bfloat16) = delete;
__nv_bfloat16 operator-(__nv_bfloat16, __nv_bfloat16) = delete;
__nv_bfloat16 operator*(__nv_bfloat16, __nv_bfloat16) = delete;
__nv_bfloat16 operator/(__nv_bfloat16, __nv_bfloat16) = delete;

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) { // each difference rounded once, as there
    return {static_cast<float>(a.x) - static_cast<float>(b.x), static_cast<float>(a.y) - static_cast<float>(b.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return make_float2(v.x, v.y); }
