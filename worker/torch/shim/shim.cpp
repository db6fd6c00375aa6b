// What fleet-torch needs of libtorch and tch does not offer. Plain C functions over tch's tensor pointers; no exception leaves this file:
// a failure is a non-zero return and a text in `error`.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <cstring>
#include <exception>

namespace {

void copy_error(const char *what, char *error, size_t error_len) {
    std::strncpy(error, what, error_len - 1);
    error[error_len - 1] = '\0';
}

std::vector<at::Tensor> list(at::Tensor *const *tensors, int count) {
    std::vector<at::Tensor> out;
    out.reserve(count);
    for (int i = 0; i < count; i++)
        out.push_back(*tensors[i]);
    return out;
}

template <typename F> int guarded(char *error, size_t error_len, F body) {
    try {
        body();
        return 0;
    } catch (const std::exception &e) {
        copy_error(e.what(), error, error_len);
    } catch (...) {
        copy_error("unknown C++ exception", error, error_len);
    }
    return 1;
}

} // namespace

extern "C" {

// Gradients of sum(output * seed) for each input, into `grads` as new tensors; of an input that has no part in it, a null. Frees the graph.
int fleet_torch_grad(at::Tensor *output, at::Tensor *seed, at::Tensor *const *inputs, int count, at::Tensor **grads, char *error,
                     size_t error_len) {
    return guarded(error, error_len, [&] {
        const auto found = torch::autograd::grad({*output}, list(inputs, count), {*seed}, /*retain_graph=*/false,
                                                 /*create_graph=*/false, /*allow_unused=*/true);
        for (int i = 0; i < count; i++)
            grads[i] = found[i].defined() ? new at::Tensor(found[i]) : nullptr;
    });
}

// One step of AdamW on each of the tensors, in place, in few kernels. `divisor` is a tensor of one number by which gradients are divided,
// `skip` one that turns the step off where it is 1, `step` counts from 1.
int fleet_torch_adamw(at::Tensor *const *params, at::Tensor *const *grads, at::Tensor *const *moments1, at::Tensor *const *moments2,
                      at::Tensor *const *steps, int count, double lr, double beta1, double beta2, double decay, double eps,
                      at::Tensor *divisor, at::Tensor *skip, char *error, size_t error_len) {
    return guarded(error, error_len, [&] {
        at::NoGradGuard guard;
        auto p = list(params, count), g = list(grads, count), m = list(moments1, count), v = list(moments2, count),
             s = list(steps, count);
        at::_fused_adamw_(p, g, m, v, {}, s, lr, beta1, beta2, decay, eps, /*amsgrad=*/false, /*maximize=*/false, *divisor, *skip);
    });
}

} // extern "C"
