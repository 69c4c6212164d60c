#include "monomials.h"
#define RC_BITS 32
#include "monomials.template.c"
#undef RC_BITS
#define RC_BITS 64
#include "monomials.template.c"

const rc_monomials_kernels RC_TABLE(rc_monomials) = {
    &RC_NAME_F32(functions),
    &RC_NAME_F64(functions),
};
