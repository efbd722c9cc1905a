// The products, written once over an instruction set `Isa`, which supplies `transpose4` (words of 16 rows into lanes),
// `lookup` (a table of sixteen bytes), `gather` (any table), `peak` and `Products<Isa, T>`, whose `block` multiplies up
// to ROWS rows with two panels. Beside them the head's sums, norms and rotary embedding of plain tensors.
//
// Activations are quantised to int8 with one scale per row and 256 weights; products are exact in int32 within a
// weight's group and summed in float32. A result depends on its own row and column only, never on the other rows, the
// number of threads or their order.
//
// Threads claim their work in pieces well below a millisecond: on a busy machine they do not run at the same pace, and
// what is shared out evenly waits for the slowest.
#pragma once
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "types.h"

// Everything here is compiled once per instruction set, so nothing may be shared between the copies by the linker: all
// of it is in an unnamed namespace, and the standard library's templates are kept out.
namespace {

constexpr int COLUMNS = 32;  // two panels
constexpr int64_t ALONE = 1 << 16;  // so many numbers are normed sooner than a sleeping thread wakes up

DG_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count) : data((T*)aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)) {
        if (!data) abort();
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// M rows of K activations as int8, in the form that products with weights of type T want. Every 256 share a scale.
// `sums` are those of the int8 numbers in each of the weight's groups: as floats for types with an offset, else as
// integers times -ZERO, where a dot product starts.
template <class Isa, class T>
struct Activations {
    int64_t K, supers, width;  // width: K rounded up to 256, zeros behind K
    Buffer<int8_t> q;          // [M, width]
    Buffer<float> scale;       // [M, supers]
    Buffer<int32_t> sums;      // [M, width / T::GROUP]

    Activations(int64_t M, int64_t K)
        : K(K), supers((K + SUPER - 1) / SUPER), width(supers * SUPER), q(M * width), scale(M * supers),
          sums(M * width / T::GROUP) {}

    void quantize_row(int64_t m, const float* x) {
        for (int64_t s = 0; s < supers; s++) {
            alignas(64) float part[SUPER];
            const float* from = x + s * SUPER;
            int count = (int)least(SUPER, K - s * SUPER);
            if (count < SUPER) {
                memset(part, 0, sizeof part);
                memcpy(part, from, count * sizeof(float));
                from = part;
            }
            // Sizes compared by their bits, where NaN is the largest: what holds one comes out as NaN.
            i32x16 most{};
            for (int i = 0; i < SUPER; i += 16) {
                const i32x16 size = (i32x16)((u32x16)load<f32x16>(from + i) & 0x7fffffffu);
                most = size > most ? size : most;
            }
            int32_t top = 0;
            for (int i = 0; i < 16; i++) top = most[i] > top ? most[i] : top;
            float peak;
            memcpy(&peak, &top, 4);
            const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
            scale.data[m * supers + s] = peak / 127.0f;
            int8_t* to = q.data + m * width + s * SUPER;
            for (int i = 0; i < SUPER; i += 16) {
                // Round to nearest even: after adding 1.5·2^23 the low byte of the float is the integer's.
                u32x16 bits = (u32x16)(load<f32x16>(from + i) * inverse + 12582912.0f);
                store(to + i, __builtin_convertvector((i32x16)bits, i8x16));
            }
            int32_t* sum = sums.data + (m * width + s * SUPER) / T::GROUP;
            for (int g = 0; g < SUPER / T::GROUP; g++) {
                const int32_t total = Isa::sum_bytes(to + g * T::GROUP, T::GROUP);
                const float as_float = (float)total;
                sum[g] = -T::ZERO * total;
                if (T::OFFSET) memcpy(sum + g, &as_float, 4);
            }
        }
    }
};

// The most bytes that 256 weights take.
template <class T>
constexpr int STRIDE = T::BYTES * (SUPER / T::BLOCK);
template <>
constexpr int STRIDE<Coded> = Coded::STRIDE;

// Up to 256 weights from `k` on of the 16 rows from `n` on. Rows past N and K's ragged end are read from a copy.
template <class Isa, class T>
inline void unpack(T t, const uint8_t* weight, int64_t row_bytes, int64_t N, int64_t K, int64_t n, int64_t k, Panel& panel) {
    int weights = (int)least(SUPER, K - k);
    const uint8_t* p = weight + n * row_bytes + k / t.BLOCK * t.BYTES;
    bool whole = weights % 64 == 0 && n + 16 <= N;
    if (__builtin_expect(whole, 1)) {
        t.template unpack<Isa>(p, row_bytes, weights, panel);
        return;
    }
    uint8_t copy[16 * STRIDE<T>];
    memset(copy, 0, sizeof copy);
    int bytes = weights / t.BLOCK * t.BYTES;
    for (int r = 0; r < 16 && n + r < N; r++) memcpy(copy + r * STRIDE<T>, p + r * row_bytes, bytes);
    t.template unpack<Isa>(copy, STRIDE<T>, (weights + 63) / 64 * 64, panel);
}

// What will be wanted next: up to two stretches of memory. Hardware does not follow 32 rows at once by itself, so their
// cache lines are asked for, a few at a time: many at once are dropped.
struct Ahead {
    const uint8_t *first, *second;
    int64_t bytes, at = 0, step = 0;

    Ahead(const uint8_t* first, const uint8_t* second, int64_t bytes) : first(first), second(second), bytes(bytes) {}
    void in_steps(int64_t count) { step = (bytes / count + 64) & ~(int64_t)63; }
    inline __attribute__((always_inline)) void fetch() {
        for (const int64_t stop = least(bytes, at + step); at < stop; at += 64) {
            __builtin_prefetch(first + at, 0, 2);
            if (second) __builtin_prefetch(second + at, 0, 2);
        }
    }
};

template <class Isa, class T>
struct Products;

// sums[m][32] += a[row of m] · (two panels' columns) over up to 256 weights from k on, for `count` rows; row m of them
// is `index[m]`, or `first + m` where there is no index.
template <class Isa, class T>
inline void accumulate(const Activations<Isa, T>& a, const int32_t* index, int64_t first, int64_t count, int64_t k, int weights, const Panel* panels, Ahead& ahead, float* sums) {
    constexpr int MOST = Products<Isa, T>::ROWS;
    // Row counts per block as equal as possible: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
    const int64_t blocks = (count + MOST - 1) / MOST;
    for (int64_t b = 0, m = 0; b < blocks; b++) {
        const int here = (int)((count - m) / (blocks - b));
        const int8_t* q[MOST];
        const int32_t* sum[MOST];
        float scale[MOST];
        for (int r = 0; r < here; r++) {
            int64_t row = index ? index[m + r] : first + m + r;
            q[r] = a.q.data + row * a.width + k;
            sum[r] = a.sums.data + (row * a.width + k) / T::GROUP;
            scale[r] = a.scale.data[row * a.supers + k / SUPER];
        }
        ahead.fetch();
        Products<Isa, T>::block(here, panels, weights / T::GROUP, q, sum, scale, sums + m * COLUMNS);
        m += here;
    }
}

// sums[m][32] = a · columns n0.. and n1.. of W, 16 of each, over all of K.
template <class Isa, class T>
inline void pair_sums(T t, const uint8_t* w0, const uint8_t* w1, int64_t row_bytes, int64_t N, int64_t n0, int64_t n1, Ahead ahead, const Activations<Isa, T>& a, const int32_t* index, int64_t first, int64_t count, float* sums) {
    Panel panels[2];
    memset(sums, 0, count * COLUMNS * sizeof(float));
    ahead.in_steps(a.supers * (2 + (count + Products<Isa, T>::ROWS - 1) / Products<Isa, T>::ROWS));
    for (int64_t k = 0; k < a.K; k += SUPER) {
        ahead.fetch();
        unpack<Isa>(t, w0, row_bytes, N, a.K, n0, k, panels[0]);
        ahead.fetch();
        unpack<Isa>(t, w1, row_bytes, N, a.K, n1 < N ? n1 : n0, k, panels[1]);
        accumulate<Isa, T>(a, index, first, count, k, (int)least(SUPER, a.K - k), panels, ahead, sums);
    }
}

template <class Isa, class T>
void linear(T t, const uint8_t* weight, int64_t row_bytes, int64_t N, int64_t K, const float* x, int64_t M, float* out, int threads) {
    Activations<Isa, T> a(M, K);
    const int64_t pairs = (N + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads)
    {
        Buffer<float> sums(M * COLUMNS);
#pragma omp for schedule(dynamic, 8)
        for (int64_t m = 0; m < M; m++) a.quantize_row(m, x + m * K);
#pragma omp for schedule(dynamic, 1)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t n = pair * COLUMNS, columns = least(COLUMNS, N - n);
            const Ahead ahead{weight + (n + COLUMNS) * row_bytes, nullptr, pair + 1 < pairs ? COLUMNS * row_bytes : 0};
            pair_sums<Isa>(t, weight, weight, row_bytes, N, n, n + 16, ahead, a, nullptr, 0, M, sums.data);
            for (int64_t m = 0; m < M; m++) memcpy(out + m * N + n, sums.data + m * COLUMNS, columns * sizeof(float));
        }
    }
}

