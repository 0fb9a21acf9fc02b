#define OMNISERVE_KERNEL_ISA kernel_v4
#include "kernel_impl.h"
