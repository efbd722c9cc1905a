// AMX's tiles in software, so that the AMX path can be tested where there is no AMX. Intel's manual, TDPBSUD.
#pragma once
#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud

#define DG_TILE static __attribute__((noinline))  // or every use of every type is compiled again, for minutes

namespace {

struct Tiles {
    uint8_t data[8][16][64];
    uint8_t config[64];
    int bytes(int t) const { return config[16 + 2 * t] | config[17 + 2 * t] << 8; }
    int rows(int t) const { return config[48 + t]; }
};

inline Tiles& tiles() {
    static thread_local Tiles state;
    return state;
}

inline void _tile_loadconfig(const void* config) { memcpy(tiles().config, config, 64); }
inline void _tile_release() {}
DG_TILE void _tile_zero(int t) { memset(tiles().data[t], 0, sizeof tiles().data[t]); }

DG_TILE void _tile_loadd(int t, const void* from, int64_t stride) {
    _tile_zero(t);
    for (int r = 0; r < tiles().rows(t); r++) memcpy(tiles().data[t][r], (const char*)from + r * stride, tiles().bytes(t));
}

DG_TILE void _tile_stored(int t, void* to, int64_t stride) {
    for (int r = 0; r < tiles().rows(t); r++) memcpy((char*)to + r * stride, tiles().data[t][r], tiles().bytes(t));
}

// to[m][n] += Σ_k Σ_i signed a[m][4k + i] · unsigned b[k][4n + i]
DG_TILE void _tile_dpbsud(int to, int a, int b) {
    Tiles& s = tiles();
    for (int m = 0; m < s.rows(to); m++)
        for (int n = 0; n < s.bytes(to) / 4; n++) {
            int32_t sum;
            memcpy(&sum, &s.data[to][m][4 * n], 4);
            for (int k = 0; k < s.bytes(a) / 4; k++)
                for (int i = 0; i < 4; i++) sum += (int8_t)s.data[a][m][4 * k + i] * s.data[b][k][4 * n + i];
            memcpy(&s.data[to][m][4 * n], &sum, 4);
        }
}

}  // namespace
