// The C interface of the CPU kernels: matrix products over weights that stay in ggml's blocks.
//
// Plain C, so that one build serves every Python version. Types are ggml's numbers (Q4_K = 12). All matrices are row
// major; activations and results are float32, rows `K` or `N` apart. Functions return 0, or -1 for a type or shape that
// they do not know. `threads` is the number of OpenMP threads to use.
#pragma once
#include <stdint.h>

#ifdef _WIN32
#define DG_API __declspec(dllexport)
#else
#define DG_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define DG_ABI 6

DG_API int dg_abi(void);
// The instruction sets that this machine and this build can run, best first, separated by spaces.
DG_API const char* dg_available(void);
// The one in use; dg_use chooses another by name (0 on success).
DG_API const char* dg_current(void);
DG_API int dg_use(const char* name);

// The codebook of one of the types IQ1, IQ2 and IQ3, `count` bytes, which are copied: they are not in here. IQ1's numbers
// times eight plus 128, the others' as they are. Without it these types are unknown. Call it before they are used.
DG_API int dg_grid(int type, const uint8_t* numbers, int64_t count);

// out[M, N] = x[M, K] · W[N, K]ᵀ; W's rows are `row_bytes` apart.
DG_API int dg_linear(int type, const uint8_t* weight, int64_t row_bytes, int64_t N, int64_t K, const float* x, int64_t M,
              float* out, int threads);

// out[M, D] = Σ_k weights[m, k] · down_e(gelu(gate_e(x)) · up_e(x)), e = experts[m, k] in [0, E).
// gate_up is [E, 2I, D] (gate rows first), down [E, D, I], both without gaps between rows.
DG_API int dg_expert_mlp(int gate_up_type, const uint8_t* gate_up, int down_type, const uint8_t* down, int64_t E, int64_t I,
                  int64_t D, const float* x, int64_t M, const int64_t* experts, const float* weights, int64_t top_k,
                  float* out, int threads);

// out[n, K] = the numbers of rows `rows[0..n)` of W, or of its first n rows where `rows` is null; float32, or bfloat16
// where `half` is not 0.
DG_API int dg_dequantize(int type, const uint8_t* weight, int64_t row_bytes, int64_t K, const int64_t* rows, int64_t n,
                         int half, void* out, int threads);

// soft[M, D] = soft · decay[m] + weights[M, n] · (the first n rows of W [.., D]).
DG_API int dg_mix(int type, const uint8_t* weight, int64_t row_bytes, int64_t n, int64_t D, const float* weights,
                  int64_t M, const float* decay, float* soft, int threads);

// The head's sums over one tile of the vocabulary, tokens `start` to `start + n`; all arrays are [M], and the ones that
// are not const go on from tile to tile (`best` and `best_key` from -inf). `gumbel` and `inside` are this tile's noise;
// `sharpness` is the power of the probabilities that the sample is drawn from (null: 1).
typedef struct {
    int64_t M, n, start;
    float cap;
    const float *inverse_t, *gumbel, *inside, *sharpness;
    float *best, *mass, *weighted, *best_key, *decay;
    int64_t *argmax, *sample;
} HeadTile;

// scores[M, n] (raw logits) become e^(l/T - best), l the soft-capped logit; `decay` is what earlier sums shrink by.
DG_API int dg_head_tile(const HeadTile* tile, float* scores, int threads);

// out = (residual +) x · (mean(x²) + eps)^-½ (· weight) for every row of `width`; weight and residual may be null.
DG_API int dg_rms_norm(const float* x, int64_t rows, int64_t width, const float* weight, float eps,
                       const float* residual, float* out, int threads);

// Queries or keys x [tokens, heads, dim]: RMSNorm of every head times weight [dim], then rotary embedding with cos and sin
// [tokens, dim], in the half-split layout (both halves repeated there). `out` may be `x`.
DG_API int dg_norm_rotate(const float* x, int64_t tokens, int64_t heads, int64_t dim, const float* weight, float eps,
                          const float* cos, const float* sin, float* out, int threads);

// Softmax attention with scale 1, all in bfloat16: query [heads, rows, dim]; keys and values in `blocks` blocks, number i
// of them [heads, columns[i], dim], a head's columns strides[i] numbers behind the last one's: a page is read as it lies.
// dim is a multiple of 32. Every row sees every column where `positions` is null; else
// row r sees the columns whose position [batch, all columns] is between first and last [batch, rows / group] of r / group,
// batch being heads / heads_per_batch. A row that sees nothing gets zeros.
typedef struct {
    int64_t heads, rows, dim, blocks, heads_per_batch, group;
    const uint16_t* query;
    const uint16_t* const* keys;
    const uint16_t* const* values;
    const int64_t *columns, *strides, *positions, *first, *last;
} Attention;

// out [heads, rows, dim] float32; -1 where the present instruction set has no bfloat16.
DG_API int dg_attend(const Attention* attention, float* out, int threads);

// Multiply-adds per second that the present instruction set's dot instruction reaches from registers, all threads.
DG_API double dg_peak(int threads);

#ifdef __cplusplus
}
#endif
