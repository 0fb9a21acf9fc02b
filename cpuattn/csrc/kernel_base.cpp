#define OMNISERVE_KERNEL_ISA kernel_base
#define OMNISERVE_KERNEL_NAME "base"
#include "kernel_impl.h"
