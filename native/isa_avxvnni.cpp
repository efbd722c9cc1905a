#include "isa_avx2.cpp"  // the same code with VNNI switched on
