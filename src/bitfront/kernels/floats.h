// Vectors of floats, and their exp and log, for everything that is compiled here. exp and log follow Moshier's Cephes
// (expf, logf): the relative error is below 2 ulp on the ranges used.
#pragma once

#include <stdint.h>
#include <string.h>

// Vectors of any width work; this one fills a register of AVX-512 and two of AVX2.
enum { LANES = 16 };
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));

static inline Floats all(float value) { return value - (Floats){}; }

// Nearest integer, half to even, for 0 <= |x| <= 2^22.
static inline Floats round_small(Floats x) { return (x + 12582912.0f) - 12582912.0f; }

// exp(x) for x <= 0; below -87 it is exp(-87), 1.6e-38, which adds nothing to a sum of at least 1. NaN stays NaN.
static inline Floats exp_nonpositive(Floats x) {
    x = x < -87.0f ? all(-87.0f) : x;
    Floats n = round_small(x * 1.44269504088896341f);
    Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    // Pairs instead of Horner's chain: the additions of a chain wait for each other.
    Floats r2 = r * r;
    Floats low = 5.0000001201e-1f + r * 1.6666665459e-1f;
    Floats middle = 4.1665795894e-2f + r * 8.3334519073e-3f;
    Floats high = 1.3981999507e-3f + r * 1.9875691500e-4f;
    Floats p = 1.0f + (r + r2 * (low + r2 * (middle + r2 * high)));
    // The integer of a NaN does not matter: p is NaN then, and stays NaN.
    return p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// log(x) for finite x >= 1. The caller replaces the result where x is NaN.
static inline Floats log_from_one(Floats x) {
    Ints bits = (Ints)x;
    Floats m = (Floats)((bits & 0x7fffff) | 0x3f800000);
    Ints high = m > 1.41421356237f;  // -1 where true
    m = high ? m * 0.5f : m;
    Floats e = __builtin_convertvector((bits >> 23) - 127 - high, Floats);
    Floats f = m - 1.0f;
    Floats z = f * f;
    Floats p = 7.0376836292e-2f * f + -1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f + -1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f + -1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f + -2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    Floats y = p * z * f + e * -2.12194440e-4f;
    return (f + (y - 0.5f * z)) + e * 0.693359375f;
}
