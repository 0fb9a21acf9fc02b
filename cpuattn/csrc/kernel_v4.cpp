#define OMNISERVE_KERNEL_ISA kernel_v4
#define OMNISERVE_KERNEL_NAME "x86-64-v4"
#include "kernel_impl.h"
