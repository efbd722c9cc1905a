// AVX-512 with VNNI: 64 multiply-adds an instruction. Compiled twice, with and without bfloat16.
#include "avx512.h"

namespace {

struct Avx512 : Avx512Words {};

template <class T>
struct Products<Avx512, T> {
    static constexpr int ROWS = 6;
    static void block(int rows, const Panel* panels, int groups, const int8_t* const* a, const int32_t* const* sums, const float* scale, float* out) {
        switch (rows) {
            case 1: return vnni512<T, 1>(panels, groups, a, sums, scale, out);
            case 2: return vnni512<T, 2>(panels, groups, a, sums, scale, out);
            case 3: return vnni512<T, 3>(panels, groups, a, sums, scale, out);
            case 4: return vnni512<T, 4>(panels, groups, a, sums, scale, out);
            case 5: return vnni512<T, 5>(panels, groups, a, sums, scale, out);
            default: return vnni512<T, 6>(panels, groups, a, sums, scale, out);
        }
    }
};

}  // namespace

#ifdef __AVX512BF16__
const Table DG_AVX512BF16 = Entries<Avx512>::table("avx512bf16", attend);
#else
const Table DG_AVX512 = Entries<Avx512>::table("avx512");
#endif
