// AVX2, compiled twice: plain (bytes are multiplied into 16-bit pairs) and with VNNI's byte dot product.
#include "x86.h"

namespace {

struct Avx2Mixer : FloatMixer {
    // R rows by 16 columns.
    template <int R>
    DG_INLINE void rows(const float* table, int64_t stretch, const float* const* p, float* const* to) {
        __m256 sums[R][2];
        for (int r = 0; r < R; r++) sums[r][0] = _mm256_loadu_ps(to[r]), sums[r][1] = _mm256_loadu_ps(to[r] + 8);
        for (int64_t v = 0; v < stretch; v++) {
            const __m256 a = _mm256_load_ps(table + 16 * v), b = _mm256_load_ps(table + 16 * v + 8);
            for (int r = 0; r < R; r++) {
                const __m256 x = _mm256_broadcast_ss(p[r] + v);
                sums[r][0] = _mm256_fmadd_ps(x, a, sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(x, b, sums[r][1]);
            }
        }
        for (int r = 0; r < R; r++) _mm256_storeu_ps(to[r], sums[r][0]), _mm256_storeu_ps(to[r] + 8, sums[r][1]);
    }
    static void multiply(const char* room, int64_t i, int64_t stretch, const float* p, int64_t width, const int32_t* index, int64_t count, float* soft, int64_t D, int64_t columns) {
        const float* table = (const float*)room + i * stretch;
        for (int64_t h = 0; h < columns; h += 16, table += 16 * stretch) {
            float* to[6];
            const float* from[6];
            for (int64_t m = 0; m < count; m += m + 6 <= count ? 6 : 1) {
                for (int r = 0; r < 6 && m + r < count; r++) {
                    to[r] = soft + index[m + r] * D + h;
                    from[r] = p + index[m + r] * width;
                }
                if (m + 6 <= count) rows<6>(table, stretch, from, to);
                else rows<1>(table, stretch, from, to);
            }
        }
    }
};

struct Avx2 : X86 {
    using Mixer = Avx2Mixer;

    DG_INLINE void transpose4(const uint8_t* p, int64_t stride, u32x16* out) {
        for (int half = 0; half < 2; half++) {
            const uint8_t* h = p + 8 * half * stride;
            __m256i z[4];
            for (int i = 0; i < 4; i++) {
                const uint8_t* q = h + i * stride;
                z[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)q)), _mm_loadu_si128((const __m128i*)(q + 4 * stride)), 1);
            }
            __m256i a = _mm256_unpacklo_epi32(z[0], z[1]), b = _mm256_unpackhi_epi32(z[0], z[1]);
            __m256i c = _mm256_unpacklo_epi32(z[2], z[3]), d = _mm256_unpackhi_epi32(z[2], z[3]);
            store((char*)&out[0] + 32 * half, _mm256_unpacklo_epi64(a, c));
            store((char*)&out[1] + 32 * half, _mm256_unpackhi_epi64(a, c));
            store((char*)&out[2] + 32 * half, _mm256_unpacklo_epi64(b, d));
            store((char*)&out[3] + 32 * half, _mm256_unpackhi_epi64(b, d));
        }
    }
    DG_INLINE u32x16 gather(const uint32_t* table, u32x16 index) {
        u32x16 out;
        for (int half = 0; half < 2; half++)
            store((char*)&out + 32 * half, _mm256_i32gather_epi32((const int*)table, load<__m256i>((char*)&index + 32 * half), 4));
        return out;
    }
    DG_INLINE u32x16 lookup(u32x16 nibbles, const int8_t* values) {
        __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
        u32x16 out;
        for (int half = 0; half < 2; half++)
            store((char*)&out + 32 * half, _mm256_shuffle_epi8(table, load<__m256i>((char*)&nibbles + 32 * half)));
        return out ^ 0x80808080u;
    }
    DG_INLINE __m256i dot(__m256i sum, __m256i a, __m256i b) {
#ifdef __AVXVNNI__
        return _mm256_dpbusd_avx_epi32(sum, a, b);
#else  // as Q4's: eight 16-bit additions, then once to 32 bits
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
#endif
    }
    static double peak(int64_t rounds) {
        __m256i s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
        asm volatile("" : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9));
        for (int64_t i = 0; i < rounds; i++) {
            s0 = dot(s0, a, b), s1 = dot(s1, a, b), s2 = dot(s2, a, b), s3 = dot(s3, a, b), s4 = dot(s4, a, b);
            asm volatile("" : "+x"(a), "+x"(b));
            s5 = dot(s5, a, b), s6 = dot(s6, a, b), s7 = dot(s7, a, b), s8 = dot(s8, a, b), s9 = dot(s9, a, b);
            asm volatile("" : "+x"(a), "+x"(b));
        }
        __m256i total = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9;
        volatile int sink = _mm256_extract_epi32(total, 0);
        (void)sink;
        return rounds * 10 * 32.0;
    }
};

