// Vectors of CDM_VECTOR_BYTES for the current instruction set: loads, stores, exp and sigmoid.
//
// Included inside a kernel's body (see dispatch.h), so without include guard of its own. Written with the
// compiler's vector extensions, which GCC and Clang lower to any processor; AVX-512 has instructions of
// its own for what takes several of these. A body may not use templates of the standard library: the linker
// could take the instantiation of one instruction set for the others.

#define CDM_INLINE inline __attribute__((always_inline))
#if CDM_X86 && CDM_VECTOR_BYTES == 64
#define CDM_AVX512 1
#else
#define CDM_AVX512 0
#endif

namespace CDM_ISA {

typedef float VecF __attribute__((vector_size(CDM_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(CDM_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(CDM_VECTOR_BYTES)));
typedef uint16_t HalfU __attribute__((vector_size(CDM_VECTOR_BYTES / 2)));
typedef double VecD __attribute__((vector_size(CDM_VECTOR_BYTES)));

// Storage type -> type and vector of the arithmetic.
template <class T>
struct Math;
template <>
struct Math<float> {
    using Scalar = float;
    using Vec = VecF;
};
template <>
struct Math<double> {
    using Scalar = double;
    using Vec = VecD;
};
template <>
struct Math<cdm::bf16> {
    using Scalar = float;
    using Vec = VecF;
};

template <class T>
constexpr int lanes_of() {
    return CDM_VECTOR_BYTES / int(sizeof(typename Math<T>::Scalar));
}

template <class To, class From>
CDM_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

CDM_INLINE VecF load(const float* p) {
    VecF v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

CDM_INLINE VecD load(const double* p) {
    VecD v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

CDM_INLINE VecF load(const cdm::bf16* p) {
#if CDM_AVX512
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return bit_cast<VecF>(_mm512_slli_epi32(bits, 16));
#else
    HalfU bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return bit_cast<VecF>(__builtin_convertvector(bits, VecU) << 16);
#endif
}

#if CDM_AVX512
// The numbers 1, 3, ..., 31, 0, ..., 0.
CDM_INLINE __m512i odd_words() {
    return _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d, 0xb0009,
                            0x70005, 0x30001);
}
#endif

CDM_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }
CDM_INLINE void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof(v)); }

#if CDM_AVX512
// bf16 in the upper halves of words, whose lower halves are arbitrary.
CDM_INLINE __m512i rounded_to_bf16(VecF v) {
    const __m512i bits = bit_cast<__m512i>(v), below_half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i rounded = _mm512_mask_sub_epi32(below_half, odd, below_half, _mm512_set1_epi32(-1));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
}
#endif

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
CDM_INLINE void store(cdm::bf16* p, VecF v) {
#if CDM_AVX512
    const __m512i high = _mm512_permutexvar_epi16(odd_words(), rounded_to_bf16(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(high));
#else
    const VecU bits = bit_cast<VecU>(v);
    const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const VecU kept = (v == v ? rounded : bits | 0x400000u) >> 16;
    const HalfU half = __builtin_convertvector(kept, HalfU);
    __builtin_memcpy(p, &half, sizeof(half));
#endif
}

// Two vectors at once. Of bf16, the even elements go to the first and the odd ones to the second, which takes
// half the instructions of two loads; of other types, the first half and the second.
template <class T>
CDM_INLINE void load_pair(const T* p, typename Math<T>::Vec& first, typename Math<T>::Vec& second) {
    first = load(p);
    second = load(p + lanes_of<T>());
}

template <class T>
CDM_INLINE void store_pair(T* p, typename Math<T>::Vec first, typename Math<T>::Vec second) {
    store(p, first);
    store(p + lanes_of<T>(), second);
}

#if CDM_AVX512

CDM_INLINE void load_pair(const cdm::bf16* p, VecF& even, VecF& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even = bit_cast<VecF>(_mm512_slli_epi32(both, 16));
    odd = bit_cast<VecF>(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
}

CDM_INLINE void store_pair(cdm::bf16* p, VecF even, VecF odd) {
    const __m512i low = _mm512_srli_epi32(rounded_to_bf16(even), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, rounded_to_bf16(odd)));
}

#endif

// The first `lanes` elements; the rest of the vector is 0 (load) or left alone in memory (store).
#if CDM_AVX512

CDM_INLINE VecF load_some(const float* p, int lanes) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << lanes) - 1), p);
}

