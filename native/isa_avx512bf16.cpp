#include "isa_avx512.cpp"  // the same code with bfloat16 switched on
