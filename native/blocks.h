// ggml's block formats, unpacked sixteen rows at a time.
//
// A panel is 16 rows (output columns) by up to 256 weights of K: `q[i]` holds, for every row, the four bytes of weights
// 4i..4i+3, the order that dot-product instructions want; `scale[g]` and `offset[g]` hold each row's numbers of group g.
// A weight is scale · (q - ZERO) + offset, q unsigned. Rows lie row_bytes apart; their 32-bit words are brought into
// lanes by `Isa::transpose4` before any bit is unpacked, while they are still small. Layouts after ggml-common.h.
// The rarer types are in coded.h; types.h chooses among all of them.
#pragma once
#include "vec.h"

constexpr int SUPER = 256;  // weights of K in a panel, and the group over which activations share a scale

struct Panel {
    u32x16 q[SUPER / 4];
    f32x16 scale[SUPER / 16];
    f32x16 offset[SUPER / 16];
};

// 32-bit words j.. of 16 rows, four at a time: words[j][row].
template <class Isa, int N>
DG_INLINE void words(const uint8_t* p, int64_t stride, u32x16* out) {
    static_assert(N % 4 == 0);
    for (int j = 0; j < N; j += 4) Isa::transpose4(p + 4 * j, stride, out + j);
}

DG_INLINE u32x16 low(u32x16 x) { return x & 0x0f0f0f0fu; }
DG_INLINE u32x16 high(u32x16 x) { return x >> 4 & 0x0f0f0f0fu; }
// Two bytes further on: the upper half of `a` and the lower half of `b`.
DG_INLINE u32x16 straddle(u32x16 a, u32x16 b) { return a >> 16 | b << 16; }
// The lowest four bits, each to the fifth bit of a byte.
DG_INLINE u32x16 fifth_bits(u32x16 bits) { return (bits & 0xfu) * 0x02040810u & 0x10101010u; }
DG_INLINE u32x16 byte_of(u32x16 x, int i) { return x >> (8 * i) & 0xffu; }

constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Nibbles (one per byte) -> IQ4's values plus 128.
template <class Isa>
DG_INLINE u32x16 iq4_values(u32x16 nibbles) {
    return Isa::lookup(nibbles, IQ4_VALUES);
}

// The types of 32 weights are unpacked two blocks (64 weights) at a time: `pair` fills 16 words of q and two groups.
template <class Derived, int BYTES_>
struct SmallBlocks {
    static constexpr int BLOCK = 32, BYTES = BYTES_, GROUP = 32;
    template <class Isa>
    DG_INLINE void unpack(const uint8_t* p, int64_t stride, int weights, Panel& panel) {
        for (int i = 0; i < weights / 32; i += 2)
            Derived::template pair<Isa>(p + i * BYTES_, stride, panel.q + 8 * i, panel.scale + i, panel.offset + i);
    }
};

struct Q4_0 : SmallBlocks<Q4_0, 18> {
    static constexpr int ZERO = 8, QMAX = 15;
    static constexpr bool OFFSET = false;
    template <class Isa>
    DG_INLINE void quants(const uint8_t* p, int64_t stride, u32x16* t, f32x16* scale) {
        u32x16 a[12];
        Isa::transpose4(p, stride, a);           // bytes 0-15
        Isa::transpose4(p + 16, stride, a + 4);  // 16-31
        Isa::transpose4(p + 20, stride, t + 4);  // the second block's quants
        for (int i = 0; i < 4; i++) t[i] = straddle(a[i], a[i + 1]);
        scale[0] = half_to_float(a[0] & 0xffffu);
        scale[1] = half_to_float(a[4] >> 16);
    }
    template <class Isa>
    DG_INLINE void pair(const uint8_t* p, int64_t stride, u32x16* q, f32x16* scale, f32x16*) {
        u32x16 t[8];
        quants<Isa>(p, stride, t, scale);
        for (int b = 0; b < 2; b++)
            for (int i = 0; i < 4; i++) {
                q[8 * b + i] = low(t[4 * b + i]);
                q[8 * b + 4 + i] = high(t[4 * b + i]);
            }
    }
};

