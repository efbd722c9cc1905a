// What all x86 instruction sets share.
#pragma once
#include <immintrin.h>

#include "gemm.h"

namespace {

struct X86 {
    DG_INLINE int32_t sum_bytes(const int8_t* p, int count) {
        __m128i total = _mm_setzero_si128();
        for (int i = 0; i < count; i += 16)  // unsigned sums of x + 128
            total = _mm_add_epi64(total, _mm_sad_epu8(_mm_xor_si128(_mm_loadu_si128((const __m128i*)(p + i)), _mm_set1_epi8((char)0x80)), _mm_setzero_si128()));
        return _mm_cvtsi128_si32(total) + _mm_extract_epi32(total, 2) - 128 * count;
    }
};

}  // namespace
