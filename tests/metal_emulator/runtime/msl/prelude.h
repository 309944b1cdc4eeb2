// All that stands before a kernel's own texts; in angle brackets, since the pass for Metal's rules takes them as system headers.
#pragma once

#include <attributes.h>
#include <mlx.h>
