// The loops with pairs of 256-bit vectors. Compiled for AVX2 and FMA, called only where the processor has them.
#include <immintrin.h>

#define EPSANET_ISA avx2

namespace epsanet::avx2 {
constexpr int max_pixels[] = {4, 2};
constexpr int max_taps = 3;                 // sums of a weight gradient held in registers
constexpr bool weights_fit_registers = false;  // those of a whole kernel row

struct Vector {
    __m256 low, high;
};
static inline Vector zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Vector load(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
static inline void store(float *to, Vector v) {
    _mm256_storeu_ps(to, v.low);
    _mm256_storeu_ps(to + 8, v.high);
}
static inline Vector add(Vector a, Vector b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
static inline Vector multiply_add(Vector a, Vector b, Vector sum) {
    return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
}
static inline Vector subtract(Vector a, Vector b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
// ReLU; the second operand is what a NaN passes through.
static inline Vector positive(Vector v) {
    const __m256 none = _mm256_setzero_ps();
    return {_mm256_max_ps(none, v.low), _mm256_max_ps(none, v.high)};
}
// ReLU's gradient: v, or zero where y is not above zero.
static inline Vector where_positive(Vector v, Vector y) {
    const __m256 none = _mm256_setzero_ps();
    return {_mm256_and_ps(v.low, _mm256_cmp_ps(y.low, none, _CMP_NLE_UQ)), _mm256_and_ps(v.high, _mm256_cmp_ps(y.high, none, _CMP_NLE_UQ))};
}
// Past the caches, to a multiple of 64 bytes; `finish_streams` before another thread looks there.
static inline void stream(float *to, Vector v) {
    _mm256_stream_ps(to, v.low);
    _mm256_stream_ps(to + 8, v.high);
}
static inline void finish_streams() { _mm_sfence(); }

template <int width> static inline Vector repeat(const float *from) {
    if constexpr (width == 16) return load(from);
    __m256 half;
    if constexpr (width == 1) half = _mm256_set1_ps(*from);
    if constexpr (width == 2) half = _mm256_castpd_ps(_mm256_broadcastsd_pd(_mm_castsi128_pd(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)))));
    if constexpr (width == 4) half = _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(from));
    if constexpr (width == 8) half = _mm256_loadu_ps(from);
    return {half, half};
}
}  // namespace epsanet::avx2

#include "loops.hpp"