// inner[slot, I] = gelu(gate)·up for every slot of every expert.
template <class Isa, class T>
void gate_up(T t, const uint8_t* weight, int64_t I, int64_t D, const float* x, int64_t M, const Buckets& b, float* inner, int threads) {
    const int64_t row_bytes = D / t.BLOCK * t.BYTES, panels = (I + 15) / 16;
    constexpr int64_t CHUNK = 11;  // panels in one piece of work: a quarter of an expert of the 26B-A4B
    const int64_t chunks = (panels + CHUNK - 1) / CHUNK;
    Activations<Isa, T> a(M, D);
#pragma omp parallel num_threads(threads)
    {
        Buffer<float> sums(b.most * COLUMNS);
#pragma omp for schedule(dynamic, 8)
        for (int64_t m = 0; m < M; m++) a.quantize_row(m, x + m * D);
#pragma omp for schedule(dynamic, 1)
        for (int64_t work = 0; work < b.used * chunks; work++) {
            const int64_t e = b.busiest[work / chunks], slot = b.first[e], count = b.first[e + 1] - slot;
            const int64_t start = work % chunks * CHUNK, stop = least(panels, start + CHUNK);
            const uint8_t* gate = weight + e * 2 * I * row_bytes;
            for (int64_t n = start * 16; n < stop * 16; n += 16) {
                const Ahead ahead{gate + (n + 16) * row_bytes, gate + (I + n + 16) * row_bytes, n + 32 <= I ? 16 * row_bytes : 0};
                pair_sums<Isa>(t, gate, gate + I * row_bytes, row_bytes, I, n, n, ahead, a, b.token + slot, 0, count, sums.data);
                const int64_t columns = least(16, I - n);
                for (int64_t m = 0; m < count; m++) {
                    const float* sum = sums.data + m * COLUMNS;
                    f32x16 h = gelu(load<f32x16>(sum)) * load<f32x16>(sum + 16);
                    memcpy(inner + (slot + m) * I + n, &h, columns * sizeof(float));
                }
            }
        }
    }
}

