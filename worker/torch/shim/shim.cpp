// What fleet-torch needs of libtorch and tch does not offer. Plain C functions over tch's tensor pointers; no exception leaves this file:
// a failure is a non-zero return and a text in `error`.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <dlfcn.h>
#include <cstring>
#include <exception>
#include <memory>

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

// Starts a kernel over tensors: which one, their memory, and numbers. Not 0: it could not.
using Launch = int (*)(const void *fused, int kernel, void *const *pointers, int pointer_count, const int64_t *numbers, int number_count);

enum Kernel { SWIGLU = 0, SWIGLU_BACKWARD = 1, ROTARY = 2 };

// Where to start kernels, as autograd keeps it.
struct Launcher {
    Launch launch;
    const void *fused;

    void save(torch::autograd::AutogradContext *ctx) const {
        ctx->saved_data["launch"] = reinterpret_cast<int64_t>(launch);
        ctx->saved_data["fused"] = reinterpret_cast<int64_t>(fused);
    }
    static Launcher saved(torch::autograd::AutogradContext *ctx) {
        return {reinterpret_cast<Launch>(ctx->saved_data["launch"].toInt()), reinterpret_cast<const void *>(ctx->saved_data["fused"].toInt())};
    }
    void operator()(Kernel kernel, std::vector<void *> pointers, std::vector<int64_t> numbers) const {
        TORCH_CHECK(launch(fused, kernel, pointers.data(), (int)pointers.size(), numbers.data(), (int)numbers.size()) == 0,
                    "a kernel of fleet could not be started");
    }
};

struct Swiglu : public torch::autograd::Function<Swiglu> {
    static at::Tensor forward(torch::autograd::AutogradContext *ctx, const at::Tensor &x, int64_t launcher) {
        const auto &start = *reinterpret_cast<const Launcher *>(launcher);
        TORCH_CHECK(x.is_contiguous(), "swiglu: x has gaps");
        start.save(ctx);
        ctx->save_for_backward({x});
        const int64_t f = x.size(-1) / 2, rows = x.numel() / (2 * f);
        auto shape = x.sizes().vec();
        shape.back() = f;
        auto out = at::empty(shape, x.options());
        start(SWIGLU, {x.data_ptr(), out.data_ptr()}, {rows, f});
        return out;
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx, torch::autograd::variable_list grads) {
        const auto x = ctx->get_saved_variables()[0];
        const auto flow = grads[0].contiguous();
        auto dx = at::empty_like(x);
        const int64_t f = x.size(-1) / 2, rows = x.numel() / (2 * f);
        Launcher::saved(ctx)(SWIGLU_BACKWARD, {x.data_ptr(), flow.data_ptr(), dx.data_ptr()}, {rows, f});
        return {dx, at::Tensor()};
    }
};

// Of `[b, s, n, d]` with room between tokens at most; cosines and sines are `[s, half]` in fp32.
struct Rotary : public torch::autograd::Function<Rotary> {
    static at::Tensor turned(const Launcher &start, const at::Tensor &x, const at::Tensor &cosines, const at::Tensor &sines, int64_t sign) {
        const int64_t b = x.size(0), s = x.size(1), n = x.size(2), d = x.size(3), half = cosines.size(1);
        TORCH_CHECK(x.stride(3) == 1 && x.stride(2) == d && (b == 1 || x.stride(0) == s * x.stride(1)), "rotary: x has gaps within a token");
        TORCH_CHECK(cosines.size(0) >= s && cosines.is_contiguous() && sines.is_contiguous() && 2 * half <= d, "rotary: other tables");
        auto out = at::empty({b, s, n, d}, x.options());
        start(ROTARY, {x.data_ptr(), out.data_ptr(), cosines.data_ptr(), sines.data_ptr()}, {b * s, s, n, d, half, x.stride(1), sign});
        return out;
    }
    static at::Tensor forward(torch::autograd::AutogradContext *ctx, const at::Tensor &x, const at::Tensor &cosines, const at::Tensor &sines,
                              int64_t launcher) {
        const auto &start = *reinterpret_cast<const Launcher *>(launcher);
        start.save(ctx);
        ctx->save_for_backward({cosines, sines});
        return turned(start, x, cosines, sines, 1);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx, torch::autograd::variable_list grads) {
        const auto tables = ctx->get_saved_variables();
        auto dx = turned(Launcher::saved(ctx), grads[0].contiguous(), tables[0], tables[1], -1);
        return {dx, at::Tensor(), at::Tensor(), at::Tensor()};
    }
};

// Makes a matrix `[outputs, inputs]`, for the caller to delete, or null.
using Widen = at::Tensor *(*)(const void *from, int64_t start, int64_t end);

