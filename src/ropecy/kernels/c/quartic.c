#include "quartic.h"
#define RC_BITS 32
#include "quartic.template.c"
#undef RC_BITS
#define RC_BITS 64
#include "quartic.template.c"

const rc_quartic_kernels RC_TABLE(rc_quartic) = {&RC_NAME_F32(quartic_functions), &RC_NAME_F64(quartic_functions)};
