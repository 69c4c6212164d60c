#include "rows.h"
#define RC_BITS 32
#include "rows.template.c"
#undef RC_BITS
#define RC_BITS 64
#include "rows.template.c"

const rc_rows_kernels RC_TABLE(rc_rows) = {
    RC_NAME_F32(largest),
    RC_NAME_F64(largest),
    RC_NAME_F32(norm),
    RC_NAME_F64(norm),
    RC_NAME_F32(norms),
    RC_NAME_F64(norms),
    RC_NAME_F32(quadratic_workspace),
    RC_NAME_F64(quadratic_workspace),
    RC_NAME_F32(quadratic),
    RC_NAME_F64(quadratic),
    RC_NAME_F32(columns),
    RC_NAME_F64(columns),
};