// out[token, D] = Σ over the token's slots of weight · down(inner). A piece of work is a stretch of columns through all
// experts, so every sum has one order, whoever does it.
template <class Isa, class T>
void down(T t, const uint8_t* weight, int64_t E, int64_t I, int64_t D, const float* inner, int64_t M, const Buckets& b, float* out, int threads) {
    const int64_t row_bytes = I / t.BLOCK * t.BYTES;
    constexpr int64_t CHUNK = 2 * COLUMNS;
    Activations<Isa, T> h(b.first[E], I);
#pragma omp parallel num_threads(threads)
    {
        Buffer<float> sums(b.most * COLUMNS);
#pragma omp for schedule(dynamic, 32)
        for (int64_t slot = 0; slot < b.first[E]; slot++) h.quantize_row(slot, inner + slot * I);
#pragma omp for schedule(dynamic, 1)
        for (int64_t start = 0; start < D; start += CHUNK) {
            const int64_t stop = least(D, start + CHUNK);
            for (int64_t m = 0; m < M; m++) memset(out + m * D + start, 0, (stop - start) * sizeof(float));
            for (int64_t e = 0; e < E; e++) {
                const int64_t slot = b.first[e], count = b.first[e + 1] - slot;
                if (!count) continue;
                const uint8_t* own = weight + e * D * row_bytes;
                for (int64_t n = start; n < stop; n += COLUMNS) {
                    Ahead ahead{own + (n + COLUMNS) * row_bytes, nullptr, COLUMNS * row_bytes};
                    if (n + COLUMNS >= stop)  // this stretch's columns of the next expert
                        ahead.first = own + (D + start) * row_bytes, ahead.bytes = e + 1 < E ? ahead.bytes : 0;
                    pair_sums<Isa>(t, own, own, row_bytes, D, n, n + 16, ahead, h, nullptr, slot, count, sums.data);
                    const int64_t columns = least(COLUMNS, D - n);
                    for (int64_t m = 0; m < count; m++) {
                        float* to = out + b.token[slot + m] * D + n;
                        const float* from = sums.data + m * COLUMNS;
                        for (int64_t c = 0; c < columns; c++) to[c] += b.weight[slot + m] * from[c];
                    }
                }
            }
        }
    }
}

