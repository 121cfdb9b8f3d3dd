// The loops with 512-bit vectors. Compiled for AVX-512 F, DQ, VL and BW, called only where the processor has them.
#include <immintrin.h>

#include "problem.hpp"

#define EPSANET_ISA avx512

namespace epsanet::avx512 {
constexpr int max_pixels[] = {14, 14};  // output pixels held in registers, for one and two result vectors a pixel
constexpr int max_taps = 8;                 // sums of a weight gradient held in registers
constexpr bool weights_fit_registers = true;  // those of a whole kernel row

struct Vector {
    __m512 value;
};
static inline Vector zero() { return {_mm512_setzero_ps()}; }
static inline Vector load(const float *from) { return {_mm512_loadu_ps(from)}; }
static inline void store(float *to, Vector v) { _mm512_storeu_ps(to, v.value); }
static inline Vector add(Vector a, Vector b) { return {_mm512_add_ps(a.value, b.value)}; }
static inline Vector multiply_add(Vector a, Vector b, Vector sum) { return {_mm512_fmadd_ps(a.value, b.value, sum.value)}; }
static inline Vector subtract(Vector a, Vector b) { return {_mm512_sub_ps(a.value, b.value)}; }
// ReLU; the second operand is what a NaN passes through.
static inline Vector positive(Vector v) { return {_mm512_max_ps(_mm512_setzero_ps(), v.value)}; }
// ReLU's gradient: v, or zero where y is not above zero.
static inline Vector where_positive(Vector v, Vector y) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.value, _mm512_setzero_ps(), _CMP_NLE_UQ), v.value)};
}
// Past the caches, to a multiple of 64 bytes; `finish_streams` before another thread looks there.
static inline void stream(float *to, Vector v) { _mm512_stream_ps(to, v.value); }
static inline void finish_streams() { _mm_sfence(); }

// Sixteen of `count` neighbouring floats, a multiple of sixteen: those at `places`, counted from `first`.
#define EPSANET_PICK
constexpr int most_picked = 128;  // of more, sixteen single copies take no more steps
static inline Vector pick(const float *from, int count, const std::int32_t *places, int first) {
    const __m512i place = _mm512_sub_epi32(_mm512_loadu_si512(places), _mm512_set1_epi32(first)), pair = _mm512_srli_epi32(place, 5);
    __m512 picked = _mm512_setzero_ps();
    for (int begin = 0; begin < count; begin += 2 * lanes) {
        const __m512 low = _mm512_loadu_ps(from + begin), high = begin + lanes < count ? _mm512_loadu_ps(from + begin + lanes) : low;
        const __m512 both = _mm512_permutex2var_ps(low, place, high);  // which looks at the five lowest bits of a place
        picked = _mm512_mask_mov_ps(picked, _mm512_cmpeq_epi32_mask(pair, _mm512_set1_epi32(begin / (2 * lanes))), both);
    }
    return {picked};
}

// The same `width` floats repeated over all lanes; a broadcast from memory costs no shuffle.
template <int width> static inline Vector repeat(const float *from) {
    if constexpr (width == 1) return {_mm512_set1_ps(*from)};
    if constexpr (width == 2) return {_mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_castps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from))))))};
    if constexpr (width == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(from))};
    if constexpr (width == 8) return {_mm512_broadcast_f32x8(_mm256_loadu_ps(from))};
    if constexpr (width == 16) return load(from);
}
}  // namespace epsanet::avx512

#include "loops.hpp"
