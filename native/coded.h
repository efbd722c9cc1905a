// The rarer types, whose weights are numbers in a table: IQ1, IQ2 and IQ3 (a codebook, given by `dg_grid`), TQ1 and TQ2
// (three values), MXFP4 and NVFP4 (4-bit floats). Unpacked to int8 with a scale for every 16 weights, whatever the type,
// so that one compiled product serves them all.
#pragma once
#include "blocks.h"
#include "tables.h"

constexpr int8_t FP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled

// The lowest four bits -> 1 in the byte of each that is set.
DG_INLINE u32x16 ones(u32x16 bits) { return (bits & 0xfu) * 0x00204081u & 0x01010101u; }
// Four numbers above 0, those negated whose sign bit is set; plus 128.
DG_INLINE u32x16 with_signs(u32x16 numbers, u32x16 bits) {
    const u32x16 one = ones(bits);
    return ((numbers ^ one * 255u) + one) ^ 0x80808080u;
}
// Seven signs -> eight: the last makes their number even.
DG_INLINE u32x16 eight_signs(u32x16 seven) {
    u32x16 odd = seven ^ seven >> 4;
    odd ^= odd >> 2;
    return seven | ((odd ^ odd >> 1) & 1u) << 7;
}
DG_INLINE u32x16 nibble_of(const u32x16* x, int i) { return x[i / 8] >> (4 * (i % 8)) & 0xfu; }
DG_INLINE u32x16 byte_at(const u32x16* x, int i) { return byte_of(x[i / 4], i % 4); }

struct Coded {
    static constexpr int GROUP = 16, ZERO = 128, QMAX = 255, STRIDE = 144;  // STRIDE: the most bytes of 256 weights
    static constexpr bool OFFSET = false;
    int code, BLOCK, BYTES;
    const uint32_t* grid;  // two words for eight numbers, one for four; IQ1: eight times the numbers, plus 128

    template <class Isa>
    __attribute__((noinline)) void unpack(const uint8_t* p, int64_t stride, int weights, Panel& panel) const {
        switch (code) {
            case 16: return iq2_xxs<Isa>(p, stride, panel);
            case 17: return iq2_xs<Isa>(p, stride, panel);
            case 18: return iq3_xxs<Isa>(p, stride, panel);
            case 19: return iq1_s<Isa>(p, stride, panel);
            case 21: return iq3_s<Isa>(p, stride, panel);
            case 22: return iq2_s<Isa>(p, stride, panel);
            case 29: return iq1_m<Isa>(p, stride, panel);
            case 34: return tq1_0<Isa>(p, stride, panel);
            case 35: return tq2_0<Isa>(p, stride, panel);
            case 39: return mxfp4<Isa>(p, stride, weights, panel);
            case 40: return nvfp4<Isa>(p, stride, weights, panel);
        }
    }

private:
    // The half in the first two bytes of every row.
    template <class Isa>
    DG_INLINE f32x16 first_half(const uint8_t* p, int64_t stride) {
        u32x16 head[4];
        Isa::transpose4(p, stride, head);
        return half_to_float(head[0] & 0xffffu);
    }
    // Eight numbers of the grid with their signs, to two words of q.
    template <class Isa>
    inline void eight(u32x16 index, u32x16 signs, u32x16* q) const {
        q[0] = with_signs(Isa::gather(grid, index * 2u), signs);
        q[1] = with_signs(Isa::gather(grid, index * 2u + 1u), signs >> 4);
    }
    // Eight numbers of IQ1's grid, shifted down or up.
    template <class Isa>
    inline void shifted(u32x16 index, u32x16 down, u32x16* q) const {
        for (uint32_t i = 0; i < 2; i++)
            q[i] = Isa::gather(grid, index * 2u + i) + 0x01010101u - down * 0x02020202u;
    }