// float32 -> bfloat16 in the low half of every lane, to nearest even. NaN stays NaN: rounded like a number, one whose
// bits are all set would become 0.
DG_INLINE u32x16 to_bf16(f32x16 x) {
    const u32x16 bits = (u32x16)x;
    const u32x16 nan = (u32x16)((i32x16)(0x7f800000u - (bits & 0x7fffffffu)) >> 31);  // compilers compare lane by lane
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 | (nan & 0x7fc0u);
}

// Lanes back into rows: word `w` of `from[j]` becomes word j of row w, `stride` bytes apart.
template <class Isa>
DG_INLINE void scatter(const u32x16* from, uint8_t* to, int64_t stride, int rows) {
    for (int w = 0; w < rows; w += 4) {
        u32x16 out[4];
        Isa::transpose4((const uint8_t*)from + 4 * w, sizeof(u32x16), out);
        for (int i = 0; i < 4 && w + i < rows; i++) store(to + (w + i) * stride, out[i]);
    }
}

// Number i of a panel's 16 rows.
template <class T>
DG_INLINE f32x16 number_of(const Panel& panel, int i) {
    f32x16 value = (to_float(byte_of(panel.q[i / 4], i % 4)) - (float)T::ZERO) * panel.scale[i / T::GROUP];
    return T::OFFSET ? value + panel.offset[i / T::GROUP] : value;
}

