// The profiler's start and stop do nothing here; cuda_runtime.h has them.
#include "cuda_runtime.h"
