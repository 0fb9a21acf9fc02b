#define OMNISERVE_KERNEL_ISA kernel_v3
#define OMNISERVE_KERNEL_NAME "x86-64-v3"
#include "kernel_impl.h"