// The numbers themselves, of rows by index (or the first `count` ones): float32, or bfloat16 where `half`.
template <class Isa, class T>
void dequantize(T t, const uint8_t* weight, int64_t row_bytes, int64_t K, const int64_t* rows, int64_t count, int half, void* out, int threads) {
    const int64_t item = half ? 2 : 4;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t r0 = 0; r0 < count; r0 += 16) {
        alignas(64) uint8_t copy[16 * STRIDE<T>];
        alignas(64) uint8_t numbers[16 * SUPER * 4];
        Panel panel;
        const int here = (int)least(16, count - r0);
        for (int64_t k = 0; k < K; k += SUPER) {
            const int weights = (int)least(SUPER, K - k), whole = (weights + 63) / 64 * 64;
            const uint8_t* from = weight + k / t.BLOCK * t.BYTES;
            if (rows || here < 16 || whole != weights) {
                memset(copy, 0, sizeof copy);
                for (int r = 0; r < here; r++)
                    memcpy(copy + r * STRIDE<T>, from + (rows ? rows[r0 + r] : r0 + r) * row_bytes, weights / t.BLOCK * t.BYTES);
                t.template unpack<Isa>(copy, STRIDE<T>, whole, panel);
            } else {
                t.template unpack<Isa>(from + r0 * row_bytes, row_bytes, whole, panel);
            }
            auto number = [&](int i) { return number_of<T>(panel, i); };
            for (int i = 0; i < weights; i += half ? 32 : 16) {  // a word holds one number, or two
                u32x16 words[16];
                for (int j = 0; j < 16; j++)
                    words[j] = half ? to_bf16(number(i + 2 * j)) | to_bf16(number(i + 2 * j + 1)) << 16 : (u32x16)number(i + j);
                scatter<Isa>(words, numbers + item * i, SUPER * item, here);
            }
            for (int r = 0; r < here; r++)
                memcpy((char*)out + ((r0 + r) * K + k) * item, numbers + r * SUPER * item, weights * item);
        }
    }
}

// soft[M, D] = soft · decay + weights[M, n] · (W's first n rows): sums of rows, for weights of a softmax. Rows whose
// weights are nothing beside 1 (the largest weight that any row has had) are left out, as float32 would.
//
// Sixteen rows by 256 columns are unpacked at a time, in the form that `Isa::Mixer` multiplies; STRETCH rows are gone
// through by all of M while they are in cache.
template <class Isa, class T>
void mix(T t, const uint8_t* weight, int64_t row_bytes, int64_t n, int64_t D, const float* weights, int64_t M, const float* decay, float* soft, int threads) {
    using Mixer = typename Isa::Mixer;
    constexpr int64_t STRETCH = 64;
    const int64_t supers = (D + SUPER - 1) / SUPER, width = (n + STRETCH - 1) / STRETCH * STRETCH;
    // Stretches of columns are the pieces of work; where they are few, rows are split as well.
    const int64_t splits = least((M + 15) / 16, (8 * threads + supers - 1) / supers);
    Buffer<typename Mixer::Item> p(M * width);
    Buffer<int8_t> counts(M);  // whether a row's weights are more than nothing
#pragma omp parallel num_threads(threads)
    {
        Buffer<char> room(Mixer::BYTES * STRETCH * SUPER);
        Buffer<int32_t> index((M + splits - 1) / splits + 1);
#pragma omp for schedule(dynamic, 8)
        for (int64_t m = 0; m < M; m++) {
            f32x16 total{};
            int64_t v = 0;
            for (; v + 16 <= n; v += 16) total += load<f32x16>(weights + m * n + v);
            float sum = 0;
            for (int i = 0; i < 16; i++) sum += total[i];
            for (; v < n; v++) sum += weights[m * n + v];
            counts.data[m] = sum > 1e-9f;
            if (counts.data[m]) Mixer::convert(weights + m * n, n, width, p.data + m * width);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t work = 0; work < supers * splits; work++) {
            const int64_t d0 = work / splits * SUPER, columns = least(SUPER, D - d0), part = work % splits;
            int64_t active = 0;
            for (int64_t m = M * part / splits; m < M * (part + 1) / splits; m++) {
                if (counts.data[m]) index.data[active++] = (int32_t)m;
                if (decay[m] != 1.0f)
                    for (int64_t d = d0; d < d0 + columns; d++) soft[m * D + d] *= decay[m];
            }
            for (int64_t v0 = 0; v0 < n && active; v0 += STRETCH) {
                for (int64_t v = 0; v < STRETCH; v += 16) {
                    Panel panel;
                    if (v0 + v < n) unpack<Isa>(t, weight, row_bytes, n, D, v0 + v, d0, panel);
                    else memset((void*)&panel, 0, sizeof panel);
                    auto number = [&](int i) { return number_of<T>(panel, i); };
                    for (int i = 0; i < columns; i += 16) Mixer::template pack<Isa>(number, i, (int)v, STRETCH, room.data);
                }
                for (int64_t i = 0; i < columns; i += COLUMNS)
                    Mixer::multiply(room.data, i, STRETCH, p.data + v0, width, index.data, active, soft + d0 + i, D, least(COLUMNS, columns - i));
            }
        }
    }
}

