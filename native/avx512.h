// What AVX-512 and AMX share.
#pragma once
#include <immintrin.h>

#include "gemm.h"

namespace {

#ifdef __AVX512BF16__
// bfloat16 in pairs of rows: word [pair][16 columns], 32 multiply-adds an instruction.
struct Bf16Mixer {
    using Item = uint16_t;
    static constexpr int64_t BYTES = 2;
    static void convert(const float* from, int64_t n, int64_t width, uint16_t* to) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            to[i] = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
        }
        memset(to + n, 0, (width - n) * sizeof(uint16_t));
    }
    // Every 16 columns are a [stretch / 2][16] stretch of pairs.
    template <class Isa, class F>
    DG_INLINE void pack(F&& number, int i, int v, int64_t stretch, char* room) {
        alignas(64) uint8_t lanes[16 * 32];
        for (int j = 0; j < 16; j++)
            _mm256_store_si256((__m256i*)(lanes + 32 * j), (__m256i)_mm512_cvtneps_pbh((__m512)number(i + j)));
        uint32_t* to = (uint32_t*)room + (i * stretch + v * 16) / 2;
        for (int w = 0; w < 8; w += 4) {
            u32x16 out[4];
            Isa::transpose4(lanes + 4 * w, 32, out);
            for (int j = 0; j < 4; j++) store(to + (w + j) * 16, out[j]);
        }
    }
    template <int R>
    DG_INLINE void rows(const uint32_t* table, int64_t pairs, const uint16_t* p, int64_t width, float* const* to, __mmask16 last) {
        __m512 sums[R][2];
        for (int r = 0; r < R; r++) {
            sums[r][0] = _mm512_loadu_ps(to[r]);
            sums[r][1] = _mm512_maskz_loadu_ps(last, to[r] + 16);
        }
        const uint32_t* second = table + pairs * 16;
        for (int64_t v = 0; v < pairs; v++) {
            __m512bh a = (__m512bh)_mm512_load_si512(table + 16 * v), b = (__m512bh)_mm512_load_si512(second + 16 * v);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                __m512bh x = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(p + r * width + 2 * v));
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, a);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, b);
            }
        }
        for (int r = 0; r < R; r++) {
            _mm512_storeu_ps(to[r], sums[r][0]);
            _mm512_mask_storeu_ps(to[r] + 16, last, sums[r][1]);
        }
    }
    static void multiply(const char* room, int64_t i, int64_t stretch, const uint16_t* p, int64_t width, const int32_t* index, int64_t count, float* soft, int64_t D, int64_t columns) {
        const uint32_t* table = (const uint32_t*)room + i * stretch / 2;
        const __mmask16 last = columns > 16 ? 0xffff : 0;  // rows are multiples of 32 weights, so of 16
        float* to[8];
        int64_t m = 0;
        for (; m + 8 <= count; m += 8) {
            for (int r = 0; r < 8; r++) to[r] = soft + index[m + r] * D;
            rows<8>(table, stretch / 2, p + m * width, width, to, last);
        }
        for (; m < count; m++) {
            to[0] = soft + index[m] * D;
            rows<1>(table, stretch / 2, p + m * width, width, to, last);
        }
    }
};
#endif