CDM_INLINE void store_some(float* p, VecF v, int lanes) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << lanes) - 1), v);
}

#endif

template <class T>
CDM_INLINE typename Math<T>::Vec load_some(const T* p, int lanes) {
    T buffer[lanes_of<T>()] = {};
    for (int lane = 0; lane < lanes; ++lane) buffer[lane] = p[lane];
    return load(buffer);
}

template <class T>
CDM_INLINE void store_some(T* p, typename Math<T>::Vec v, int lanes) {
    T buffer[lanes_of<T>()];
    store(buffer, v);
    for (int lane = 0; lane < lanes; ++lane) p[lane] = buffer[lane];
}

template <class Vec, class Scalar>
CDM_INLINE Vec broadcast(Scalar value) {
    return Vec{} + value;
}

// e^x for fp32, relative error below 2^-22 where the result is a normal number; the argument is clamped to
// [-87.3, 88.3], and NaN stays NaN. x = n ln 2 + r, |r| <= ln(2)/2; e^r by its Taylor polynomial of degree 7.
CDM_INLINE VecF exp(VecF x) {
    x = x > 88.3f ? broadcast<VecF>(88.3f) : x;
    x = x < -87.3f ? broadcast<VecF>(-87.3f) : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const VecF shifted = x * 1.44269504f + magic;
    const VecF n = shifted - magic;
    const VecF r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    VecF p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const VecI exponent = (bit_cast<VecI>(shifted) << 23) + 0x3f800000;
    return p * bit_cast<VecF>(exponent);
}

CDM_INLINE VecD exp(VecD x) {
    VecD y = {};
    for (int lane = 0; lane < lanes_of<double>(); ++lane) y[lane] = __builtin_exp(x[lane]);
    return y;
}

// 1 / (1 + e^-u) in the precision that T needs: relative error below 2^-22 for fp32 and 2^-13 for bf16, as
// long as the result is a normal number; libm's for fp64. NaN stays NaN.
//
// e^-u = 2^t = 2^floor(t) 2^r, t = -u log2(e); 2^r on [0, 1) by minimax polynomials (Lawson's iteration).
template <class T>
CDM_INLINE VecF exp2_fraction(VecF r) {
    if (sizeof(T) == 2) {
        VecF p = r * 0.013534167781472206f + 0.052011460065841675f;
        p = p * r + 0.2414427548646927f;
        p = p * r + 0.6930038332939148f;
        return p * r + 1.0000026226043701f;
    }
    VecF p = r * 0.0018775766948238015f + 0.00898933969438076f;
    p = p * r + 0.05582631751894951f;
    p = p * r + 0.24015361070632935f;
    p = p * r + 0.6931530833244324f;
    return p * r + 0.9999999403953552f;
}

#if CDM_AVX512

template <class T>
CDM_INLINE VecF sigmoid(VecF u) {
    // Beyond 2^126 the reciprocal would be zero times infinity; this order of the operands keeps a NaN.
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(126.0f), u * -1.44269504f);
    constexpr int fraction = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const VecF power = _mm512_scalef_ps(exp2_fraction<T>(_mm512_reduce_ps(t, fraction)), t);
    const VecF denominator = 1 + power, estimate = _mm512_rcp14_ps(denominator);
    if (sizeof(T) == 2) return estimate;
    return estimate * (2 - denominator * estimate);  // Newton's step
}

#else

