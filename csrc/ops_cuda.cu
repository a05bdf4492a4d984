// The CUDA kernels' registrations, nothing else.
#define RLHF_DEVICE_CODE
#include "direct.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CUDA, m) { RLHF_FAST_KERNELS(m, cuda); }
RLHF_FAST_DIRECT(kCuda, cuda);
