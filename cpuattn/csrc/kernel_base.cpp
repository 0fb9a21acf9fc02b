#define OMNISERVE_KERNEL_ISA kernel_base
#include "kernel_impl.h"
