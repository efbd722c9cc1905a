// What the translation units of the instruction sets offer to the dispatcher. Plain data only: nothing here has code.
#pragma once
#include "dgemma.h"

// The (token, choice) pairs sorted by expert: slot s belongs to token[s] with weight[s], and first[e] to first[e + 1]
// are expert e's. `busiest` lists the `used` experts that have any, most slots first; `most` is the largest number.
struct Buckets {
    const int32_t* token;
    const float* weight;
    const int64_t* first;
    const int32_t* busiest;
    int64_t used, most;
};

struct Table {
    const char* name;
    void (*attend)(const Attention&, float* out, int threads);  // null without bfloat16 instructions
    int (*linear)(int type, const uint8_t* weight, int64_t row_bytes, int64_t N, int64_t K, const float* x, int64_t M,
                  float* out, int threads);
    int (*gate_up)(int type, const uint8_t* weight, int64_t I, int64_t D, const float* x, int64_t M, const Buckets&,
                   float* inner, int threads);
    int (*down)(int type, const uint8_t* weight, int64_t E, int64_t I, int64_t D, const float* inner, int64_t M,
                const Buckets&, float* out, int threads);
    int (*dequantize)(int type, const uint8_t* weight, int64_t row_bytes, int64_t K, const int64_t* rows, int64_t n,
                      int half, void* out, int threads);
    int (*mix)(int type, const uint8_t* weight, int64_t row_bytes, int64_t n, int64_t D, const float* weights, int64_t M,
               const float* decay, float* soft, int threads);
    void (*head_tile)(const HeadTile&, float* scores, int threads);
    void (*rms_norm)(const float* x, int64_t rows, int64_t width, const float* weight, float eps,
                     const float* residual, float* out, int threads);
    void (*norm_rotate)(const float* x, int64_t tokens, int64_t heads, int64_t dim, const float* weight, float eps,
                        const float* cos, const float* sin, float* out, int threads);
    double (*peak)(int threads);
};

// A type's codebook as `dg_grid` was given it, or null.
const uint32_t* grid_of(int type);

extern const Table DG_PORTABLE;
#ifdef DG_X86
extern const Table DG_AVX2, DG_AVXVNNI, DG_AVX512, DG_AVX512BF16, DG_AMX;
#endif
