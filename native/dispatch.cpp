// Which instruction set runs, and the parts that need none: sorting tokens by expert, checking arguments.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "tables.h"

#if defined(DG_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef DG_X86
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// CPUID leaf 7 and its first subleaf: not every compiler has names for these.
bool leaf7(unsigned subleaf, int reg, int bit) {
    unsigned r[4] = {};
    __asm__("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(7), "c"(subleaf));
    return r[reg] >> bit & 1;
}

bool has_avxvnni() { return has_avx2() && leaf7(1, 0, 4); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

bool has_avx512bf16() { return has_avx512() && leaf7(1, 0, 5); }

bool has_amx() {
#if defined(DG_EMULATE_AMX)
    return has_avx512bf16();
#elif defined(__linux__)
    if (!has_avx512bf16() || !leaf7(0, 3, 24) || !leaf7(0, 3, 25)) return false;
    // The kernel gives a process the tiles' memory on demand: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif

struct Choice {
    const Table* table;
    bool works;
};

const std::vector<Choice>& choices() {
    static const std::vector<Choice> all = {
#ifdef DG_X86
        {&DG_AMX, has_amx()}, {&DG_AVX512BF16, has_avx512bf16()}, {&DG_AVX512, has_avx512()},
        {&DG_AVXVNNI, has_avxvnni()}, {&DG_AVX2, has_avx2()},
#endif
        {&DG_PORTABLE, true}};
    return all;
}

std::atomic<const Table*> chosen{nullptr};

const Table* table() {
    const Table* now = chosen.load(std::memory_order_relaxed);
    if (now) return now;
    for (const Choice& choice : choices())
        if (choice.works) {
            chosen.store(choice.table, std::memory_order_relaxed);
            return choice.table;
        }
    return &DG_PORTABLE;
}

// The types with a codebook, its bytes, and where it is kept for good.
struct Grid {
    int type;
    int64_t bytes;
    std::atomic<const uint32_t*> words{nullptr};
    Grid(int type, int64_t bytes) : type(type), bytes(bytes) {}
};

Grid grids[] = {{16, 2048}, {17, 4096}, {18, 1024}, {19, 16384}, {21, 2048}, {22, 8192}, {29, 16384}};

}  // namespace

const uint32_t* grid_of(int type) {
    for (const Grid& grid : grids)
        if (grid.type == type) return grid.words.load(std::memory_order_acquire);
    return nullptr;
}

extern "C" {

int dg_grid(int type, const uint8_t* numbers, int64_t count) {
    for (Grid& grid : grids) {
        if (grid.type != type || grid.bytes != count) continue;
        if (grid.words.load(std::memory_order_acquire)) return 0;
        uint32_t* copy = (uint32_t*)malloc(count);
        if (!copy) return -1;
        memcpy(copy, numbers, count);
        const uint32_t* none = nullptr;
        if (!grid.words.compare_exchange_strong(none, copy)) free(copy);  // another thread was faster
        return 0;
    }
    return -1;
}

int dg_abi(void) { return DG_ABI; }

const char* dg_available(void) {
    static const std::string names = [] {
        std::string list;
        for (const Choice& choice : choices())
            if (choice.works) list += (list.empty() ? "" : " ") + std::string(choice.table->name);
        return list;
    }();
    return names.c_str();
}

const char* dg_current(void) { return table()->name; }

int dg_use(const char* name) {
    for (const Choice& choice : choices())
        if (choice.works && !strcmp(choice.table->name, name)) {
            chosen.store(choice.table, std::memory_order_relaxed);
            return 0;
        }
    return -1;
}

int dg_linear(int type, const uint8_t* weight, int64_t row_bytes, int64_t N, int64_t K, const float* x, int64_t M,
              float* out, int threads) {
    if (M < 0 || N < 0 || K < 0 || threads < 1) return -1;
    if (!M || !N) return 0;
    return table()->linear(type, weight, row_bytes, N, K, x, M, out, threads);
}

int dg_expert_mlp(int gate_up_type, const uint8_t* gate_up, int down_type, const uint8_t* down, int64_t E, int64_t I,
                  int64_t D, const float* x, int64_t M, const int64_t* experts, const float* weights, int64_t top_k,
                  float* out, int threads) {
    if (M < 0 || E < 1 || top_k < 0 || threads < 1) return -1;
    if (!M) return 0;
    const int64_t slots = M * top_k;
    for (int64_t i = 0; i < slots; i++)
        if (experts[i] < 0 || experts[i] >= E) return -1;
    std::vector<int64_t> first(E + 1);
    for (int64_t i = 0; i < slots; i++) first[experts[i] + 1]++;
    for (int64_t e = 0; e < E; e++) first[e + 1] += first[e];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    std::vector<int32_t> token(slots), busiest;
    std::vector<float> weight(slots);
    for (int64_t i = 0; i < slots; i++) {
        const int64_t slot = next[experts[i]]++;
        token[slot] = (int32_t)(i / top_k), weight[slot] = weights[i];
    }
    auto rows = [&](int64_t e) { return first[e + 1] - first[e]; };
    for (int64_t e = 0; e < E; e++)
        if (rows(e)) busiest.push_back((int32_t)e);
    std::stable_sort(busiest.begin(), busiest.end(), [&](int32_t a, int32_t b) { return rows(a) > rows(b); });
    const int64_t most = busiest.empty() ? 1 : rows(busiest[0]);
    const Buckets buckets{token.data(), weight.data(), first.data(), busiest.data(), (int64_t)busiest.size(), most};
    std::vector<float> inner;
    try {
        inner.resize(slots * I);
    } catch (const std::bad_alloc&) {
        return -1;
    }
    const Table* t = table();
    const int done = t->gate_up(gate_up_type, gate_up, I, D, x, M, buckets, inner.data(), threads);
    return done ? done : t->down(down_type, down, E, I, D, inner.data(), M, buckets, out, threads);
}

int dg_dequantize(int type, const uint8_t* weight, int64_t row_bytes, int64_t K, const int64_t* rows, int64_t n,
                  int half, void* out, int threads) {
    if (n < 0 || K < 0 || threads < 1) return -1;
    return n ? table()->dequantize(type, weight, row_bytes, K, rows, n, half, out, threads) : 0;
}

int dg_mix(int type, const uint8_t* weight, int64_t row_bytes, int64_t n, int64_t D, const float* weights, int64_t M,
           const float* decay, float* soft, int threads) {
    if (n < 0 || D < 0 || M < 0 || threads < 1) return -1;
    return M && D ? table()->mix(type, weight, row_bytes, n, D, weights, M, decay, soft, threads) : 0;
}

int dg_head_tile(const HeadTile* tile, float* scores, int threads) {
    if (tile->M < 0 || tile->n < 1 || threads < 1) return -1;
    table()->head_tile(*tile, scores, threads);
    return 0;
}

int dg_rms_norm(const float* x, int64_t rows, int64_t width, const float* weight, float eps, const float* residual,
                float* out, int threads) {
    if (rows < 0 || width < 1 || threads < 1) return -1;
    table()->rms_norm(x, rows, width, weight, eps, residual, out, threads);
    return 0;
}

int dg_norm_rotate(const float* x, int64_t tokens, int64_t heads, int64_t dim, const float* weight, float eps,
                   const float* cos, const float* sin, float* out, int threads) {
    if (tokens < 0 || heads < 0 || dim < 2 || dim % 2 || threads < 1) return -1;
    table()->norm_rotate(x, tokens, heads, dim, weight, eps, cos, sin, out, threads);
    return 0;
}

int dg_attend(const Attention* attention, float* out, int threads) {
    const Table* now = table();
    if (!now->attend || attention->dim % 32 || attention->rows < 0 || attention->heads < 0 || threads < 1) return -1;
    now->attend(*attention, out, threads);
    return 0;
}

double dg_peak(int threads) { return table()->peak(threads); }

}
