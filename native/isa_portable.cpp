// Any processor: the reference that the others are held to. Compilers make NEON or SSE of the sixteen lanes.
#include "gemm.h"

namespace {

struct Portable {
    using Mixer = FloatMixer;

    static void transpose4(const uint8_t* p, int64_t stride, u32x16* out) {
        for (int row = 0; row < 16; row++)
            for (int j = 0; j < 4; j++) {
                uint32_t word;
                memcpy(&word, p + row * stride + 4 * j, 4);
                out[j][row] = word;
            }
    }
    static u32x16 gather(const uint32_t* table, u32x16 index) {
        u32x16 out;
        for (int row = 0; row < 16; row++) out[row] = table[index[row]];
        return out;
    }
    static u32x16 lookup(u32x16 nibbles, const int8_t* values) {
        u32x16 out{};
        for (int b = 0; b < 4; b++)
            for (int row = 0; row < 16; row++)
                out[row] |= (uint32_t)(values[nibbles[row] >> (8 * b) & 15] + 128) << (8 * b);
        return out;
    }
    static int32_t sum_bytes(const int8_t* p, int count) {
        int32_t total = 0;
        for (int i = 0; i < count; i++) total += p[i];
        return total;
    }
    static double peak(int64_t rounds) {
        i32x16 sums[4] = {};
        for (int64_t i = 0; i < rounds / 8; i++)
            for (auto& sum : sums) sum += sum * 3 + (int32_t)i;
        volatile int32_t sink = sums[0][0] + sums[1][1] + sums[2][2] + sums[3][3];
        (void)sink;
        return rounds / 8 * 4 * 16.0;
    }
};

template <class T>
struct Products<Portable, T> {
    static constexpr int ROWS = 4;
    static void block(int rows, const Panel* panels, int groups, const int8_t* const* a, const int32_t* const* sums, const float* scale, float* out) {
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < 2; p++) {
                const Panel& panel = panels[p];
                f32x16 total{};
                for (int g = 0; g < groups; g++) {
                    i32x16 dot = (i32x16)splat(T::OFFSET ? 0u : (uint32_t)sums[r][g]);
                    for (int i = g * T::GROUP; i < (g + 1) * T::GROUP; i++)
                        dot += (i32x16)byte_of(panel.q[i / 4], i % 4) * (int32_t)a[r][i];
                    total += __builtin_convertvector(dot, f32x16) * panel.scale[g];
                    if (T::OFFSET) {
                        float sum;
                        memcpy(&sum, &sums[r][g], 4);
                        total += sum * panel.offset[g];
                    }
                }
                float* to = out + r * COLUMNS + 16 * p;
                store(to, load<f32x16>(to) + total * scale[r]);
            }
    }
};

}  // namespace

const Table DG_PORTABLE = Entries<Portable>::table("portable");