// Plain float32: word [row][16 columns].
struct FloatMixer {
    using Item = float;
    static constexpr int64_t BYTES = 4;
    static void convert(const float* from, int64_t n, int64_t width, float* to) {
        memcpy(to, from, n * sizeof(float));
        memset(to + n, 0, (width - n) * sizeof(float));
    }
    // 16 rows from v on of columns i.. i + 15: a [stretch][16] stretch of floats for every 16 columns.
    template <class Isa, class F>
    DG_INLINE void pack(F&& number, int i, int v, int64_t stretch, char* room) {
        alignas(64) u32x16 lanes[16];
        for (int j = 0; j < 16; j++) lanes[j] = (u32x16)number(i + j);
        float* to = (float*)room + i * stretch + v * 16;
        scatter<Isa>(lanes, (uint8_t*)to, sizeof(u32x16), 16);
    }
    static void multiply(const char* room, int64_t i, int64_t stretch, const float* p, int64_t width, const int32_t* index, int64_t count, float* soft, int64_t D, int64_t columns) {
        const float* table = (const float*)room + i * stretch;
        for (int64_t h = 0; h < columns; h += 16, table += 16 * stretch)
            for (int64_t m = 0; m < count; m++) {
                float* to = soft + index[m] * D + h;
                f32x16 sum = load<f32x16>(to);
                for (int64_t v = 0; v < stretch; v++) sum += load<f32x16>(table + 16 * v) * p[index[m] * width + v];
                store(to, sum);
            }
    }
};

