// What AVX-512 and AMX share.
#pragma once
#include "x86.h"

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
    DG_INLINE void rows(const uint32_t* table, int64_t pairs, const uint16_t* const* p, float* const* to, __mmask16 last) {
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
                __m512bh x = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(p[r] + 2 * v));
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
        const uint16_t* from[8];
        for (int64_t m = 0; m < count; m += m + 8 <= count ? 8 : 1) {
            for (int r = 0; r < 8 && m + r < count; r++) to[r] = soft + index[m + r] * D, from[r] = p + index[m + r] * width;
            if (m + 8 <= count) rows<8>(table, stretch / 2, from, to, last);
            else rows<1>(table, stretch / 2, from, to, last);
        }
    }
};
#endif

struct Avx512Words : X86 {
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
    DG_INLINE u32x16 gather(const uint32_t* table, u32x16 index) {
        return (u32x16)_mm512_i32gather_epi32((__m512i)index, table, 4);
    }
    DG_INLINE u32x16 lookup(u32x16 nibbles, const int8_t* values) {
        __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)values));
        return (u32x16)_mm512_shuffle_epi8(table, (__m512i)nibbles) ^ 0x80808080u;
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

#ifdef __AVX512BF16__
// Softmax attention with scale 1 over bfloat16 keys and values in blocks; see dgemma.h.
//
// 64 rows by 64 columns at a time: keys are turned into lanes, values into pairs of rows, as Bf16Mixer multiplies them;
// scores, their running maximum and sums are float32.
inline void attend(const Attention& t, float* out, int threads) {
    constexpr int64_t TILE = 64;
    const int64_t d = t.dim, pairs = d / 2, chunks = (t.rows + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
        Buffer<uint32_t> keys(TILE * pairs), values(TILE / 2 * d);
        Buffer<float> scores(TILE * TILE), sums(TILE * d);
        Buffer<uint16_t> weights(TILE * TILE), copy(16 * d);
        float best[TILE], mass[TILE];
#pragma omp for schedule(dynamic, 1)
        for (int64_t work = 0; work < t.heads * chunks; work++) {
            const int64_t head = work / chunks, r0 = work % chunks * TILE, rows = least(TILE, t.rows - r0);
            const uint16_t* q = t.query + (head * t.rows + r0) * d;
            memset(sums.data, 0, TILE * d * sizeof(float));
            for (int64_t r = 0; r < TILE; r++) best[r] = -INFINITY, mass[r] = 0;
            // What these rows' tokens see, at most and all of them.
            const int64_t *first = nullptr, *last = nullptr, *position = nullptr;
            int64_t all = 0, earliest = 0, latest = 0, common_first = 0, common_last = 0;
            if (t.positions) {
                const int64_t batch = head / t.heads_per_batch, tokens = t.rows / t.group;
                for (int64_t block = 0; block < t.blocks; block++) all += t.columns[block];
                first = t.first + batch * tokens, last = t.last + batch * tokens, position = t.positions + batch * all;
                const int64_t start = r0 / t.group, stop = (r0 + rows - 1) / t.group;
                earliest = common_first = first[start], latest = common_last = last[start];
                for (int64_t i = start; i <= stop; i++) {
                    earliest = least(earliest, first[i]), common_first = first[i] > common_first ? first[i] : common_first;
                    latest = last[i] > latest ? last[i] : latest, common_last = least(common_last, last[i]);
                }
            }
            int64_t before = 0;  // columns of the blocks before
            for (int64_t block = 0; block < t.blocks; before += t.columns[block++])
                for (int64_t s0 = 0; s0 < t.columns[block]; s0 += TILE) {
                    const int64_t columns = least(TILE, t.columns[block] - s0);
                    const int64_t* at = position ? position + before + s0 : nullptr;
                    bool masked = false;
                    if (at) {
                        int64_t low = at[0], high = at[0];
                        for (int64_t i = 1; i < columns; i++) low = least(low, at[i]), high = at[i] > high ? at[i] : high;
                        if (high < earliest || low > latest) continue;
                        masked = low < common_first || high > common_last;
                    }
                    const uint16_t* key = t.keys[block] + head * t.strides[block] + s0 * d;
                    const uint16_t* value = t.values[block] + head * t.strides[block] + s0 * d;
                    for (int64_t g = 0; g < TILE; g += 16) {
                        const uint16_t* from = key + g * d;
                        if (g + 16 > columns) {
                            memset(copy.data, 0, 16 * d * sizeof(uint16_t));
                            if (g < columns) memcpy(copy.data, from, (columns - g) * d * sizeof(uint16_t));
                            from = copy.data;
                        }
                        for (int64_t w = 0; w < pairs; w += 4) {
                            u32x16 lanes[4];
                            Avx512Words::transpose4((const uint8_t*)(from + 2 * w), d * 2, lanes);
                            for (int i = 0; i < 4; i++) store(keys.data + (g * pairs + (w + i) * 16), lanes[i]);
                        }
                    }
                    for (int64_t s = 0; s < TILE; s += 2)
                        for (int64_t i = 0; i < d; i += 16) {
                            __m512i low{}, high{};
                            if (s < columns) low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value + s * d + i)));
                            if (s + 1 < columns) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value + (s + 1) * d + i)));
                            _mm512_store_si512(values.data + i * (TILE / 2) + s / 2 * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                        }
                    memset(scores.data, 0, TILE * TILE * sizeof(float));
                    const int64_t eights = rows / 8 * 8;
                    float* to[8];
                    const uint16_t* of[8];
                    for (int64_t c = 0; c < TILE; c += 32)
                        for (int64_t r = 0; r < rows; r += r < eights ? 8 : 1) {
                            for (int i = 0; i < 8; i++) to[i] = scores.data + least(r + i, TILE - 1) * TILE + c, of[i] = q + (r + i) * d;
                            if (r < eights) Bf16Mixer::rows<8>(keys.data + c * pairs, pairs, of, to, 0xffff);
                            else Bf16Mixer::rows<1>(keys.data + c * pairs, pairs, of, to, 0xffff);
                        }
                    for (int64_t r = 0; r < rows; r++) {
                        f32x16 row[4], most = splat(-INFINITY), total{};
                        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                        for (int i = 0; i < 4; i++) {
                            row[i] = load<f32x16>(scores.data + r * TILE + 16 * i);
                            if (masked) {
                                const int64_t token = (r0 + r) / t.group;
                                for (int64_t c = 16 * i; c < least(16 * i + 16, columns); c++)
                                    if (at[c] < first[token] || at[c] > last[token]) row[i][c - 16 * i] = -INFINITY;
                            }
                            if (16 * (i + 1) > columns) row[i] = lane + 16 * i < (int32_t)columns ? row[i] : splat(-INFINITY);
                            most = max(most, row[i]);
                        }
                        const float top = _mm512_reduce_max_ps((__m512)most), now = top > best[r] ? top : best[r];
                        if (now == -INFINITY) {  // nothing seen yet
                            memset(weights.data + r * TILE, 0, TILE * sizeof(uint16_t));
                            continue;
                        }
                        const float decay = best[r] > now - 87.0f ? exp(splat(best[r] - now))[0] : 0.0f;
                        for (int i = 0; i < 4; i++) {
                            f32x16 x = row[i] - now, e = exp(x);
                            e = x > -87.0f ? e : f32x16{};
                            total += e;
                            _mm256_store_si256((__m256i*)(weights.data + r * TILE + 16 * i), (__m256i)_mm512_cvtneps_pbh((__m512)e));
                        }
                        mass[r] = mass[r] * decay + _mm512_reduce_add_ps((__m512)total);
                        best[r] = now;
                        if (decay != 1.0f)
                            for (int64_t i = 0; i < d; i += 16) store(sums.data + r * d + i, load<f32x16>(sums.data + r * d + i) * decay);
                    }
                    for (int64_t i = 0; i < d; i += 32)
                        for (int64_t r = 0; r < rows; r += r < eights ? 8 : 1) {
                            for (int j = 0; j < 8; j++) to[j] = sums.data + least(r + j, TILE - 1) * d + i, of[j] = weights.data + (r + j) * TILE;
                            if (r < eights) Bf16Mixer::rows<8>(values.data + i * (TILE / 2), TILE / 2, of, to, 0xffff);
                            else Bf16Mixer::rows<1>(values.data + i * (TILE / 2), TILE / 2, of, to, 0xffff);
                        }
                }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < d; i += 16)
                    store(out + (head * t.rows + r0 + r) * d + i, load<f32x16>(sums.data + r * d + i) * (mass[r] > 0 ? 1.0f / mass[r] : 0.0f));
        }
    }
}
#endif

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
