#include "exact.h"
#define RC_BITS 32
#include "exact.template.c"
#undef RC_BITS
#define RC_BITS 64
#include "exact.template.c"

const rc_exact_kernels RC_TABLE(rc_exact) = {&RC_NAME_F32(functions), &RC_NAME_F64(functions)};
