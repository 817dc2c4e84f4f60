/* Compile what follows for PM_TARGET, whatever the command line says. */
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#define PM_PRAGMA(text) _Pragma(#text)
#define PM_TARGET_PRAGMA(text) PM_PRAGMA(text)
#if defined(__clang__)
PM_TARGET_PRAGMA(clang attribute push(__attribute__((target(PM_TARGET))), apply_to = function))
#else
#pragma GCC push_options
PM_TARGET_PRAGMA(GCC target(PM_TARGET))
#endif