// One tile of the vocabulary's logits, in place: scores[M, n] become e^(l/T - best), with l the soft-capped logit and
// `best` the largest l/T so far; the running sums follow, and a sample is drawn where this tile wins. See nn/head.py.
inline void head_tile(const HeadTile& t, float* scores, int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t m = 0; m < t.M; m++) {
        float* row = scores + m * t.n;
        const float inverse_cap = 2.0f / t.cap, factor = t.cap * t.inverse_t[m];
        const int64_t whole = t.n / 16 * 16;
        auto capped = [&](f32x16 x) {  // cap · tanh(x / cap) / T; tanh(y) = 1 - 2 / (1 + e^2y)
            return factor * (1.0f - 2.0f / (1.0f + exp(x * inverse_cap)));
        };
        f32x16 tail = splat(-INFINITY);
        for (int64_t i = whole; i < t.n; i++) tail[i - whole] = row[i];
        f32x16 most = splat(-INFINITY);
        for (int64_t i = 0; i < whole; i += 16) {
            f32x16 l = capped(load<f32x16>(row + i));
            store(row + i, l);
            most = max(most, l);
        }
        if (whole < t.n) {
            tail = capped(tail);
            for (int64_t i = whole; i < t.n; i++) row[i] = tail[i - whole];
        }
        float top = most[0];
        for (int i = 1; i < 16; i++) top = most[i] > top ? most[i] : top;
        for (int64_t i = whole; i < t.n; i++) top = row[i] > top ? row[i] : top;
        const float before = t.best[m], now = top > before ? top : before;
        if (top > before) {
            int64_t where = 0;
            while (row[where] != top) where++;
            t.argmax[m] = t.start + where;
        }
        const float drop = t.start ? before - now : 0.0f;
        const float decay = t.start ? exp(splat(drop))[0] * (drop > -87.0f) : 0.0f;
        // The draw is from p^sharpness: its own masses, where it is not from p.
        const float sharpness = t.sharpness ? t.sharpness[m] : 1.0f;
        f32x16 sums{}, products{}, sharpened{};
        for (int64_t i = 0; i < whole; i += 16) {
            f32x16 x = load<f32x16>(row + i) - now, e = exp(x);
            e = x <= -87.0f ? f32x16{} : e;  // NaN stays
            store(row + i, e);
            sums += e, products += e * x;
            if (sharpness != 1.0f) {
                x *= sharpness;
                sharpened += x <= -87.0f ? f32x16{} : exp(x);
            }
        }
        double mass = 0, weighted = 0, drawn = 0;
        for (int i = 0; i < 16; i++) mass += sums[i], weighted += products[i], drawn += sharpened[i];
        for (int64_t i = whole; i < t.n; i++) {
            const float x = row[i] - now, y = x * sharpness;
            row[i] = x <= -87.0f ? 0.0f : exp(splat(x))[0];
            mass += row[i], weighted += row[i] * x, drawn += y <= -87.0f ? 0.0f : exp(splat(y))[0];
        }
        if (sharpness == 1.0f) drawn = mass;
        t.weighted[m] = t.start ? (t.weighted[m] + t.mass[m] * drop) * decay + (float)weighted : (float)weighted;
        t.mass[m] = t.start ? t.mass[m] * decay + (float)mass : (float)mass;
        t.best[m] = now, t.decay[m] = decay;
        // The largest of a tile's perturbed logits is Gumbel-distributed around the log of its mass.
        if (!(drawn > 0)) continue;
        const float key = logf((float)drawn) + now * sharpness + t.gumbel[m];
        if (key > t.best_key[m]) {
            t.best_key[m] = key;
            const double target = t.inside[m] * drawn;
            double sum = 0;
            int64_t last = 0;
            for (int64_t i = 0; i < t.n; i++) {
                const float weight = sharpness == 1.0f ? row[i] : powf(row[i], sharpness);
                if (weight > 0) last = i;
                sum += weight;
                if (sum > target) break;
            }
            t.sample[m] = t.start + last;
        }
    }
}

// out = (residual +) x · (mean(x²) + eps)^-½ (· weight), row by row.
inline void rms_norm(const float* x, int64_t rows, int64_t width, const float* weight, float eps, const float* residual, float* out, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (rows * width > ALONE)
    for (int64_t m = 0; m < rows; m++) {
        const float* from = x + m * width;
        float* to = out + m * width;
        const float* add = residual ? residual + m * width : nullptr;
        const int64_t whole = width / 16 * 16;
        f32x16 squares[2] = {};
        for (int64_t i = 0; i < whole; i += 16) {
            f32x16 v = load<f32x16>(from + i);
            squares[i / 16 % 2] += v * v;
        }
        double total = 0;
        for (int i = 0; i < 16; i++) total += (double)squares[0][i] + squares[1][i];
        for (int64_t i = whole; i < width; i++) total += from[i] * from[i];
        const float scale = 1.0f / sqrtf((float)(total / width) + eps);
        for (int64_t i = 0; i < whole; i += 16) {
            f32x16 v = load<f32x16>(from + i) * scale;
            if (weight) v *= load<f32x16>(weight + i);
            if (add) v += load<f32x16>(add + i);
            store(to + i, v);
        }
        for (int64_t i = whole; i < width; i++) {
            const float v = from[i] * scale * (weight ? weight[i] : 1.0f);
            to[i] = add ? v + add[i] : v;
        }
    }
}

