// Instruction sets: one source, compiled once per set, chosen at run time.
//
// A kernel's body lives in a header without include guard that defines functions inside
// `namespace CDM_ISA`. The .cpp file includes it once per set:
//
//     #define CDM_BODY "my_op_body.h"
//     #include "for_each_isa.h"          // gives namespaces isa_baseline, isa_avx2, isa_avx512
//
//     CDM_DISPATCH(my_kernel(arguments));   // calls isa_<best>::my_kernel(arguments)
//
// On a compiler or processor other than x86-64 GCC/Clang there is only isa_baseline.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define CDM_X86 1
#include <immintrin.h>
#else
#define CDM_X86 0
#endif

namespace cdm {

enum class Isa { baseline, avx2, avx512 };

// The best set that this processor has.
inline Isa detect_isa() {
#if CDM_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

// The set that the kernels use: the best one, unless a test has asked for a lesser one.
Isa current_isa();
void limit_isa(Isa most);

}  // namespace cdm

#if CDM_X86
#define CDM_DISPATCH(...)              \
    switch (cdm::current_isa()) {      \
        case cdm::Isa::avx512:         \
            isa_avx512::__VA_ARGS__;   \
            break;                     \
        case cdm::Isa::avx2:           \
            isa_avx2::__VA_ARGS__;     \
            break;                     \
        default:                       \
            isa_baseline::__VA_ARGS__; \
    }
#else
#define CDM_DISPATCH(...) isa_baseline::__VA_ARGS__
#endif
