#define OMNISERVE_KERNEL_ISA kernel_v3
#include "dense_impl.h"