struct Avx512Words {
#ifdef __AVX512BF16__
    using Mixer = Bf16Mixer;
#else
    using Mixer = FloatMixer;
#endif
    // Four words of rows 4l..4l+3 go to lane l; then a 4 x 4 transposition inside every lane.
    DG_INLINE void transpose4(const uint8_t* p, int64_t stride, u32x16* out) {
        __m512i z[4];
        for (int i = 0; i < 4; i++) {
            const uint8_t* q = p + i * stride;
            auto two = [&](int row) {
                return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(q + row * stride))),
                                               _mm_loadu_si128((const __m128i*)(q + (row + 4) * stride)), 1);
            };
            z[i] = _mm512_inserti64x4(_mm512_castsi256_si512(two(0)), two(8), 1);
        }
        __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
        __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
        out[0] = (u32x16)_mm512_unpacklo_epi64(a, c);
        out[1] = (u32x16)_mm512_unpackhi_epi64(a, c);
        out[2] = (u32x16)_mm512_unpacklo_epi64(b, d);
        out[3] = (u32x16)_mm512_unpackhi_epi64(b, d);
    }
    DG_INLINE u32x16 lookup(u32x16 nibbles) {
        __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)IQ4_VALUES));
        return (u32x16)_mm512_shuffle_epi8(table, (__m512i)nibbles) ^ 0x80808080u;
    }
    DG_INLINE int32_t sum_bytes(const int8_t* p, int count) {
        __m128i total = _mm_setzero_si128();
        for (int i = 0; i < count; i += 16)  // unsigned sums of x + 128
            total = _mm_add_epi64(total, _mm_sad_epu8(_mm_xor_si128(_mm_loadu_si128((const __m128i*)(p + i)), _mm_set1_epi8((char)0x80)), _mm_setzero_si128()));
        return _mm_cvtsi128_si32(total) + _mm_extract_epi32(total, 2) - 128 * count;
    }
    static double peak(int64_t rounds) {
        __m512i s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
        asm volatile("" : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9));
        for (int64_t i = 0; i < rounds; i++) {
            s0 = _mm512_dpbusd_epi32(s0, a, b), s1 = _mm512_dpbusd_epi32(s1, a, b), s2 = _mm512_dpbusd_epi32(s2, a, b);
            s3 = _mm512_dpbusd_epi32(s3, a, b), s4 = _mm512_dpbusd_epi32(s4, a, b), s5 = _mm512_dpbusd_epi32(s5, a, b);
            s6 = _mm512_dpbusd_epi32(s6, a, b), s7 = _mm512_dpbusd_epi32(s7, a, b), s8 = _mm512_dpbusd_epi32(s8, a, b);
            s9 = _mm512_dpbusd_epi32(s9, a, b);
            asm volatile("" : "+v"(a), "+v"(b));
        }
        __m512i total = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9;
        volatile int sink = _mm512_reduce_add_epi32(total);
        (void)sink;
        return rounds * 10 * 64.0;
    }
};

// Two panels by R rows: 2R integer and 2R float accumulators, two registers of weights and one broadcast activation.
template <class T, int R>
DG_INLINE void vnni512(const Panel* panels, int groups, const int8_t* const* a, const int32_t* const* sums, const float* scale, float* out) {
    __m512 total[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
        __m512i dot[R][2];
        for (int r = 0; r < R; r++)
            dot[r][0] = dot[r][1] = T::OFFSET ? _mm512_setzero_si512() : _mm512_set1_epi32(sums[r][g]);
        const u32x16 *q0 = panels[0].q + g * (T::GROUP / 4), *q1 = panels[1].q + g * (T::GROUP / 4);
#pragma GCC unroll 8
        for (int i = 0; i < T::GROUP / 4; i++) {
            __m512i w0 = (__m512i)q0[i], w1 = (__m512i)q1[i];
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                __m512i x = _mm512_set1_epi32(*(const int32_t*)(a[r] + g * T::GROUP + 4 * i));
                dot[r][0] = _mm512_dpbusd_epi32(dot[r][0], w0, x);
                dot[r][1] = _mm512_dpbusd_epi32(dot[r][1], w1, x);
            }
        }
        for (int p = 0; p < 2; p++) {
            __m512 s = (__m512)panels[p].scale[g];
            for (int r = 0; r < R; r++) total[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][p]), s, total[r][p]);
            if (T::OFFSET) {
                __m512 o = (__m512)panels[p].offset[g];
                for (int r = 0; r < R; r++)
                    total[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(*(const float*)&sums[r][g]), o, total[r][p]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < 2; p++) {
            float* to = out + r * COLUMNS + 16 * p;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(total[r][p], _mm512_set1_ps(scale[r]), _mm512_loadu_ps(to)));
        }
}

}  // namespace
