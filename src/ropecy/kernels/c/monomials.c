#include "monomials.h"
#define RC_BITS 32
#include "monomials.template.c"
#undef RC_BITS
#define RC_BITS 64
#include "monomials.template.c"
#include "decode.template.h" /* in float64 alone: a state has no end of tokens to sum */

const rc_monomials_kernels RC_TABLE(rc_monomials) = {
    &RC_NAME_F32(functions),
    &RC_NAME_F64(functions),
    RC_NAME_F64(step_workspace),
    RC_NAME_F64(step),
    RC_NAME_F64(add_block),
};
