// fastdistill.runtime._cuda: the kernels of cuda_quant.cu on raw addresses, with no torch header and no
// CUDA header. A module of its own, so that a missing nvcc never costs the CPU extension; importing
// it needs no driver, since the static runtime looks for one at the first launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastdistill {

void lut4_dequant(const void* qdata, const float* scale, const float* offset, const float* lut,
                  void* out, int out_kind, int64_t count, int64_t block, int64_t cols,
                  const float* row_inv, void* stream);
void lut4_dequant_nested(const void* qdata, const void* absmax, const float* code,
                         const float* nested_absmax, const float* nested_offset,
                         int64_t nested_block, const float* offset, const float* lut, void* out,
                         int out_kind, int64_t count, int64_t block, int64_t cols,
                         const float* row_inv, void* stream);
void quantize_rows(const void* x, int x_dtype, void* q, int q_kind, float* scale, int64_t rows,
                   int64_t cols, void* stream);
std::vector<int> cuda_archs();
std::string cuda_version();

}  // namespace fastdistill

namespace py = pybind11;
namespace fd = fastdistill;

namespace {

// An address as Python passes it: 0 is none.
struct At {
  uintptr_t address;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastdistill (csrc/cuda_quant.cu). Kinds: 0 fp32, 1 bf16, 2 fp16, 3 "
            "fp8-e4m3fn, 4 int8.";
  m.def(
      "lut4_dequant",
      [](uintptr_t qdata, uintptr_t scale, uintptr_t offset, uintptr_t lut, uintptr_t out,
         int out_kind, int64_t count, int64_t block, int64_t cols, uintptr_t row_inv,
         uintptr_t stream) {
        fd::lut4_dequant(At{qdata}, At{scale}, At{offset}, At{lut}, At{out}, out_kind, count, block,
                         cols, At{row_inv}, At{stream});
      },
      py::arg("qdata"), py::arg("scale"), py::arg("offset"), py::arg("lut"), py::arg("out"),
      py::arg("out_kind"), py::arg("count"), py::arg("block"), py::arg("cols"), py::arg("row_inv"),
      py::arg("stream"),
      "out[i] = lut[q_i] * scale[i / block] (+ offset[i / block]) (* row_inv[i / cols])");
  m.def(
      "lut4_dequant_nested",
      [](uintptr_t qdata, uintptr_t absmax, uintptr_t code, uintptr_t nested_absmax,
         uintptr_t nested_offset, int64_t nested_block, uintptr_t offset, uintptr_t lut,
         uintptr_t out, int out_kind, int64_t count, int64_t block, int64_t cols, uintptr_t row_inv,
         uintptr_t stream) {
        fd::lut4_dequant_nested(At{qdata}, At{absmax}, At{code}, At{nested_absmax},
                                At{nested_offset}, nested_block, At{offset}, At{lut}, At{out},
                                out_kind, count, block, cols, At{row_inv}, At{stream});
      },
      py::arg("qdata"), py::arg("absmax"), py::arg("code"), py::arg("nested_absmax"),
      py::arg("nested_offset"), py::arg("nested_block"), py::arg("offset"), py::arg("lut"),
      py::arg("out"), py::arg("out_kind"), py::arg("count"), py::arg("block"), py::arg("cols"),
      py::arg("row_inv"), py::arg("stream"),
      "lut4_dequant, scale[b] = code[absmax[b]] * nested_absmax[b / nested_block] + nested_offset");
  m.def(
      "quantize_rows",
      [](uintptr_t x, int x_dtype, uintptr_t q, int q_kind, uintptr_t scale, int64_t rows,
         int64_t cols, uintptr_t stream) {
        fd::quantize_rows(At{x}, x_dtype, At{q}, q_kind, At{scale}, rows, cols, At{stream});
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("q"), py::arg("q_kind"), py::arg("scale"),
      py::arg("rows"), py::arg("cols"), py::arg("stream"),
      "q = round(x * (top / amax of the row)), scale = amax / top; top is 127 or 448");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["archs"] = fd::cuda_archs();
        info["cuda"] = fd::cuda_version();
        return info;
      },
      "GPU architectures and CUDA version that this binary was built for.");
}
