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

// GCC keeps vectors that are wider than a register in memory, and compares them lane by lane. So inner loops go register
// by register, and so do comparisons. The order of the additions of a lane does not depend on it.
#if defined(__AVX512F__)
enum { REGISTER_BYTES = 64 };
#elif defined(__AVX__)
enum { REGISTER_BYTES = 32 };
#else
enum { REGISTER_BYTES = 16 };
#endif
enum { REGISTERS = 4 * LANES / REGISTER_BYTES, WIDTH = LANES / REGISTERS };
typedef float Register __attribute__((vector_size(REGISTER_BYTES)));
typedef int32_t IntRegister __attribute__((vector_size(REGISTER_BYTES)));

static inline Register every(float value) { return value - (Register){}; }
static inline Register register_at(const float* p) {
    Register v;
    memcpy(&v, p, sizeof v);
    return v;
}

// A mask: all ones where the comparison holds, else zeros. With NaN none holds.
#define COMPARISON(name, op)                                                                   \
    static inline Ints name(Floats a, Floats b) {                                              \
        Register x[REGISTERS], y[REGISTERS];                                                   \
        IntRegister masks[REGISTERS];                                                          \
        Ints result;                                                                           \
        memcpy(x, &a, sizeof a);                                                               \
        memcpy(y, &b, sizeof b);                                                               \
        for (int i = 0; i < REGISTERS; i++) masks[i] = (IntRegister)(x[i] op y[i]);            \
        memcpy(&result, masks, sizeof result);                                                 \
        return result;                                                                         \
    }
COMPARISON(above, >)
COMPARISON(below, <)
COMPARISON(at_most, <=)
#undef COMPARISON

// The lanes of `yes` where the mask is all ones, those of `no` where it is zero.
static inline Floats choose(Ints mask, Floats yes, Floats no) {
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

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
