// Included first in a host file: the compiler must not fuse a multiplication and an addition into one
// operation with one rounding, whatever the command line says.
#pragma once

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
