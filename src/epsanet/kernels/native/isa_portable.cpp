// The loops with what the compiler makes of four-float vectors: SSE2 on any x86-64, NEON on ARM.
#ifndef EPSANET_ISA
#define EPSANET_ISA portable
#endif

namespace epsanet::EPSANET_ISA {
#ifdef EPSANET_MANY_REGISTERS  // the loops of AVX-512, for the fuzz driver, which may run where there is none
constexpr int max_pixels[] = {7, 7};
constexpr int max_taps = 8;
constexpr bool weights_fit_registers = true;
#else
constexpr int max_pixels[] = {4, 2};
constexpr int max_taps = 3;                 // sums of a weight gradient held in registers
constexpr bool weights_fit_registers = false;  // those of a whole kernel row
#endif

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

struct Vector {
    Quad part[4];
};
static inline Quad load_quad(const float *from) { return *reinterpret_cast<const Quad *>(from); }
static inline Vector zero() { return {}; }
static inline Vector load(const float *from) {
    return {{load_quad(from), load_quad(from + 4), load_quad(from + 8), load_quad(from + 12)}};
}
static inline void store(float *to, const Vector &v) {
    for (int q = 0; q < 4; ++q) *reinterpret_cast<Quad *>(to + 4 * q) = v.part[q];
}
static inline Vector add(const Vector &a, const Vector &b) {
    Vector sum;
    for (int q = 0; q < 4; ++q) sum.part[q] = a.part[q] + b.part[q];
    return sum;
}
static inline Vector multiply_add(const Vector &a, const Vector &b, const Vector &c) {
    Vector sum;
    for (int q = 0; q < 4; ++q) sum.part[q] = a.part[q] * b.part[q] + c.part[q];
    return sum;
}
static inline Vector subtract(const Vector &a, const Vector &b) {
    Vector difference;
    for (int q = 0; q < 4; ++q) difference.part[q] = a.part[q] - b.part[q];
    return difference;
}
static inline Vector positive(const Vector &v) {
    Vector result;
    for (int q = 0; q < 4; ++q)
        for (int lane = 0; lane < 4; ++lane) result.part[q][lane] = v.part[q][lane] < 0 ? 0 : v.part[q][lane];
    return result;
}
// ReLU's gradient: v, or zero where y is not above zero.
static inline Vector where_positive(const Vector &v, const Vector &y) {
    Vector result;
    for (int q = 0; q < 4; ++q)
        for (int lane = 0; lane < 4; ++lane) result.part[q][lane] = y.part[q][lane] <= 0 ? 0 : v.part[q][lane];
    return result;
}
static inline void stream(float *to, const Vector &v) { store(to, v); }
static inline void finish_streams() {}

template <int width> static inline Vector repeat(const float *from) {
    if constexpr (width == 1) {
        const Quad same = {*from, *from, *from, *from};
        return {{same, same, same, same}};
    }
    if constexpr (width == 2) {
        const Quad pair = {from[0], from[1], from[0], from[1]};
        return {{pair, pair, pair, pair}};
    }
    if constexpr (width == 4) {
        const Quad quad = load_quad(from);
        return {{quad, quad, quad, quad}};
    }
    if constexpr (width == 8) {
        const Quad low = load_quad(from), high = load_quad(from + 4);
        return {{low, high, low, high}};
    }
    if constexpr (width == 16) return load(from);
}
}  // namespace epsanet::EPSANET_ISA

#include "loops.hpp"