struct IQ4_NL : SmallBlocks<IQ4_NL, 18> {
    static constexpr int ZERO = 128, QMAX = 255;
    static constexpr bool OFFSET = false;
    template <class Isa>
    DG_INLINE void pair(const uint8_t* p, int64_t stride, u32x16* q, f32x16* scale, f32x16* offset) {
        Q4_0::pair<Isa>(p, stride, q, scale, offset);
        for (int i = 0; i < 16; i++) q[i] = iq4_values<Isa>(q[i]);
    }
};

struct Q4_1 : SmallBlocks<Q4_1, 20> {
    static constexpr int ZERO = 0, QMAX = 15;
    static constexpr bool OFFSET = true;
    template <class Isa>
    DG_INLINE void pair(const uint8_t* p, int64_t stride, u32x16* q, f32x16* scale, f32x16* offset) {
        for (int b = 0; b < 2; b++) {
            u32x16 head[4], t[4];
            Isa::transpose4(p + 20 * b, stride, head);
            Isa::transpose4(p + 20 * b + 4, stride, t);
            scale[b] = half_to_float(head[0] & 0xffffu);
            offset[b] = half_to_float(head[0] >> 16);
            for (int i = 0; i < 4; i++) q[8 * b + i] = low(t[i]), q[8 * b + 4 + i] = high(t[i]);
        }
    }
};

struct Q5_0 : SmallBlocks<Q5_0, 22> {
    static constexpr int ZERO = 16, QMAX = 31;
    static constexpr bool OFFSET = false;
    template <class Isa>
    DG_INLINE void pair(const uint8_t* p, int64_t stride, u32x16* q, f32x16* scale, f32x16*) {
        u32x16 a[8], t[8], fifth[2];
        Isa::transpose4(p, stride, a);           // bytes 0-15: scale, high bits, quants
        Isa::transpose4(p + 16, stride, a + 4);  // 16-31: …, the second block's scale (22) and high bits (24)
        Isa::transpose4(p + 28, stride, t + 4);  // the second block's quants
        for (int i = 0; i < 4; i++) t[i] = straddle(a[i + 1], a[i + 2]);
        fifth[0] = straddle(a[0], a[1]), fifth[1] = a[6];
        scale[0] = half_to_float(a[0] & 0xffffu);
        scale[1] = half_to_float(a[5] >> 16);
        fill(t, fifth, q);
    }
    DG_INLINE void fill(const u32x16* t, const u32x16* fifth, u32x16* q) {
        for (int b = 0; b < 2; b++)
            for (int i = 0; i < 4; i++) {
                q[8 * b + i] = low(t[4 * b + i]) | fifth_bits(fifth[b] >> (4 * i));
                q[8 * b + 4 + i] = high(t[4 * b + i]) | fifth_bits(fifth[b] >> (16 + 4 * i));
            }
    }
};

struct Q5_1 : SmallBlocks<Q5_1, 24> {
    static constexpr int ZERO = 0, QMAX = 31;
    static constexpr bool OFFSET = true;
    template <class Isa>
    DG_INLINE void pair(const uint8_t* p, int64_t stride, u32x16* q, f32x16* scale, f32x16* offset) {
        u32x16 head[4], t[8], fifth[2];
        for (int b = 0; b < 2; b++) {
            Isa::transpose4(p + 24 * b, stride, head);
            Isa::transpose4(p + 24 * b + 8, stride, t + 4 * b);
            scale[b] = half_to_float(head[0] & 0xffffu);
            offset[b] = half_to_float(head[0] >> 16);
            fifth[b] = head[1];
        }
        Q5_0::fill(t, fifth, q);
    }
};

struct Q8_0 : SmallBlocks<Q8_0, 34> {
    static constexpr int ZERO = 128, QMAX = 255;
    static constexpr bool OFFSET = false;
    template <class Isa>
    DG_INLINE void pair(const uint8_t* p, int64_t stride, u32x16* q, f32x16* scale, f32x16*) {
        u32x16 a[12];
        words<Isa, 12>(p, stride, a);  // bytes 0-47: scale, 32 quants, the second scale (34), …
        words<Isa, 8>(p + 36, stride, q + 8);
        for (int i = 0; i < 8; i++) q[i] = straddle(a[i], a[i + 1]);
        scale[0] = half_to_float(a[0] & 0xffffu);
        scale[1] = half_to_float(a[8] >> 16);
        for (int i = 0; i < 16; i++) q[i] ^= 0x80808080u;
    }
};

