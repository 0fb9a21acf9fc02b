#define OMNISERVE_KERNEL_ISA kernel_zen4
#define OMNISERVE_KERNEL_ZEN4
#include "dense_impl.h"
