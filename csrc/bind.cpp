// fastdistill.runtime._ext: raw pointers and plain values only, no torch header. That keeps the build at a
// few seconds and makes one binary serve every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <cmath>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "cpu_kernels.h"

namespace py = pybind11;

namespace {

std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

// MSVC sets __cplusplus to 199711L by default; _MSVC_LANG is always right.
std::string cpp_standard() {
#ifdef _MSVC_LANG
  const long standard = _MSVC_LANG;
#else
  const long standard = __cplusplus;
#endif
  return "C++" + std::to_string(standard / 100 % 100);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler_name();
  info["cpp_standard"] = cpp_standard();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

py::dict cpu_features() {
  py::dict features;
  for (const auto& [name, present] : fastdistill::cpu_features()) {
    features[py::str(name)] = present;
  }
  return features;
}

// ---- the kernels of cpu_kernels.h, per instruction set

struct Isa {
  const char* name;
  std::vector<std::string> needs;
  const fastdistill::Kernels* kernels;
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
      {"scalar", {}, &fastdistill::kScalarKernels},
#ifdef FASTDISTILL_X86_64
      {"avx2", {"avx2", "fma", "f16c"}, &fastdistill::kAvx2Kernels},
      {"avx512",
       {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
       &fastdistill::kAvx512Kernels},
      {"avx512_vnni",
       {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
       &fastdistill::kVnniKernels},
#else
      {"avx2", {}, nullptr},
      {"avx512", {}, nullptr},
      {"avx512_vnni", {}, nullptr},
#endif
#ifdef FASTDISTILL_BF16_COMPILER
      {"avx512_bf16",
       {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
        "avx512_bf16"},
       &fastdistill::kBf16Kernels},
      {"amx_bf16",
       {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
        "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
       &fastdistill::kAmxKernels},
#else
      {"avx512_bf16", {}, nullptr},
      {"amx_bf16", {}, nullptr},
#endif
  };
  return all;
}

bool runs_here(const Isa& isa) {
  static const fastdistill::FeatureList features = fastdistill::cpu_features();
  if (!isa.kernels) return false;
  bool tiles = false;
  for (const std::string& need : isa.needs) {
    bool present = false;
    for (const auto& [name, here] : features) present = present || (here && name == need);
    if (!present) return false;
    tiles = tiles || need == "amx_tile";
  }
  return !tiles || fastdistill::may_use_tiles();
}

int best_isa() {
  int best = 0;
  for (size_t i = 0; i < isas().size(); ++i)
    if (runs_here(isas()[i])) best = static_cast<int>(i);
  return best;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.emplace_back(isa.name);
  return names;
}

constexpr int kTileModel = -1;  // an isa that every CPU runs, for tests

const fastdistill::Kernels& kernels_of(int isa, int threads) {
  if (threads < 1)
    throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
  if (isa == kTileModel) return fastdistill::kTileModel;
  if (isa < 0 || isa >= static_cast<int>(isas().size()))
    throw py::value_error("isa must be an index into isa_names(), got " + std::to_string(isa));
  const Isa& chosen = isas()[static_cast<size_t>(isa)];
  if (!runs_here(chosen))
    throw py::value_error(std::string("this CPU cannot run the ") + chosen.name +
                          " kernels; best_isa() names the widest it can");
  return *chosen.kernels;
}

// Addresses arrive as integers (Tensor.data_ptr()), dtypes as the numbers of lut4.h.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

fastdistill::Dtype dtype_of(int dtype) {
  if (dtype < 0 || dtype > 2)
    throw py::value_error("dtype must be 0 (fp32), 1 (bf16) or 2 (fp16), got " +
                          std::to_string(dtype));
  return static_cast<fastdistill::Dtype>(dtype);
}

void check(bool fine, const char* what) {
  if (!fine) throw py::value_error(what);
}

void lut4_dequant(int isa, int threads, uintptr_t qdata, uintptr_t scale, uintptr_t offset,
                  uintptr_t lut, uintptr_t out, int out_dtype, int64_t count, int64_t block) {
  const auto& kernels = kernels_of(isa, threads);
  check(count >= 0 && block >= 1, "lut4_dequant needs count >= 0 and block >= 1");
  kernels.lut4_dequant(threads, at<uint8_t>(qdata), at<float>(scale), at<float>(offset),
                       at<float>(lut), at<void>(out), dtype_of(out_dtype), count, block);
}

void int8_dequant(int isa, int threads, uintptr_t qdata, uintptr_t scale, uintptr_t out,
                  int out_dtype, int64_t count, int64_t block) {
  const auto& kernels = kernels_of(isa, threads);
  check(count >= 0 && block >= 1, "int8_dequant needs count >= 0 and block >= 1");
  kernels.int8_dequant(threads, at<int8_t>(qdata), at<float>(scale), at<void>(out),
                       dtype_of(out_dtype), count, block);
}

void quantize_groups(int isa, int threads, uintptr_t x, int x_dtype, uintptr_t q, uintptr_t scale,
                     uintptr_t sum, int64_t rows, int64_t cols, int64_t group) {
  const auto& kernels = kernels_of(isa, threads);
  check(rows >= 0 && group >= 1 && cols % group == 0,
        "quantize_groups needs cols to be a multiple of group");
  kernels.quantize_groups(threads, at<void>(x), dtype_of(x_dtype), at<int8_t>(q), at<float>(scale),
                          at<int32_t>(sum), rows, cols, group);
}

void gemm(int isa, int threads, uintptr_t x, int x_dtype, const fastdistill::GemmWeights& weights,
          uintptr_t out, int64_t M, int64_t N, int64_t K, int64_t act_group) {
  const auto& kernels = kernels_of(isa, threads);
  check(act_group >= 8 && act_group % 8 == 0, "a GEMM needs agroup to be a multiple of 8");
  check(weights.group >= 1 && weights.group % act_group == 0 && K % weights.group == 0,
        "a GEMM needs K to be a multiple of wgroup, and wgroup one of agroup");
  // 2^31 / (255 * 127): where the int32 sum of a group could overflow.
  check(act_group <= 65536, "a GEMM needs agroup <= 65536");
  if (M < 1 || N < 1) return;
  if (!kernels.gemm(threads, at<void>(x), dtype_of(x_dtype), weights, at<void>(out), M, N, K,
                    act_group))
    throw std::bad_alloc();
}

// A table of 16 values as int8 codes times a unit: integers stay exact, others are rounded to 1/254
// of the largest.
float int8_table(uintptr_t lut, uintptr_t codes) {
  const float* const value = at<float>(lut);
  bool integers = true;
  float top = 0;
  for (int i = 0; i < fastdistill::kLutSize; ++i) {
    integers = integers && value[i] == std::nearbyint(value[i]) && std::fabs(value[i]) <= 127;
    top = std::fmax(top, std::fabs(value[i]));
  }
  const float factor = integers ? 1.0f : static_cast<float>(127.0 / top);
  for (int i = 0; i < fastdistill::kLutSize; ++i)
    at<int8_t>(codes)[i] = static_cast<int8_t>(std::nearbyint(value[i] * factor));
  return integers ? 1.0f : static_cast<float>(static_cast<double>(top) / 127.0);
}

void lut4_gemm(int isa, int threads, uintptr_t x, int x_dtype, uintptr_t qdata, uintptr_t codes,
               float unit, uintptr_t scale, uintptr_t offset, uintptr_t bias, uintptr_t out,
               int64_t M, int64_t N, int64_t K, int64_t wgroup, int64_t agroup) {
  const fastdistill::GemmWeights weights{at<void>(qdata),    at<int8_t>(codes), unit,
                                         at<float>(scale), at<float>(offset), at<float>(bias),
                                         wgroup};
  gemm(isa, threads, x, x_dtype, weights, out, M, N, K, agroup);
}

void int8_gemm(int isa, int threads, uintptr_t x, int x_dtype, uintptr_t qdata, uintptr_t scale,
               uintptr_t bias, uintptr_t out, int64_t M, int64_t N, int64_t K, int64_t wgroup,
               int64_t agroup) {
  const fastdistill::GemmWeights weights{at<void>(qdata), nullptr,         1.0f,  at<float>(scale),
                                         nullptr,         at<float>(bias), wgroup};
  gemm(isa, threads, x, x_dtype, weights, out, M, N, K, agroup);
}

void lse_topk(int isa, int threads, uintptr_t z, int64_t rows, int64_t cols, int64_t row_stride,
              float inv_temperature, int64_t k, uintptr_t ids, uintptr_t values,
              uintptr_t lse_rest) {
  const auto& kernels = kernels_of(isa, threads);
  check(k >= 1 && k <= cols, "lse_topk needs 1 <= k <= cols");
  check(cols <= 0xffffffff, "lse_topk needs cols < 2**32");
  check(inv_temperature > 0, "lse_topk needs inv_temperature > 0");
  if (!kernels.lse_topk(threads, at<float>(z), rows, cols, row_stride, inv_temperature, k,
                        at<int64_t>(ids), at<float>(values), at<float>(lse_rest)))
    throw std::bad_alloc();
}

void sum_columns(int isa, int threads, uintptr_t u, int64_t rows, int64_t n, int64_t stride,
                 float inv_T, int moments, uintptr_t top, uintptr_t sums) {
  const auto& kernels = kernels_of(isa, threads);
  check(rows >= 0 && n >= 0 && stride >= n, "sum_columns needs rows, n >= 0 and stride >= n");
  check(moments >= 0 && moments <= 2, "sum_columns needs 0 to 2 moments");
  kernels.sum_columns(threads, at<float>(u), rows, n, stride, inv_T, moments, at<float>(top),
                      at<float>(sums));
}

void softmax_columns(int isa, int threads, uintptr_t u, int64_t rows, int64_t n, int64_t stride,
                     float inv_T, float inv_cap, uintptr_t lse, uintptr_t factor) {
  const auto& kernels = kernels_of(isa, threads);
  check(rows >= 0 && n >= 0 && stride >= n, "softmax_columns needs rows, n >= 0 and stride >= n");
  kernels.softmax_columns(threads, at<float>(u), rows, n, stride, inv_T, inv_cap, at<float>(lse),
                          at<float>(factor));
}

void sum_remainders(int isa, int threads, uintptr_t u, int64_t rows, int64_t n, int64_t stride,
                    uintptr_t sums) {
  const auto& kernels = kernels_of(isa, threads);
  check(rows >= 0 && n >= 0 && stride >= n, "sum_remainders needs rows, n >= 0 and stride >= n");
  kernels.sum_remainders(threads, at<float>(u), rows, n, stride, at<float>(sums));
}


bool has_bf16_gemm(int isa) { return kernels_of(isa, 1).bf16.gemm != nullptr; }

int64_t bf16_scratch(int isa, int threads, int64_t N, int64_t K) {
  const auto& product = kernels_of(isa, threads).bf16;
  check(product.scratch != nullptr, "bf16_scratch needs an isa with has_bf16_gemm");
  return product.scratch(threads, N, K);
}

fastdistill::Matrix matrix(uintptr_t data, int dtype, int64_t row_stride, int64_t k_stride) {
  check(dtype == fastdistill::kFp32 || dtype == fastdistill::kBf16,
        "bf16_gemm needs operands in fp32 (0) or bf16 (1)");
  check(row_stride == 1 || k_stride == 1, "bf16_gemm needs operands with a stride of 1");
  return {at<void>(data), dtype_of(dtype), row_stride, k_stride};
}

void bf16_gemm(int isa, int threads, uintptr_t a, int a_dtype, int64_t a_row, int64_t a_k,
               uintptr_t b, int64_t b_row, int64_t b_k, uintptr_t out, int out_dtype,
               int64_t out_stride, int64_t M, int64_t N, int64_t K, bool remainder, bool add,
               uintptr_t scratch) {
  const auto& product = kernels_of(isa, threads).bf16;
  check(product.gemm != nullptr, "bf16_gemm needs an isa with has_bf16_gemm");
  check(M >= 0 && N >= 0 && K >= 1, "bf16_gemm needs M >= 0, N >= 0 and K >= 1");
  check(out_stride >= N, "bf16_gemm needs out_stride >= N");
  if (M < 1 || N < 1) return;
  product.gemm(threads, matrix(a, a_dtype, a_row, a_k), matrix(b, fastdistill::kBf16, b_row, b_k),
                    at<void>(out), dtype_of(out_dtype), out_stride, M, N, K, remainder, add,
                    at<void>(scratch));
}

double int8_peak(int isa, int threads) {
  const auto& kernels = kernels_of(isa, threads);
  if (!kernels.peak) return 0;
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
    const double operations = kernels.peak(threads, 1000000);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, operations / took.count());
  }
  return best / 1e9;
}

}  // namespace

PYBIND11_MODULE(_ext, m) {
  m.doc() = "Compiled half of fastdistill (csrc/).";
  m.def("cpu_features", &cpu_features,
        "Instruction sets that CPU and OS both support, by their /proc/cpuinfo names.");
  m.def("build_info", &build_info, "Compiler, C++ standard and OpenMP of this binary.");

  m.def("isa_names", &isa_names, "Instruction sets of the kernels; `isa` is an index into this.");
  m.def("best_isa", &best_isa, "The widest of them that this CPU runs.");

  // The GIL is released: none of these touches a Python object.
  const auto def = [&m](const char* name, auto* function, const char* doc, auto... args) {
    m.def(name, function, doc, py::arg("isa"), py::arg("threads"), args...,
          py::call_guard<py::gil_scoped_release>());
  };
  using py::operator""_a;
  def("lut4_dequant", &lut4_dequant,
      "out[i] = lut[q[i]] * scale[i / block] (+ offset[i / block]) in fp32, rounded once.",
      "qdata"_a, "scale"_a, "offset"_a, "lut"_a, "out"_a, "out_dtype"_a, "count"_a, "block"_a);
  def("int8_dequant", &int8_dequant, "out[i] = q[i] * scale[i / block] in fp32, rounded once.",
      "qdata"_a, "scale"_a, "out"_a, "out_dtype"_a, "count"_a, "block"_a);
  def("quantize_groups", &quantize_groups,
      "Per group: scale = max|x| / 127, q = round(x * (127 / max|x|)), sum = sum of q.", "x"_a,
      "x_dtype"_a, "q"_a, "scale"_a, "sum"_a, "rows"_a, "cols"_a, "group"_a);
  def("int8_table", &int8_table, "Writes the int8 codes of a table of 16 floats; returns their unit.");
  def("lut4_gemm", &lut4_gemm,
      "out [M, N] = quantized x [M, K] times weights codes[q] * unit * scale (+ offset), + bias.",
      "x"_a, "x_dtype"_a, "qdata"_a, "codes"_a, "unit"_a, "scale"_a, "offset"_a, "bias"_a, "out"_a,
      "M"_a, "N"_a, "K"_a, "wgroup"_a, "agroup"_a);
  def("int8_gemm", &int8_gemm, "The same for int8 weights q * scale.", "x"_a, "x_dtype"_a,
      "qdata"_a, "scale"_a, "bias"_a, "out"_a, "M"_a, "N"_a, "K"_a, "wgroup"_a, "agroup"_a);
  def("lse_topk", &lse_topk,
      "The k largest of z * inv_temperature per row, and the log-sum-exp of all the others.", "z"_a,
      "rows"_a, "cols"_a, "row_stride"_a, "inv_temperature"_a, "k"_a, "ids"_a, "values"_a,
      "lse_rest"_a);
  def("sum_columns", &sum_columns,
      "top [n] = max(top, z) and sums [moments + 1, n] of e^(z - top) (z - top)^i over the rows of "
      "z = u * inv_T.",
      "u"_a, "rows"_a, "n"_a, "stride"_a, "inv_T"_a, "moments"_a, "top"_a, "sums"_a);
  def("softmax_columns", &softmax_columns, "u [rows, n] = e^(u * inv_T - lse) * factor * (1 - (u * inv_cap)^2) in place.",
      "u"_a, "rows"_a, "n"_a, "stride"_a, "inv_T"_a, "inv_cap"_a, "lse"_a, "factor"_a);
  def("sum_remainders", &sum_remainders,
      "sums [n] += u - bf16(u), summed over the rows of u [rows, n].", "u"_a, "rows"_a, "n"_a,
      "stride"_a, "sums"_a);
  m.def("has_bf16_gemm", &has_bf16_gemm, "Whether an instruction set multiplies bf16 operands; -1 is the model of AMX's tiles.",
        "isa"_a);
  def("bf16_scratch", &bf16_scratch, "Bytes of scratch memory of bf16_gemm, aligned to 64.", "N"_a,
      "K"_a);
  def("bf16_gemm", &bf16_gemm,
      "out [M, N] fp32 or bf16 = or += a [M, K] times b [N, K] bf16; with `remainder`, a is "
      "what its rounding took away.",
      "a"_a, "a_dtype"_a, "a_row"_a, "a_k"_a, "b"_a, "b_row"_a, "b_k"_a, "out"_a,
      "out_dtype"_a, "out_stride"_a, "M"_a, "N"_a, "K"_a, "remainder"_a, "add"_a, "scratch"_a);
  def("int8_peak", &int8_peak, "GOP/s of the int8 products of an isa, best of five runs; 0 without instructions for it.");
}
