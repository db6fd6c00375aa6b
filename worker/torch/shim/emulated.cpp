// The CUDA kernels as C++ functions with one thread per block, for tests on the CPU. Compiled once for each type ELEMENT, with PREFIX before
// the names.

#include "../../../kernels/cuda/emulated.h"

#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)
#define cross_entropy NAMED(PREFIX, cross_entropy)
#define swiglu NAMED(PREFIX, swiglu)
#define swiglu_backward NAMED(PREFIX, swiglu_backward)
#define rotary NAMED(PREFIX, rotary)

#include "../../../kernels/cuda/fused.cu"

extern "C" void NAMED(PREFIX, cross_entropy_rows)(long long rows, T *logits, const long long *targets, const float *weights, float *losses,
                                                  long long vocab, float scale, long long flow) {
    for (long long row = 0; row < rows; row++) {
        blockIdx.x = (unsigned)row;
        cross_entropy(logits, targets, weights, losses, vocab, scale, flow);
    }
    blockIdx.x = 0;
}
