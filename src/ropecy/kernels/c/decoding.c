#include "decoding.h"

#define RC_BITS 64 /* alone: a state has no end of tokens to sum */
#include "simd.h"
#include "product.template.h"
#include "fold.template.h"
#include "exp2.template.h"
#include "row_features.template.h"
#include "update.template.h"
#include "decode.template.h"
#include "leave.template.h"

const rc_decoding_kernels RC_TABLE(rc_decoding) = {
    RC_NAME(step_workspace),
    RC_NAME(step),
    RC_NAME(leave_workspace),
    RC_NAME(leave),
    RC_NAME(add_block),
};
