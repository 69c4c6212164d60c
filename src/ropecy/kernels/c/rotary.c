/* Bound by memory at small widths: 8 bytes read and written per float32 coordinate pair, against ten multiply-adds. */
#include "rotary.h"

#define RC_BITS 32
#include "rotary.template.c"
#undef RC_BITS
#define RC_BITS 64
#include "rotary.template.c"

const rc_rotary_kernels RC_TABLE(rc_rotary) = {
    .rows_f32 = RC_PASTE3(rc_rotary_rows, _f32_, RC_LEVEL),
    .rows_f64 = RC_PASTE3(rc_rotary_rows, _f64_, RC_LEVEL),
};