template <class T>
CDM_INLINE VecF sigmoid(VecF u) {
    VecF t = u * -1.44269504f;
    t = t > 126.0f ? broadcast<VecF>(126.0f) : t;
    t = t < -126.0f ? broadcast<VecF>(-126.0f) : t;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const VecF shifted = (t - 0.5f) + magic, r = t - (shifted - magic);
    const VecI exponent = (bit_cast<VecI>(shifted) << 23) + 0x3f800000;
    return 1 / (1 + exp2_fraction<T>(r) * bit_cast<VecF>(exponent));
}

#endif

template <class T>
CDM_INLINE VecD sigmoid(VecD u) {
    return 1 / (1 + exp(-u));
}

// value * factor where the byte is not 0, value * 0 elsewhere.
CDM_INLINE VecF keep_where(const uint8_t* bytes, VecF value, float factor) {
#if CDM_AVX512
    const __m128i kept = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return value * _mm512_maskz_mov_ps(_mm_test_epi8_mask(kept, kept), _mm512_set1_ps(factor));
#else
    VecF factors = {};
    for (int lane = 0; lane < lanes_of<float>(); ++lane) factors[lane] = bytes[lane];
    return value * (factors * factor);
#endif
}

CDM_INLINE VecD keep_where(const uint8_t* bytes, VecD value, double factor) {
    VecD factors = {};
    for (int lane = 0; lane < lanes_of<double>(); ++lane) factors[lane] = bytes[lane];
    return value * (factors * factor);
}

// Sum of the first `lanes` lanes.
template <class T>
CDM_INLINE typename Math<T>::Scalar sum_lanes(typename Math<T>::Vec v, int lanes) {
#if CDM_AVX512
    const uint32_t mask = (1u << lanes) - 1;
    if constexpr (lanes_of<T>() == 16) {
        return _mm512_mask_reduce_add_ps(__mmask16(mask), v);
    } else {
        return _mm512_mask_reduce_add_pd(__mmask8(mask), v);
    }
#else
    typename Math<T>::Scalar part[lanes_of<T>()];
    __builtin_memcpy(part, &v, sizeof(v));
    for (int lane = lanes; lane < lanes_of<T>(); ++lane) part[lane] = 0;
    for (int width = lanes_of<T>() / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) part[lane] += part[lane + width];
    return part[0];
#endif
}

#if CDM_AVX512

// a[0] + a[1], a[2] + a[3], ..., b[0] + b[1], ...
CDM_INLINE VecF add_neighbours(VecF a, VecF b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_ps(a, even, b) + _mm512_permutex2var_ps(a, odd, b);
}

CDM_INLINE VecD add_neighbours(VecD a, VecD b) {
    const __m512i even = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_set_epi64(15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_pd(a, even, b) + _mm512_permutex2var_pd(a, odd, b);
}

#endif

// The first `lanes` lanes, 0 in the others.
template <class T>
CDM_INLINE typename Math<T>::Vec first_lanes(typename Math<T>::Vec v, int lanes) {
    typename Math<T>::Scalar part[lanes_of<T>()];
    store(part, v);
    for (int lane = lanes; lane < lanes_of<T>(); ++lane) part[lane] = 0;
    return load(part);
}

// The sum over the lanes of each of as many vectors as one has lanes, in their order.
template <class T>
CDM_INLINE typename Math<T>::Vec sum_lanes_of_each(const typename Math<T>::Vec* vectors) {
    constexpr int lanes = lanes_of<T>();
#if CDM_AVX512
    typename Math<T>::Vec sums[lanes];
    // Sums of neighbouring lanes, of two vectors in one, until one vector is left.
    __builtin_memcpy(sums, vectors, sizeof(sums));
    for (int left = lanes / 2; left > 0; left /= 2)
        for (int i = 0; i < left; ++i) sums[i] = add_neighbours(sums[2 * i], sums[2 * i + 1]);
    return sums[0];
#else
    typename Math<T>::Scalar total[lanes];
    for (int i = 0; i < lanes; ++i) total[i] = sum_lanes<T>(vectors[i], lanes);
    return load(total);
#endif
}

}  // namespace CDM_ISA

#undef CDM_AVX512
