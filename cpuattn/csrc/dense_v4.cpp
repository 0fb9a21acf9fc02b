#define OMNISERVE_KERNEL_ISA kernel_v4
#include "dense_impl.h"
