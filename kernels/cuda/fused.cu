// What libtorch leaves unfused in a step, one kernel each. Compiled at run time by NVRTC, with ELEMENT defined as `float` or `bf16`. All arithmetic is
// fp32; bf16 is rounded to nearest even. Every kernel works with any number of threads per block that is a power of two up to 1024.

#define INFINITE __uint_as_float(0x7f800000u)

struct bf16 {
    unsigned short bits;
};
typedef ELEMENT T;

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline void put(float *to, float x) { *to = x; }
__device__ inline void put(bf16 *to, float x) {
    const unsigned bits = __float_as_uint(x);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = is_nan ? (unsigned short)((bits | 0x00400000u) >> 16) : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The largest number so far, and the sum of e^(x - largest).
struct Sum {
    float max, sum;
};

__device__ inline Sum joined(Sum a, Sum b) {
    const float max = fmaxf(a.max, b.max);
    // Two that have seen nothing yet, or something that is no number.
    if (max == -INFINITE)
        return Sum{max, a.sum + b.sum};
    return Sum{max, a.sum * expf(a.max - max) + b.sum * expf(b.max - max)};
}

// Numbers of a row that a thread has on the way at once.
#define AHEAD 4

// Cross-entropy of `[rows, vocab]` logits, one row per block: `losses` gets weight * loss, and where `flow` is not 0 the logits become their
// gradient times weight * scale. The logits are read twice and written once; nothing else of their size exists.
extern "C" __global__ void cross_entropy(T *logits, const long long *targets, const float *weights, float *losses, long long vocab, float scale,
                                         long long flow) {
    __shared__ Sum parts[1024];
    const long long row = blockIdx.x;
    T *x = logits + row * vocab;
    Sum mine = {-INFINITE, 0.0f};
    for (long long i = threadIdx.x; i < vocab; i += AHEAD * blockDim.x) {
        float seen[AHEAD], max = mine.max;
        for (int k = 0; k < AHEAD; k++) {
            const long long at = i + k * (long long)blockDim.x;
            seen[k] = at < vocab ? wide(x[at]) : -INFINITE;
            max = fmaxf(max, seen[k]);
        }
        float sum = max == -INFINITE ? mine.sum : mine.sum * expf(mine.max - max);
        for (int k = 0; k < AHEAD; k++)
            if (seen[k] != -INFINITE)
                sum += expf(seen[k] - max);
        mine = Sum{max, sum};
    }
    parts[threadIdx.x] = mine;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half)
            parts[threadIdx.x] = joined(parts[threadIdx.x], parts[threadIdx.x + half]);
        __syncthreads();
    }
    const Sum all = parts[0];
    const float log_sum = logf(all.sum), weight = weights[row];
    const long long target = targets[row];
    if (threadIdx.x == 0)
        losses[row] = weight == 0.0f ? 0.0f : weight * (log_sum - (wide(x[target]) - all.max));
    // The target's logit is read before anybody writes.
    __syncthreads();
    if (flow == 0)
        return;
    const float factor = weight * scale;
    for (long long i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float p = expf((wide(x[i]) - all.max) - log_sum);
        put(x + i, weight == 0.0f ? 0.0f : factor * (p - (i == target ? 1.0f : 0.0f)));
    }
}

// `out[t, f] = silu(x[t, i]) * x[t, f + i]` of `x[t, 2 f]`; blocks take rows in turn.
extern "C" __global__ void swiglu(const T *__restrict__ x, T *__restrict__ out, long long rows, long long f) {
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *gates = x + row * 2 * f, *ups = gates + f;
        T *to = out + row * f;
#pragma unroll 4
        for (long long i = threadIdx.x; i < f; i += blockDim.x) {
            const float gate = wide(gates[i]);
            put(to + i, gate / (1.0f + expf(-gate)) * wide(ups[i]));
        }
    }
}

// `dx[t, 2 f]` from `dout[t, f]`.
extern "C" __global__ void swiglu_backward(const T *__restrict__ x, const T *__restrict__ dout, T *__restrict__ dx, long long rows, long long f) {
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *gates = x + row * 2 * f, *ups = gates + f, *flows = dout + row * f;
        T *to = dx + row * 2 * f;
#pragma unroll 4
        for (long long i = threadIdx.x; i < f; i += blockDim.x) {
            const float gate = wide(gates[i]), flow = wide(flows[i]), sigmoid = 1.0f / (1.0f + expf(-gate));
            put(to + i, flow * wide(ups[i]) * sigmoid * (1.0f + gate * (1.0f - sigmoid)));
            put(to + f + i, flow * gate * sigmoid);
        }
    }
}

// Rotary embedding: of each head's `dim` numbers the first `2 half` are turned in pairs (i, i + half) by the angle of their position, times `sign`;
// the rest is copied. `x` is `[tokens, heads, dim]` with `stride` numbers from one token to the next, `out` has no gaps; tokens come in
// sequences of `len`, and blocks take them in turn. `cosines` and `sines` are `[len, half]`.
extern "C" __global__ void rotary(const T *__restrict__ x, T *__restrict__ out, const float *__restrict__ cosines, const float *__restrict__ sines,
                                  long long tokens, long long len, long long heads, long long dim, long long half, long long stride, float sign) {
    const unsigned rest = (unsigned)(dim - half), count = (unsigned)heads * rest, pairs = (unsigned)half;
    for (long long token = blockIdx.x; token < tokens; token += gridDim.x) {
        const float *cosine = cosines + token % len * half, *sine = sines + token % len * half;
#pragma unroll 4
        for (unsigned at = threadIdx.x; at < count; at += blockDim.x) {
            const unsigned head = at / rest, i = at % rest;
            const T *from = x + token * stride + head * dim;
            T *to = out + (token * heads + head) * dim;
            if (i >= pairs) {
                // Behind the pairs.
                to[i + pairs] = from[i + pairs];
                continue;
            }
            const float c = cosine[i], s = sign * sine[i], a = wide(from[i]), b = wide(from[i + pairs]);
            put(to + i, a * c - b * s);
            put(to + i + pairs, b * c + a * s);
        }
    }
}
