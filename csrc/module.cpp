// The Python module cdm_fast._C: what was built, and what this processor can do. The ops themselves
// register with torch when this library is loaded (torch.ops.cdm_fast.*, torch.ops.cdm_fast_cpp.*).
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace py = pybind11;

namespace cdm {
namespace {

Isa most_allowed = Isa::avx512;

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "baseline";
    }
}

Isa isa_named(const std::string& name) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
        if (name == name_of(isa)) return isa;
    throw std::invalid_argument("instruction set must be baseline, avx2 or avx512, got '" + name + "'");
}

py::dict build_info() {
    py::dict info;
#ifdef CDM_WITH_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    info["compiler"] = __VERSION__;
    // The first two bytes of the version that the build targets: major and minor.
    info["torch_target_version"] =
        std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
    return info;
}

}  // namespace

Isa current_isa() {
    static const Isa best = detect_isa();
    return std::min(best, most_allowed);
}

void limit_isa(Isa most) { most_allowed = most; }

}  // namespace cdm

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU and CUDA kernels of cdm_fast; importing it registers its ops";
    m.def("build_info", &cdm::build_info, "What this library was built with.");
    m.def(
        "cpu_capability", [] { return cdm::name_of(cdm::current_isa()); },
        "The instruction set that the CPU kernels use: baseline, avx2 or avx512.");
    m.def(
        "limit_cpu_capability", [](const std::string& most) { cdm::limit_isa(cdm::isa_named(most)); },
        py::arg("most"), "Lets the CPU kernels use at most this instruction set (for tests).");
}
