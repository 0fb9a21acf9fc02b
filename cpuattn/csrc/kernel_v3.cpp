#define OMNISERVE_KERNEL_ISA kernel_v3
#include "kernel_impl.h"
