// Lets a C++ compiler compile fused.cu with one thread per block: what a kernel computes is tested where there is no GPU.
#pragma once
#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __shared__ static
#define __restrict__

struct Place {
    unsigned x;
};
static thread_local Place blockIdx{0}, threadIdx{0};
static const Place blockDim{1}, gridDim{1};

static inline void __syncthreads() {}
static inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