// One panel by R rows: 2R integer accumulators, two registers of weights and one broadcast activation.
template <class T, int R>
DG_INLINE void block256(const Panel& panel, int groups, const int8_t* const* a, const int32_t* const* sums, const float* scale, float* out) {
    const char* weights = (const char*)panel.q;
    const char *scales = (const char*)panel.scale, *offsets = (const char*)panel.offset;
    __m256 total[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = _mm256_setzero_ps();
    for (int g = 0; g < groups; g++) {
        __m256i dot[R][2];
        for (int r = 0; r < R; r++)
            dot[r][0] = dot[r][1] = T::OFFSET ? _mm256_setzero_si256() : _mm256_set1_epi32(sums[r][g]);
#ifdef __AVXVNNI__
#pragma GCC unroll 8
        for (int i = g * T::GROUP / 4; i < (g + 1) * T::GROUP / 4; i++) {
            __m256i w0 = load<__m256i>(weights + 64 * i), w1 = load<__m256i>(weights + 64 * i + 32);
            for (int r = 0; r < R; r++) {
                __m256i x = _mm256_set1_epi32(*(const int32_t*)(a[r] + 4 * i));
                dot[r][0] = _mm256_dpbusd_avx_epi32(dot[r][0], w0, x);
                dot[r][1] = _mm256_dpbusd_avx_epi32(dot[r][1], w1, x);
            }
        }
#else
        const __m256i ones = _mm256_set1_epi16(1);
        if constexpr (T::QMAX <= 127) {
            // So many pairs of products up to QMAX · 127 stay within 16 bits.
            constexpr int ADDS = T::QMAX > 31 ? 2 : T::QMAX > 15 ? 4 : T::GROUP / 4;
            static_assert(ADDS * 2 * T::QMAX * 127 <= 32767 && T::GROUP / 4 % ADDS == 0);
            for (int i = g * T::GROUP / 4; i < (g + 1) * T::GROUP / 4; i += ADDS) {
                __m256i part[R][2];
#pragma GCC unroll 8
                for (int j = i; j < i + ADDS; j++) {
                    __m256i w0 = load<__m256i>(weights + 64 * j), w1 = load<__m256i>(weights + 64 * j + 32);
                    for (int r = 0; r < R; r++) {
                        __m256i x = _mm256_set1_epi32(*(const int32_t*)(a[r] + 4 * j));
                        __m256i p0 = _mm256_maddubs_epi16(w0, x), p1 = _mm256_maddubs_epi16(w1, x);
                        part[r][0] = j == i ? p0 : _mm256_add_epi16(part[r][0], p0);
                        part[r][1] = j == i ? p1 : _mm256_add_epi16(part[r][1], p1);
                        // Or the compiler makes all products first and has nowhere to keep them.
                        asm volatile("" : "+x"(part[r][0]), "+x"(part[r][1]));
                    }
                }
                for (int r = 0; r < R; r++)
                    for (int h = 0; h < 2; h++) dot[r][h] = _mm256_add_epi32(dot[r][h], _mm256_madd_epi16(part[r][h], ones));
            }
        } else {
            // Bytes up to 255 would overflow in pairs: multiply the signed weight's magnitude with the activation that
            // carries its sign. q - 128 is the weight itself, so the sum starts from zero, not from -128 · Σa.
            static_assert(T::ZERO == 128);
            const __m256i flip = _mm256_set1_epi8((char)0x80);
            for (int r = 0; r < R; r++) dot[r][0] = dot[r][1] = _mm256_setzero_si256();
            for (int i = g * T::GROUP / 4; i < (g + 1) * T::GROUP / 4; i++)
                for (int h = 0; h < 2; h++) {
                    __m256i w = _mm256_xor_si256(load<__m256i>(weights + 64 * i + 32 * h), flip), size = _mm256_abs_epi8(w);
                    for (int r = 0; r < R; r++) {
                        __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(*(const int32_t*)(a[r] + 4 * i)), w);
                        dot[r][h] = _mm256_add_epi32(dot[r][h], _mm256_madd_epi16(_mm256_maddubs_epi16(size, x), ones));
                    }
                }
        }
#endif
        for (int h = 0; h < 2; h++) {
            __m256 s = load<__m256>(scales + 64 * g + 32 * h);
            for (int r = 0; r < R; r++) total[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r][h]), s, total[r][h]);
            if (T::OFFSET) {
                __m256 o = load<__m256>(offsets + 64 * g + 32 * h);
                for (int r = 0; r < R; r++)
                    total[r][h] = _mm256_fmadd_ps(_mm256_set1_ps(*(const float*)&sums[r][g]), o, total[r][h]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) {
            float* to = out + r * COLUMNS + 8 * h;
            _mm256_storeu_ps(to, _mm256_fmadd_ps(total[r][h], _mm256_set1_ps(scale[r]), _mm256_loadu_ps(to)));
        }
}

template <class T>
struct Products<Avx2, T> {
    static constexpr int ROWS = 4;
    static void block(int rows, const Panel* panels, int groups, const int8_t* const* a, const int32_t* const* sums, const float* scale, float* out) {
        for (int p = 0; p < 2; p++) {
            float* to = out + 16 * p;
            switch (rows) {
                case 1: block256<T, 1>(panels[p], groups, a, sums, scale, to); break;
                case 2: block256<T, 2>(panels[p], groups, a, sums, scale, to); break;
                case 3: block256<T, 3>(panels[p], groups, a, sums, scale, to); break;
                default: block256<T, 4>(panels[p], groups, a, sums, scale, to); break;
            }
        }
    }
};

}  // namespace

#ifdef __AVXVNNI__
const Table DG_AVXVNNI = Entries<Avx2>::table("avxvnni");
#else
const Table DG_AVX2 = Entries<Avx2>::table("avx2");
#endif
