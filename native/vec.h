// Sixteen lanes, written once with the compiler's vector extension: one AVX-512 register, two of AVX2, four of NEON.
#pragma once
#include <cstdint>
#include <cstring>

#define DG_INLINE static inline __attribute__((always_inline))

typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef float f32x16 __attribute__((vector_size(64)));

DG_INLINE u32x16 splat(uint32_t x) { return u32x16{} + x; }
DG_INLINE f32x16 splat(float x) { return f32x16{} + x; }

template <class V>
DG_INLINE V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
DG_INLINE void store(void* p, V v) {
    memcpy(p, &v, sizeof v);
}

DG_INLINE f32x16 to_float(u32x16 x) { return __builtin_convertvector((i32x16)x, f32x16); }

// float16 in the low half of every lane -> float32. Exact, subnormals too; infinities and NaN stay what they are.
DG_INLINE f32x16 half_to_float(u32x16 h) {
    const u32x16 size = h & 0x7fffu;
    const f32x16 magnitude = (f32x16)(size << 13) * 0x1p112f;
    const u32x16 special = (0u - ((size + 0x0400u) >> 15)) & 0x7f800000u;  // where all five bits of the exponent are set
    return (f32x16)((u32x16)magnitude | special | (h & 0x8000u) << 16);
}

DG_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
DG_INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }

// Round to nearest even by adding 1.5·2^23; |x| < 2^22.
DG_INLINE f32x16 round_even(f32x16 x) { return (x + 12582912.0f) - 12582912.0f; }

// e^x, relative error below 2e-7 for -87 <= x <= 88; clamped outside, NaN for NaN. Polynomial after range reduction by
// ln 2.
DG_INLINE f32x16 exp(f32x16 x) {
    x = max(splat(-87.0f), min(splat(88.0f), x));
    f32x16 n = round_even(x * 1.44269504088896341f);
    f32x16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    u32x16 power = (u32x16)(__builtin_convertvector(n, i32x16) + 127) << 23;
    return p * (f32x16)power;
}

// x · Φ(x) in its tanh form, which is x / (1 + e^(-2u)) with u = √(2/π)·(x + 0.044715·x³).
DG_INLINE f32x16 gelu(f32x16 x) {
    f32x16 u = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp(-u));
}
