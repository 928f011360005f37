// How a row of values is rounded to a grid, after the batch norm that is pending, in one pass over memory.
#pragma once

#include "whole.h"

// How a pending batch norm is computed: there is none, or in the way in which torch computes it on this machine.
enum Affine { NONE = 0, SEPARATE = 1, FUSED = 2 };

template <int mode> static inline float affine(float x, const float* alpha, const float* beta, int64_t i) {
    if (mode == SEPARATE) return x * alpha[i] + beta[i];
    if (mode == FUSED) return __builtin_fmaf(x, alpha[i], beta[i]);
    return x;
}

// The seven numbers of a rounding.
enum { SCALE, LOW, HIGH, STEP, DIVISOR, ZERO, WAY, NUMBERS };

// With a step that is a power of two (DIVISOR is 0), out[i] = clamp(round(affine(in[i]) * SCALE), LOW, HIGH) * STEP.
// Otherwise out[i] = (clamp(round(affine(in[i]) / DIVISOR) + ZERO, LOW, HIGH) - ZERO) * STEP. NaN stays NaN; so the
// result is always 0.
template <int mode, int way>
static inline int32_t round_row_in(const float* __restrict in, float* __restrict out, int64_t n, const float* f,
                                   const float* __restrict alpha, const float* __restrict beta) {
    const float scale = f[SCALE], low = f[LOW], high = f[HIGH], step = f[STEP], divisor = f[DIVISOR], zero = f[ZERO];
    if (divisor == 0)
        for (int64_t i = 0; i < n; i++) {
            float v = whole<way>(affine<mode>(in[i], alpha, beta, i) * scale);
            v = v < low ? low : v;
            v = v > high ? high : v;
            out[i] = v * step;
        }
    else
        for (int64_t i = 0; i < n; i++) {
            float v = whole<way>(affine<mode>(in[i], alpha, beta, i) / divisor) + zero;
            v = v < low ? low : v;
            v = v > high ? high : v;
            out[i] = (v - zero) * step;
        }
    return 0;
}

// The codes themselves plus an offset (in the place of STEP), which must fit into a byte. A NaN does not fit: the result
// says whether there is one.
template <int mode, int way>
static inline int32_t round_row_in(const float* __restrict in, uint8_t* __restrict out, int64_t n, const float* f,
                                   const float* __restrict alpha, const float* __restrict beta) {
    const float scale = f[SCALE], low = f[LOW], high = f[HIGH], offset = f[STEP], divisor = f[DIVISOR], zero = f[ZERO];
    int32_t has_nan = 0;
    for (int64_t i = 0; i < n; i++) {
        const float x = affine<mode>(in[i], alpha, beta, i);
        float v = divisor == 0 ? whole<way>(x * scale) : whole<way>(x / divisor) + zero;
        has_nan |= v != v;
        v = v > low ? v : low;
        v = v < high ? v : high;
        out[i] = (uint8_t)(int32_t)(v + offset);
    }
    return has_nan;
}

// A row in the way that its numbers name.
template <int mode, typename Value>
static inline int32_t round_row(const float* in, Value* out, int64_t n, const float* f, const float* alpha,
                                const float* beta) {
    if (f[WAY] == EVEN) return round_row_in<mode, EVEN>(in, out, n, f, alpha, beta);
    if (f[WAY] == HALF_UP) return round_row_in<mode, HALF_UP>(in, out, n, f, alpha, beta);
    return round_row_in<mode, FLOOR>(in, out, n, f, alpha, beta);
}
