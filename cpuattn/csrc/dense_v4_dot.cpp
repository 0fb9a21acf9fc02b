#define OMNISERVE_KERNEL_ISA kernel_v4_dot
#include "dense_impl.h"
