// Vectors of CDM_VECTOR_BYTES for the current instruction set: loads, stores, exp and sigmoid.
//
// Included inside a kernel's body (see dispatch.h), so without include guard of its own. Written with the
// compiler's vector extensions, which GCC and Clang lower to any processor. Nothing from the standard
// library's templates may be used in a body: an instantiation made here could be linked elsewhere.

#define CDM_INLINE inline __attribute__((always_inline))

namespace CDM_ISA {

typedef float VecF __attribute__((vector_size(CDM_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(CDM_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(CDM_VECTOR_BYTES)));
typedef uint16_t HalfU __attribute__((vector_size(CDM_VECTOR_BYTES / 2)));
typedef double VecD __attribute__((vector_size(CDM_VECTOR_BYTES)));

// Storage type -> type and vector of the arithmetic.
template <class T> struct Math;
template <> struct Math<float> { using Scalar = float; using Vec = VecF; };
template <> struct Math<double> { using Scalar = double; using Vec = VecD; };
template <> struct Math<cdm::bf16> { using Scalar = float; using Vec = VecF; };

template <class T>
constexpr int lanes_of() { return CDM_VECTOR_BYTES / int(sizeof(typename Math<T>::Scalar)); }

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
  HalfU bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bit_cast<VecF>(__builtin_convertvector(bits, VecU) << 16);
}

CDM_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }
CDM_INLINE void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
CDM_INLINE void store(cdm::bf16* p, VecF v) {
  const VecU bits = bit_cast<VecU>(v);
  const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const VecU kept = v == v ? rounded : bits | 0x400000u;
  const HalfU half = __builtin_convertvector(kept >> 16, HalfU);
  __builtin_memcpy(p, &half, sizeof(half));
}

// The first `lanes` elements; the rest of the vector is 0 (load) or left alone in memory (store).
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

// Bytes as numbers, one per lane.
template <class Vec>
CDM_INLINE Vec load_bytes(const uint8_t* p);
template <>
CDM_INLINE VecF load_bytes<VecF>(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(CDM_VECTOR_BYTES / 4)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, VecI), VecF);
}
template <>
CDM_INLINE VecD load_bytes<VecD>(const uint8_t* p) {
  VecD v = {};
  for (int lane = 0; lane < lanes_of<double>(); ++lane) v[lane] = p[lane];
  return v;
}

template <class Vec, class Scalar>
CDM_INLINE Vec broadcast(Scalar value) { return Vec{} + value; }

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

template <class Vec>
CDM_INLINE Vec sigmoid(Vec u) { return 1 / (1 + exp(-u)); }

// Sum of the first `lanes` lanes.
template <class T>
CDM_INLINE typename Math<T>::Scalar sum_lanes(typename Math<T>::Vec v, int lanes) {
  typename Math<T>::Scalar part[lanes_of<T>()];
  __builtin_memcpy(part, &v, sizeof(v));
  for (int lane = lanes; lane < lanes_of<T>(); ++lane) part[lane] = 0;
  for (int width = lanes_of<T>() / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) part[lane] += part[lane + width];
  return part[0];
}

}  // namespace CDM_ISA