struct Q2_K {
    static constexpr int BLOCK = 256, BYTES = 84, GROUP = 16, ZERO = 0, QMAX = 3;
    static constexpr bool OFFSET = true;
    template <class Isa>
    DG_INLINE void unpack(const uint8_t* p, int64_t stride, int, Panel& panel) {
        u32x16 sc[4], t[16], head[4];
        words<Isa, 4>(p, stride, sc);
        words<Isa, 16>(p + 16, stride, t);
        Isa::transpose4(p + 68, stride, head);  // the block's last 16 bytes: d and dmin are the last word
        f32x16 d = half_to_float(head[3] & 0xffffu), least = half_to_float(head[3] >> 16);
        for (int g = 0; g < 16; g++) {
            u32x16 both = byte_of(sc[g / 4], g % 4);
            panel.scale[g] = d * to_float(both & 0xfu);
            panel.offset[g] = -(least * to_float(both >> 4));
        }
        for (int half = 0; half < 2; half++)
            for (int plane = 0; plane < 4; plane++)
                for (int i = 0; i < 8; i++)
                    panel.q[32 * half + 8 * plane + i] = t[8 * half + i] >> (2 * plane) & 0x03030303u;
    }
};

struct Q3_K {
    static constexpr int BLOCK = 256, BYTES = 110, GROUP = 16, ZERO = 4, QMAX = 7;
    static constexpr bool OFFSET = false;
    template <class Isa>
    DG_INLINE void unpack(const uint8_t* p, int64_t stride, int, Panel& panel) {
        u32x16 third[8], t[16], tail[4];
        words<Isa, 8>(p, stride, third);
        words<Isa, 16>(p + 32, stride, t);
        Isa::transpose4(p + 94, stride, tail);  // bytes 94-109: two of quants, 12 of scales, d
        u32x16 s0 = straddle(tail[0], tail[1]), s1 = straddle(tail[1], tail[2]), s2 = straddle(tail[2], tail[3]);
        f32x16 d = half_to_float(tail[3] >> 16);
        // Sixteen 6-bit scales: low four bits in s0 and s1, high two in s2.
        u32x16 six[4];
        six[0] = low(s0) | (s2 & 0x03030303u) << 4;
        six[1] = low(s1) | (s2 >> 2 & 0x03030303u) << 4;
        six[2] = high(s0) | (s2 >> 4 & 0x03030303u) << 4;
        six[3] = high(s1) | (s2 >> 6 & 0x03030303u) << 4;
        for (int g = 0; g < 16; g++) panel.scale[g] = d * (to_float(byte_of(six[g / 4], g % 4)) - 32.0f);
        for (int half = 0; half < 2; half++)
            for (int plane = 0; plane < 4; plane++)
                for (int i = 0; i < 8; i++)
                    panel.q[32 * half + 8 * plane + i] =
                        (t[8 * half + i] >> (2 * plane) & 0x03030303u) |
                        (third[i] >> (4 * half + plane) & 0x01010101u) << 2;
    }
};

// Q4_K's and Q5_K's first 16 bytes: d, dmin and eight 6-bit scales and minima.
template <class Isa>
DG_INLINE void k_scales(const uint8_t* p, int64_t stride, Panel& panel) {
    u32x16 t[4];
    Isa::transpose4(p, stride, t);
    f32x16 d = half_to_float(t[0] & 0xffffu), least = half_to_float(t[0] >> 16);
    u32x16 scales[2] = {t[1] & 0x3f3f3f3fu, low(t[3]) | (t[1] >> 6 & 0x03030303u) << 4};
    u32x16 minima[2] = {t[2] & 0x3f3f3f3fu, high(t[3]) | (t[2] >> 6 & 0x03030303u) << 4};
    for (int g = 0; g < 8; g++) {
        panel.scale[g] = d * to_float(byte_of(scales[g / 4], g % 4));
        panel.offset[g] = -(least * to_float(byte_of(minima[g / 4], g % 4)));
    }
}

