// How a number becomes a whole number; `whole.py` says what the ways are.
#pragma once

#include "floats.h"

// How a number becomes a whole number, in the order of ROUNDINGS in `whole.py`.
enum Way { EVEN, HALF_UP, FLOOR };

template <int way> static inline float whole(float v) {
    if (way == EVEN) return __builtin_rintf(v);
    const float below = __builtin_floorf(v);
    return way == FLOOR ? below : below + (v - below >= 0.5f ? 1.0f : 0.0f);
}
