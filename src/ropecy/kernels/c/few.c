#include "few.h"
#define RC_BITS 32
#include "few.template.c"
#undef RC_BITS
#define RC_BITS 64
#include "few.template.c"

const rc_few_kernels RC_TABLE(rc_few) = {
    PART,
    {RC_NAME_F32(few_partial_size), RC_NAME_F32(few_workspace), RC_NAME_F32(few_of_parts), RC_NAME_F32(few_far),
     RC_NAME_F32(few_merge)},
    {RC_NAME_F64(few_partial_size), RC_NAME_F64(few_workspace), RC_NAME_F64(few_of_parts), RC_NAME_F64(few_far),
     RC_NAME_F64(few_merge)},
    {RC_NAME_F32(few_partial_size), RC_NAME_F32(few_float16_workspace), RC_NAME_F32(few_float16_of_parts),
     RC_NAME_F32(few_float16_far), RC_NAME_F32(few_merge)},
    {RC_NAME_F32(few_partial_size), RC_NAME_F32(few_bfloat16_workspace), RC_NAME_F32(few_bfloat16_of_parts),
     RC_NAME_F32(few_bfloat16_far), RC_NAME_F32(few_merge)},
};
