// fastdistill._ext: raw pointers and plain values only, no torch header. That keeps the build at a
// few seconds and makes one binary serve every torch version.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu_features.h"

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

// MSVC leaves __cplusplus at 199711L unless told otherwise; _MSVC_LANG is always right.
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

}  // namespace

PYBIND11_MODULE(_ext, m) {
  m.doc() = "Compiled half of fastdistill (csrc/).";
  m.def("cpu_features", &cpu_features,
        "Instruction sets that CPU and OS both support, by their /proc/cpuinfo names.");
  m.def("build_info", &build_info, "Compiler, C++ standard and OpenMP of this binary.");
}
