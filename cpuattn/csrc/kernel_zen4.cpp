#define OMNISERVE_KERNEL_ISA kernel_zen4
#define OMNISERVE_KERNEL_NAME "znver4"
#define OMNISERVE_KERNEL_ZEN4
#include "kernel_impl.h"
