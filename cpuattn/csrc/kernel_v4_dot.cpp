#define OMNISERVE_KERNEL_ISA kernel_v4_dot
#define OMNISERVE_KERNEL_NAME "x86-64-v4+bf16+vnni"
#include "kernel_impl.h"
