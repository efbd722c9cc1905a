// AMX int8: 16 rows by 16 columns by a group of weights in one instruction, the rest as with AVX-512.
#include "avx512.h"
#ifdef DG_EMULATE_AMX
#include "amx_emulation.h"
#endif

namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

struct Amx : Avx512Words {
    static double peak(int64_t rounds) {
        configure<64>();
        alignas(64) static const uint8_t zeros[1024] = {};
        _tile_loadd(4, zeros, 64);
        _tile_loadd(5, zeros, 64);
        for (int64_t i = 0; i < rounds / 16; i++) {
            _tile_dpbsud(0, 4, 5);
            _tile_dpbsud(1, 4, 5);
            _tile_dpbsud(2, 4, 5);
            _tile_dpbsud(3, 4, 5);
        }
        _tile_release();
        return rounds / 16 * 4 * 16.0 * 16 * 64;
    }
    // Tiles 0-3 take sums [16, 16], tile 4 activations [16, K], tiles 5 and 6 weights [K / 4, 16 columns of 4].
    template <int K>
    static void configure() {
        TileConfig config;
        for (int i = 0; i < 4; i++) config.bytes[i] = 64, config.rows[i] = 16;
        config.bytes[4] = K, config.rows[4] = 16;
        for (int i = 5; i < 7; i++) config.bytes[i] = 64, config.rows[i] = K / 4;
        _tile_loadconfig(&config);
    }
};

template <class T>
struct Products<Amx, T> {
    static constexpr int ROWS = 16;
    static void block(int rows, const Panel* panels, int groups, const int8_t* const* a, const int32_t* const* sums, const float* scale, float* out) {
        alignas(64) int8_t tile[16 * SUPER];
        alignas(64) int32_t dots[2][2][16 * 16];
        for (int r = 0; r < 16; r++) {
            if (r < rows) memcpy(tile + r * SUPER, a[r], groups * T::GROUP);
            else memset(tile + r * SUPER, 0, groups * T::GROUP);
        }
        // The tiles' shape is the thread's; setting it costs little beside sixteen rows of a panel pair.
        Amx::configure<T::GROUP>();
        __m512 total[16][2];
        for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
        // Two rooms by turns, so that a group's products need not wait for the one before to be scaled.
        for (int g = 0; g < groups; g++) {
            auto& dot = dots[g % 2];
            _tile_zero(0);
            _tile_zero(1);
            _tile_loadd(4, tile + g * T::GROUP, SUPER);
            _tile_loadd(5, panels[0].q + g * T::GROUP / 4, 64);
            _tile_loadd(6, panels[1].q + g * T::GROUP / 4, 64);
            _tile_dpbsud(0, 4, 5);
            _tile_dpbsud(1, 4, 6);
            _tile_stored(0, dot[0], 64);
            _tile_stored(1, dot[1], 64);
            for (int p = 0; p < 2; p++) {
                __m512 s = (__m512)panels[p].scale[g], o = T::OFFSET ? (__m512)panels[p].offset[g] : s;
                for (int r = 0; r < rows; r++) {
                    __m512i sum = _mm512_load_si512(dot[p] + 16 * r);
                    if (!T::OFFSET) sum = _mm512_add_epi32(sum, _mm512_set1_epi32(sums[r][g]));
                    total[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s, total[r][p]);
                    if (T::OFFSET)
                        total[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(*(const float*)&sums[r][g]), o, total[r][p]);
                }
            }
        }
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < 2; p++) {
                float* to = out + r * COLUMNS + 16 * p;
                _mm512_storeu_ps(to, _mm512_fmadd_ps(total[r][p], _mm512_set1_ps(scale[r]), _mm512_loadu_ps(to)));
            }
    }
};

}  // namespace

const Table DG_AMX = Entries<Amx>::table("amx", attend);
