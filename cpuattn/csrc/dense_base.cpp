#define OMNISERVE_KERNEL_ISA kernel_base
#include "dense_impl.h"