// `x w^T` with a `w` that has no gradient, and is made when it is read: in the forward, and again in the backward.
struct Widened : public torch::autograd::Function<Widened> {
    static at::Tensor matrix(Widen widen, const void *from, int64_t start, int64_t end) {
        const std::unique_ptr<at::Tensor> made(widen(from, start, end));
        TORCH_CHECK(made != nullptr, "a matrix in few bits could not be widened");
        return *made;
    }
    static at::Tensor forward(torch::autograd::AutogradContext *ctx, const at::Tensor &x, const at::Tensor &owner, int64_t widen, int64_t start,
                              int64_t end) {
        ctx->saved_data["owner"] = owner;
        ctx->saved_data["widen"] = widen;
        ctx->saved_data["start"] = start;
        ctx->saved_data["end"] = end;
        return at::linear(x, matrix(reinterpret_cast<Widen>(widen), owner.data_ptr(), start, end));
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx, torch::autograd::variable_list grads) {
        const auto of = [&](const char *name) { return ctx->saved_data[name].toInt(); };
        const auto owner = ctx->saved_data["owner"].toTensor();
        const auto w = matrix(reinterpret_cast<Widen>(of("widen")), owner.data_ptr(), of("start"), of("end"));
        return {grads[0].matmul(w), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
    }
};

} // namespace

extern "C" {

// The file that libtorch was loaded from, or null.
const char *fleet_torch_library() {
    Dl_info info;
    return dladdr(reinterpret_cast<const void *>(&at::globalContext), &info) != 0 ? info.dli_fname : nullptr;
}

// `silu(x[.., :f]) * x[.., f:]` as a new tensor in `out`, with its gradient.
int fleet_torch_swiglu(at::Tensor *x, Launch launch, const void *fused, at::Tensor **out, char *error, size_t error_len) {
    return guarded(error, error_len, [&] {
        const Launcher launcher{launch, fused};
        *out = new at::Tensor(Swiglu::apply(*x, reinterpret_cast<int64_t>(&launcher)));
    });
}

// `x` turned by its positions as a new tensor in `out`, with its gradient.
int fleet_torch_rotary(at::Tensor *x, at::Tensor *cosines, at::Tensor *sines, Launch launch, const void *fused, at::Tensor **out, char *error,
                       size_t error_len) {
    return guarded(error, error_len, [&] {
        const Launcher launcher{launch, fused};
        *out = new at::Tensor(Rotary::apply(*x, *cosines, *sines, reinterpret_cast<int64_t>(&launcher)));
    });
}

// `x w^T` as a new tensor in `out`, with its gradient for `x`; `widen` makes `w` of `from`, which `give_back` gets when no graph reads it any more.
int fleet_torch_widened(at::Tensor *x, Widen widen, void (*give_back)(void *), void *from, int64_t start, int64_t end, at::Tensor **out,
                        char *error, size_t error_len) {
    return guarded(error, error_len, [&] {
        const auto owner = at::from_blob(from, {1}, give_back, at::TensorOptions(at::kByte));
        *out = new at::Tensor(Widened::apply(*x, owner, reinterpret_cast<int64_t>(widen), start, end));
    });
}

// A copy of `x` in memory of the host that a device can read by itself, as a new tensor in `out`.
int fleet_torch_pinned(at::Tensor *x, at::Tensor **out, char *error, size_t error_len) {
    return guarded(error, error_len, [&] { *out = new at::Tensor(x->pin_memory()); });
}

// Memory of the host as a flat tensor in `out`, of fp32, bf16 or fp16 (`number` 0, 1, 2); `give_back` gets `owner` when nothing uses it any more.
int fleet_torch_over(void *data, int64_t len, int number, void (*give_back)(void *), void *owner, at::Tensor **out, char *error,
                     size_t error_len) {
    return guarded(error, error_len, [&] {
        const at::ScalarType kinds[] = {at::kFloat, at::kBFloat16, at::kHalf};
        *out = new at::Tensor(at::from_blob(data, {len}, [=](void *) { give_back(owner); }, at::TensorOptions(kinds[number])));
    });
}

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

// Bytes of a CUDA device that tensors have, that libtorch keeps, and the most that tensors had.
int fleet_torch_memory_in_use(int device, uint64_t *bytes, char *error, size_t error_len) {
    return guarded(error, error_len, [&] {
        const auto stats = c10::getDeviceAllocator(c10::DeviceType::CUDA)->getDeviceStats((c10::DeviceIndex)device);
        const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
        bytes[0] = (uint64_t)stats.allocated_bytes[all].current;
        bytes[1] = (uint64_t)stats.reserved_bytes[all].current;
        bytes[2] = (uint64_t)stats.allocated_bytes[all].peak;
    });
}

// Gives back what libtorch keeps of devices of this kind and no tensor has: CUDA, or Metal.
int fleet_torch_empty_cache(int is_cuda, char *error, size_t error_len) {
    return guarded(error, error_len, [&] {
        c10::getDeviceAllocator(is_cuda ? c10::DeviceType::CUDA : c10::DeviceType::MPS)->emptyCache();
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
