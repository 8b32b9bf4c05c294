// Includes CDM_BODY once per instruction set. See dispatch.h. No include guard: once per kernel.
//
// Everything that a body uses from the standard library must be included before this file: a header
// that is first read inside a target region would be compiled for that instruction set only.

#define CDM_ISA isa_baseline
#define CDM_VECTOR_BYTES 16
#include CDM_BODY
#undef CDM_VECTOR_BYTES
#undef CDM_ISA

#if CDM_X86

#if defined(__clang__)
#define CDM_TARGET_BEGIN_AVX2 \
    _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define CDM_TARGET_BEGIN_AVX512                                                                \
    _Pragma(                                                                                   \
        "clang attribute "                                                                     \
        "push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\"))), " \
        "apply_to = function)")
#define CDM_TARGET_END _Pragma("clang attribute pop")
#else
#define CDM_TARGET_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define CDM_TARGET_BEGIN_AVX512 \
    _Pragma("GCC push_options") \
        _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512\")")
#define CDM_TARGET_END _Pragma("GCC pop_options")
#endif

#define CDM_ISA isa_avx2
#define CDM_VECTOR_BYTES 32
CDM_TARGET_BEGIN_AVX2
#include CDM_BODY
CDM_TARGET_END
#undef CDM_VECTOR_BYTES
#undef CDM_ISA

#define CDM_ISA isa_avx512
#define CDM_VECTOR_BYTES 64
CDM_TARGET_BEGIN_AVX512
#include CDM_BODY
CDM_TARGET_END
#undef CDM_VECTOR_BYTES
#undef CDM_ISA

#undef CDM_TARGET_BEGIN_AVX2
#undef CDM_TARGET_BEGIN_AVX512
#undef CDM_TARGET_END

#endif  // CDM_X86
#undef CDM_BODY
