// Every block type by ggml's number: those of blocks.h, a struct each, and those of coded.h, which share one.
#pragma once
#include "blocks.h"
#include "coded.h"

// Calls `f` with a value of the block type's struct; 0, or -1 for a number that is none, or whose codebook is not here.
template <class F>
DG_INLINE int with_type(int code, F&& f) {
    switch (code) {
        case 2: f(Q4_0{}); return 0;
        case 3: f(Q4_1{}); return 0;
        case 6: f(Q5_0{}); return 0;
        case 7: f(Q5_1{}); return 0;
        case 8: f(Q8_0{}); return 0;
        case 10: f(Q2_K{}); return 0;
        case 11: f(Q3_K{}); return 0;
        case 12: f(Q4_K{}); return 0;
        case 13: f(Q5_K{}); return 0;
        case 14: f(Q6_K{}); return 0;
        case 20: f(IQ4_NL{}); return 0;
        case 23: f(IQ4_XS{}); return 0;
    }
    Coded coded{code, 256, 0, nullptr};
    switch (code) {
        case 16: coded.BYTES = 66; break;
        case 17: coded.BYTES = 74; break;
        case 18: coded.BYTES = 98; break;
        case 19: coded.BYTES = 50; break;
        case 21: coded.BYTES = 110; break;
        case 22: coded.BYTES = 82; break;
        case 29: coded.BYTES = 56; break;
        case 34: coded.BYTES = 54; break;
        case 35: coded.BYTES = 66; break;
        case 39: coded.BLOCK = 32, coded.BYTES = 17; break;
        case 40: coded.BLOCK = 64, coded.BYTES = 36; break;
        default: return -1;
    }
    coded.grid = grid_of(code);
    if (!coded.grid && code < 34) return -1;
    f(coded);
    return 0;
}