// For every token and head: RMSNorm of `dim` numbers, times weight, then rotary embedding in its half-split layout with the
// token's cos and sin [tokens, dim] (halves repeated). `out` may be `x`.
inline void norm_rotate(const float* x, int64_t tokens, int64_t heads, int64_t dim, const float* weight, float eps, const float* cos, const float* sin, float* out, int threads) {
    const int64_t half = dim / 2, whole = half / 16 * 16;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (tokens * heads * dim > ALONE)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < heads; h++) {
            const float* from = x + (t * heads + h) * dim;
            float* to = out + (t * heads + h) * dim;
            f32x16 squares{};
            for (int64_t i = 0; i < dim / 16 * 16; i += 16) {
                f32x16 v = load<f32x16>(from + i);
                squares += v * v;
            }
            double total = 0;
            for (int i = 0; i < 16; i++) total += squares[i];
            for (int64_t i = dim / 16 * 16; i < dim; i++) total += from[i] * from[i];
            const float scale = 1.0f / sqrtf((float)(total / dim) + eps);
            for (int64_t i = 0; i < whole; i += 16) {
                f32x16 a = load<f32x16>(from + i) * scale * load<f32x16>(weight + i);
                f32x16 b = load<f32x16>(from + half + i) * scale * load<f32x16>(weight + half + i);
                store(to + i, a * load<f32x16>(c + i) - b * load<f32x16>(s + i));
                store(to + half + i, b * load<f32x16>(c + half + i) + a * load<f32x16>(s + half + i));
            }
            for (int64_t i = whole; i < half; i++) {
                const float a = from[i] * scale * weight[i], b = from[half + i] * scale * weight[half + i];
                to[i] = a * c[i] - b * s[i];
                to[half + i] = b * c[half + i] + a * s[half + i];
            }
        }
    }
}

// The entries of one instruction set, for every block type.
template <class Isa>
struct Entries {
    static int linear_of(int type, const uint8_t* weight, int64_t row_bytes, int64_t N, int64_t K, const float* x, int64_t M, float* out, int threads) {
        return with_type(type, [&](auto t) { linear<Isa>(t, weight, row_bytes, N, K, x, M, out, threads); });
    }
    static int gate_up_of(int type, const uint8_t* weight, int64_t I, int64_t D, const float* x, int64_t M, const Buckets& b, float* inner, int threads) {
        return with_type(type, [&](auto t) { gate_up<Isa>(t, weight, I, D, x, M, b, inner, threads); });
    }
    static int down_of(int type, const uint8_t* weight, int64_t E, int64_t I, int64_t D, const float* inner, int64_t M, const Buckets& b, float* out, int threads) {
        return with_type(type, [&](auto t) { down<Isa>(t, weight, E, I, D, inner, M, b, out, threads); });
    }
    static int dequantize_of(int type, const uint8_t* weight, int64_t row_bytes, int64_t K, const int64_t* rows, int64_t count, int half, void* out, int threads) {
        return with_type(type, [&](auto t) { dequantize<Isa>(t, weight, row_bytes, K, rows, count, half, out, threads); });
    }
    static int mix_of(int type, const uint8_t* weight, int64_t row_bytes, int64_t n, int64_t D, const float* weights, int64_t M, const float* decay, float* soft, int threads) {
        return with_type(type, [&](auto t) { mix<Isa>(t, weight, row_bytes, n, D, weights, M, decay, soft, threads); });
    }
    static double peak_of(int threads) {
        double rate = 0;
#pragma omp parallel num_threads(threads) reduction(+ : rate)
        {
            Isa::peak(1 << 20);
            double began = omp_get_wtime();
            double work = Isa::peak(1 << 24);
            rate = work / (omp_get_wtime() - began);
        }
        return rate;
    }
    static constexpr Table table(const char* name, void (*attend)(const Attention&, float*, int) = nullptr) {
        return {name, attend, linear_of, gate_up_of, down_of, dequantize_of, mix_of, head_tile, rms_norm, norm_rotate, peak_of};
    }
};

}  // namespace
