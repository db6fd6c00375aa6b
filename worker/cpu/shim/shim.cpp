// What fleet-rank needs of libtorch and tch does not offer. Plain C functions; no exception leaves this file: a failure is a
// non-zero return and a text in `error`.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/headeronly/version.h>
#include <cstring>
#include <exception>

// Since libtorch 2.9, in no header that a program is meant to include.
extern "C" __attribute__((weak)) uint64_t aoti_torch_abi_version();

namespace at::native {
// Exported by libtorch_cpu.so, declared in none of its public headers: a libtorch without it runs too, with other products.
__attribute__((weak)) void mkldnn_matmul(const Tensor &a, const Tensor &b, const Tensor &out, float beta, float alpha);
} // namespace at::native

namespace {

void copy_error(const char *what, char *error, size_t error_len) {
    std::strncpy(error, what, error_len - 1);
    error[error_len - 1] = '\0';
}

at::Tensor view(const void *data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, at::ScalarType type) {
    return at::from_blob(const_cast<void *>(data), {rows, cols}, {row_stride, col_stride}, at::TensorOptions().dtype(type));
}

} // namespace

extern "C" {

// out[m,n] = a[m,k] b[k,n] + beta out, all fp32 (bf16 = 0) or all bf16 (bf16 = 1); strides in elements.
int fleet_dnn_matmul(int bf16, int64_t m, int64_t n, int64_t k, const void *a, int64_t a_row, int64_t a_col, const void *b,
                     int64_t b_row, int64_t b_col, void *out, int64_t out_row, float beta, char *error, size_t error_len) {
    if (at::native::mkldnn_matmul == nullptr) {
        copy_error("this libtorch has no mkldnn_matmul", error, error_len);
        return 1;
    }
    try {
        at::InferenceMode guard;
        const auto type = bf16 ? at::kBFloat16 : at::kFloat;
        at::native::mkldnn_matmul(view(a, m, k, a_row, a_col, type), view(b, k, n, b_row, b_col, type),
                                  view(out, m, n, out_row, 1, type), beta, 1.0f);
        return 0;
    } catch (const std::exception &e) {
        copy_error(e.what(), error, error_len);
    } catch (...) {
        copy_error("unknown C++ exception", error, error_len);
    }
    return 1;
}

// Threads of the products called from the calling thread.
void fleet_set_threads(int threads) {
    try {
        at::set_num_threads(threads);
    } catch (...) {
    }
}

// The library that was loaded, as TORCH_ABI_VERSION has it; 0 of one that does not say it.
uint64_t fleet_libtorch_loaded() {
    return aoti_torch_abi_version == nullptr ? 0 : aoti_torch_abi_version();
}

// The version of the headers.
uint64_t fleet_libtorch_compiled() {
    return TORCH_ABI_VERSION;
}

} // extern "C"
