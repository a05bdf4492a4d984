// The registry: every schema, and the CPU kernels.
#include "direct.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(rlhf_fast, m) { RLHF_FAST_SCHEMAS(m); }
STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { RLHF_FAST_KERNELS(m, cpu); }
RLHF_FAST_DIRECT(kCpu, cpu);