struct Q4_K {
    static constexpr int BLOCK = 256, BYTES = 144, GROUP = 32, ZERO = 0, QMAX = 15;
    static constexpr bool OFFSET = true;
    template <class Isa>
    DG_INLINE void unpack(const uint8_t* p, int64_t stride, int, Panel& panel) {
        k_scales<Isa>(p, stride, panel);
        for (int c = 0; c < 4; c++)
            for (int j = 0; j < 8; j += 4) {
                u32x16 t[4];
                Isa::transpose4(p + 16 + 32 * c + 4 * j, stride, t);
                for (int i = 0; i < 4; i++) {
                    panel.q[16 * c + j + i] = low(t[i]);
                    panel.q[16 * c + 8 + j + i] = high(t[i]);
                }
            }
    }
};

struct Q5_K {
    static constexpr int BLOCK = 256, BYTES = 176, GROUP = 32, ZERO = 0, QMAX = 31;
    static constexpr bool OFFSET = true;
    template <class Isa>
    DG_INLINE void unpack(const uint8_t* p, int64_t stride, int, Panel& panel) {
        k_scales<Isa>(p, stride, panel);
        u32x16 fifth[8];
        words<Isa, 8>(p + 16, stride, fifth);
        for (int c = 0; c < 4; c++)
            for (int j = 0; j < 8; j += 4) {
                u32x16 t[4];
                Isa::transpose4(p + 48 + 32 * c + 4 * j, stride, t);
                for (int i = 0; i < 4; i++) {
                    panel.q[16 * c + j + i] = low(t[i]) | (fifth[j + i] >> (2 * c) & 0x01010101u) << 4;
                    panel.q[16 * c + 8 + j + i] = high(t[i]) | (fifth[j + i] >> (2 * c + 1) & 0x01010101u) << 4;
                }
            }
    }
};

struct Q6_K {
    static constexpr int BLOCK = 256, BYTES = 210, GROUP = 16, ZERO = 32, QMAX = 63;
    static constexpr bool OFFSET = false;
    template <class Isa>
    DG_INLINE void unpack(const uint8_t* p, int64_t stride, int, Panel& panel) {
        u32x16 sc[4], tail[4];
        words<Isa, 4>(p + 192, stride, sc);
        Isa::transpose4(p + 194, stride, tail);
        f32x16 d = half_to_float(tail[3] >> 16);
        for (int g = 0; g < 16; g++) {
            i32x16 byte = (i32x16)(sc[g / 4] << (24 - 8 * (g % 4))) >> 24;  // signed
            panel.scale[g] = d * __builtin_convertvector(byte, f32x16);
        }
        for (int half = 0; half < 2; half++)
            for (int j = 0; j < 8; j += 4) {
                u32x16 a[4], b[4], h[4];
                Isa::transpose4(p + 64 * half + 4 * j, stride, a);
                Isa::transpose4(p + 64 * half + 32 + 4 * j, stride, b);
                Isa::transpose4(p + 128 + 32 * half + 4 * j, stride, h);
                u32x16* q = panel.q + 32 * half + j;
                for (int i = 0; i < 4; i++) {
                    q[i] = low(a[i]) | (h[i] & 0x03030303u) << 4;
                    q[8 + i] = low(b[i]) | (h[i] & 0x0c0c0c0cu) << 2;
                    q[16 + i] = high(a[i]) | (h[i] & 0x30303030u);
                    q[24 + i] = high(b[i]) | (h[i] & 0xc0c0c0c0u) >> 2;
                }
            }
    }
};

struct IQ4_XS {
    static constexpr int BLOCK = 256, BYTES = 136, GROUP = 32, ZERO = 128, QMAX = 255;
    static constexpr bool OFFSET = false;
    template <class Isa>
    DG_INLINE void unpack(const uint8_t* p, int64_t stride, int, Panel& panel) {
        u32x16 head[4];
        Isa::transpose4(p, stride, head);  // d and the scales' high bits, their low bits
        f32x16 d = half_to_float(head[0] & 0xffffu);
        for (int g = 0; g < 8; g++) {
            u32x16 six = (head[1] >> (4 * g) & 0xfu) | (head[0] >> (16 + 2 * g) & 0x3u) << 4;
            panel.scale[g] = d * (to_float(six) - 32.0f);
        }
        for (int g = 0; g < 8; g++) {
            u32x16 t[4];
            Isa::transpose4(p + 8 + 16 * g, stride, t);
            for (int i = 0; i < 4; i++) {
                panel.q[8 * g + i] = iq4_values<Isa>(low(t[i]));
                panel.q[8 * g + 4 + i] = iq4_values<Isa>(high(t[i]));
            }
        }
    }
};