    template <class Isa>
    void iq2_xxs(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 w[16];
        words<Isa, 16>(p + 2, stride, w);
        const f32x16 d = first_half<Isa>(p, stride);
        for (int g = 0; g < 8; g++) {
            const u32x16 rest = w[2 * g + 1];  // four times seven signs, the scale
            panel.scale[2 * g] = panel.scale[2 * g + 1] = d * (to_float(rest >> 28) + 0.5f) * 0.25f;
            for (int j = 0; j < 4; j++)
                eight<Isa>(byte_of(w[2 * g], j), eight_signs(rest >> (7 * j) & 127u), panel.q + 8 * g + 2 * j);
        }
    }
    template <class Isa>
    void iq2_xs(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 w[16], tail[4];
        words<Isa, 16>(p + 2, stride, w);
        Isa::transpose4(p + 58, stride, tail);  // the scales are the last two words
        const f32x16 d = first_half<Isa>(p, stride);
        for (int g = 0; g < 16; g++) panel.scale[g] = d * (to_float(nibble_of(tail + 2, g)) + 0.5f) * 0.25f;
        for (int j = 0; j < 32; j++) {
            const u32x16 both = w[j / 2] >> (16 * (j % 2)) & 0xffffu;
            eight<Isa>(both & 511u, eight_signs(both >> 9), panel.q + 2 * j);
        }
    }
    template <class Isa>
    void iq2_s(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 low[8], signs[8], tail[4];
        words<Isa, 8>(p + 2, stride, low);
        words<Isa, 8>(p + 34, stride, signs);
        Isa::transpose4(p + 66, stride, tail);  // two words of high bits, two of scales
        const f32x16 d = first_half<Isa>(p, stride);
        for (int g = 0; g < 16; g++) panel.scale[g] = d * (to_float(nibble_of(tail + 2, g)) + 0.5f) * 0.25f;
        for (int j = 0; j < 32; j++) {
            const u32x16 high = tail[j / 16] >> (2 * (j % 16)) & 3u;
            eight<Isa>(byte_at(low, j) | high << 8, byte_at(signs, j), panel.q + 2 * j);
        }
    }
    template <class Isa>
    void iq3_xxs(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 index[16], rest[8];
        words<Isa, 16>(p + 2, stride, index);
        words<Isa, 8>(p + 66, stride, rest);  // four times seven signs, the scale
        const f32x16 d = first_half<Isa>(p, stride);
        for (int g = 0; g < 8; g++)
            panel.scale[2 * g] = panel.scale[2 * g + 1] = d * (to_float(rest[g] >> 28) + 0.5f) * 0.5f;
        for (int j = 0; j < 32; j++) {
            const u32x16 signs = eight_signs(rest[j / 4] >> (7 * (j % 4)) & 127u);
            for (int h = 0; h < 2; h++)
                panel.q[2 * j + h] = with_signs(Isa::gather(grid, byte_at(index, 2 * j + h)), signs >> (4 * h));
        }
    }
    template <class Isa>
    void iq3_s(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 index[16], high[4], signs[8], tail[4];
        words<Isa, 16>(p + 2, stride, index);
        Isa::transpose4(p + 66, stride, high);  // the indices' ninth bits are the first two words
        words<Isa, 8>(p + 74, stride, signs);
        Isa::transpose4(p + 94, stride, tail);  // the scales are the last word
        const f32x16 d = first_half<Isa>(p, stride);
        for (int g = 0; g < 8; g++)
            panel.scale[2 * g] = panel.scale[2 * g + 1] = d * (to_float(nibble_of(tail + 3, g)) * 2.0f + 1.0f);
        for (int k = 0; k < 64; k++) {
            const u32x16 ninth = high[k / 32] >> (k % 32) & 1u;
            panel.q[k] = with_signs(Isa::gather(grid, byte_at(index, k) | ninth << 8), byte_at(signs, k / 2) >> (4 * (k % 2)));
        }
    }
    template <class Isa>
    void iq1_s(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 low[8], rest[4];
        words<Isa, 8>(p + 2, stride, low);
        Isa::transpose4(p + 34, stride, rest);
        const f32x16 d = first_half<Isa>(p, stride);
        for (int g = 0; g < 8; g++) {
            const u32x16 own = rest[g / 2] >> (16 * (g % 2)) & 0xffffu;  // four times three bits, scale, shift
            panel.scale[2 * g] = panel.scale[2 * g + 1] = d * (to_float(own >> 12 & 7u) * 2.0f + 1.0f) * 0.125f;
            for (int j = 0; j < 4; j++)
                shifted<Isa>(byte_of(low[g], j) | (own >> (3 * j) & 7u) << 8, own >> 15, panel.q + 8 * g + 2 * j);
        }
    }
    template <class Isa>
    void iq1_m(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 low[8], high[4], tail[4], whole{};
        words<Isa, 8>(p, stride, low);
        Isa::transpose4(p + 32, stride, high);
        Isa::transpose4(p + 40, stride, tail);  // the last two words: four bits of d and four scales, four times
        for (int i = 0; i < 4; i++) whole |= (tail[2 + i / 2] >> (16 * (i % 2) + 12) & 0xfu) << (4 * i);
        const f32x16 d = half_to_float(whole);
        for (int g = 0; g < 16; g++) {
            const u32x16 own = tail[2 + g / 8] >> (16 * (g / 4 % 2) + 3 * (g % 4)) & 7u;
            panel.scale[g] = d * (to_float(own) * 2.0f + 1.0f) * 0.125f;
        }
        for (int j = 0; j < 32; j++) {
            const u32x16 own = nibble_of(high, j);
            shifted<Isa>(byte_at(low, j) | (own & 7u) << 8, own >> 3, panel.q + 2 * j);
        }
    }
    template <class Isa>
    void tq1_0(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 w[16], tail[4], d[4];
        words<Isa, 12>(p, stride, w);
        Isa::transpose4(p + 36, stride, tail);
        Isa::transpose4(p + 38, stride, d);
        w[12] = tail[3];
        for (int g = 0; g < 16; g++) panel.scale[g] = half_to_float(d[3] >> 16);
        // Bytes are fractions of 256 with places in base 3. Their first places are the first weights of 8, 4, 1 words.
        const int first[3] = {0, 8, 12}, count[3] = {8, 4, 1}, places[3] = {5, 5, 4};
        u32x16* to = panel.q;
        for (int part = 0; part < 3; part++) {
            uint32_t power = 1;
            for (int place = 0; place < places[part]; place++, power *= 3)
                for (int i = 0; i < count[part]; i++) {
                    u32x16 number{};
                    for (int odd = 0; odd < 2; odd++) {
                        const u32x16 bytes = (w[first[part] + i] >> (8 * odd) & 0x00ff00ffu) * power & 0x00ff00ffu;
                        number |= (bytes * 3u >> 8 & 0x00030003u) << (8 * odd);
                    }
                    *to++ = number + 0x7f7f7f7fu;
                }
        }
    }
    template <class Isa>
    void tq2_0(const uint8_t* p, int64_t stride, Panel& panel) const {
        u32x16 w[16], tail[4];
        words<Isa, 16>(p, stride, w);
        Isa::transpose4(p + 50, stride, tail);
        for (int g = 0; g < 16; g++) panel.scale[g] = half_to_float(tail[3] >> 16);
        for (int half = 0; half < 2; half++)
            for (int plane = 0; plane < 4; plane++)
                for (int i = 0; i < 8; i++)
                    panel.q[32 * half + 8 * plane + i] = (w[8 * half + i] >> (2 * plane) & 0x03030303u) + 0x7f7f7f7fu;
    }
    template <class Isa>
    void mxfp4(const uint8_t* p, int64_t stride, int weights, Panel& panel) const {
        for (int b = 0; b < weights / 32; b += 2, p += 2 * BYTES) {  // two blocks: nothing is read beyond them
            u32x16 w[8], first[4], second[4];
            Isa::transpose4(p, stride, first);
            Isa::transpose4(p + 16, stride, second);
            Isa::transpose4(p + 1, stride, w);
            Isa::transpose4(p + 18, stride, w + 4);
            for (int h = 0; h < 2; h++) {
                const u32x16 power = h ? byte_of(second[0], 1) : byte_of(first[0], 0);  // of half the scale, plus 1
                const u32x16 tiny = 0x00200000u << (power & 1u), bits = power < 2u ? tiny : (power - 1u) << 23;
                panel.scale[2 * (b + h)] = panel.scale[2 * (b + h) + 1] = (f32x16)bits;
                for (int i = 0; i < 4; i++) {
                    panel.q[8 * (b + h) + i] = Isa::lookup(low(w[4 * h + i]), FP4_VALUES);
                    panel.q[8 * (b + h) + 4 + i] = Isa::lookup(high(w[4 * h + i]), FP4_VALUES);
                }
            }
        }
    }
    template <class Isa>
    void nvfp4(const uint8_t* p, int64_t stride, int weights, Panel& panel) const {
        for (int b = 0; b < weights / 64; b++, p += BYTES) {
            u32x16 w[8], head[4];
            Isa::transpose4(p, stride, head);
            words<Isa, 8>(p + 4, stride, w);
            for (int g = 0; g < 4; g++) {
                const u32x16 scale = byte_of(head[0], g), exponent = scale >> 3 & 15u, mantissa = scale & 7u;
                const f32x16 usual = (f32x16)((exponent + 119u) << 23 | mantissa << 20);  // half of it
                const f32x16 value = exponent == 0u ? to_float(mantissa) * 0x1p-10f : usual;
                panel.scale[4 * b + g] = scale == 0x7fu ? f32x16{} : value;
                for (int i = 0; i < 4; i++) {
                    const u32x16 nibbles = i < 2 ? low(w[2 * g + i]) : high(w[2 * g + i - 2]);
                    panel.q[16 * b + 4 * g + i] = Isa::lookup(nibbles, FP4_VALUES);
                }
            }
        }
    }
};
