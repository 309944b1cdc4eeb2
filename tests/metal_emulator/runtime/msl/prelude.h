// All that stands before a kernel's own texts; in angle brackets, since to the pass for Metal's rules these are system
// headers.
#pragma once

#include <attributes.h>
#include <mlx.h>
