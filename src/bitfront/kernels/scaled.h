// Rounding where the values of a block share a power of two, or all values have the same powers of two: multiples of a
// step, floating-point numbers, or powers of two. `scaled.py` says which and computes the same, to the last bit, with
// torch alone. Each value is a fixed sequence of single IEEE operations.
#pragma once

#include <stdint.h>
#include <string.h>

static inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float of_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The bits of |x|, which are in the order of the numbers; 0 for a NaN.
static inline int32_t magnitude(float x) {
    const int32_t bits = bits_of(x) & 0x7fffffff;
    return bits > 0x7f800000 ? 0 : bits;
}

// The largest power of two that is not above |x|: 0 for subnormal numbers, infinite for NaN.
static inline float binade(float x) { return of_bits(bits_of(x) & 0x7f800000); }

// The three ways in which the values of a block are rounded, and the numbers of one (`scaled.py`).
enum { MULTIPLES, FLOATS, POWERS };
enum { FACTOR, UNIT_LOW, UNIT_HIGH, UPWARD, SHARED, LOWEST, HIGHEST, END, FRACTION, LEAST };
enum { MOST_DIMS = 8, COLUMNS = 512 };

// The unit of a block: the power of two that the largest magnitude of its values says.
static inline float unit_of(int32_t largest, const float* f) {
    const float size = of_bits(largest > 0x7f7fffff ? 0x7f7fffff : largest), below = binade(size);
    float unit = (f[UPWARD] != 0 && size > below ? below * 2.0f : below) * f[FACTOR];
    unit = unit < f[UNIT_LOW] ? f[UNIT_LOW] : unit;
    unit = unit > f[UNIT_HIGH] ? f[UNIT_HIGH] : unit;
    return f[SHARED] != 0 ? unit : 1.0f;
}

// The least power of two of a block, from which all others are counted.
template <int way> static inline float lowest_of(float unit, const float* f) {
    const float lowest = unit * f[LOWEST];
    return way == FLOATS && lowest < f[LEAST] ? f[LEAST] : lowest;
}

// One value. MULTIPLES: a multiple of `lowest`, at most `end` of them. FLOATS: a multiple of the step of its binade,
// which has from `lowest` to `highest` as its power of two; at most `end`. POWERS: a power of two from `lowest` to
// `highest`, or 0. NaN stays NaN.
template <int way>
static inline float nearest(float x, float lowest, float highest, float end, float fraction) {
    if (way == POWERS) {
        const float size = of_bits(bits_of(x) & 0x7fffffff);
        float power = binade(x);
        power = size > power * 1.41421356237309492f ? power * 2.0f : power;
        const float kept = power > highest ? highest : power;
        const int32_t rounded = (power < lowest ? 0 : bits_of(kept)) | (bits_of(x) & (int32_t)0x80000000);
        return size == size ? of_bits(rounded) : x;
    }
    float step = lowest;
    if (way == FLOATS) {
        step = binade(x);
        step = step < lowest ? lowest : step;
        step = (step > highest ? highest : step) * fraction;
    }
    float v = __builtin_rintf(x / step);
    if (way == FLOATS) v *= step;
    v = v > end ? end : v;
    v = v < -end ? -end : v;
    return way == FLOATS ? v : v * step;
}

// Calls `f` with the place of each row of a block: one step along each of the first `last` dimensions.
template <typename F>
static inline void each_row(int last, const int64_t* extent, const int64_t* strides, int64_t place, const F& f) {
    int64_t at[MOST_DIMS] = {};
    for (;;) {
        f(place);
        int d = last - 1;
        for (; d >= 0; d--) {
            place += strides[d];
            if (++at[d] < extent[d]) break;
            place -= at[d] * strides[d];
            at[d] = 0;
        }
        if (d < 0) return;
    }
}

// The blocks that lie side by side along the last dimension, whose values are neighbours in memory.
template <int way>
static void round_stripe(const float* in, float* out, int last, const int64_t* extent, const int64_t* strides,
                         int64_t place, int64_t length, int64_t block, const float* f) {
    const float fraction = f[FRACTION];
    for (int64_t start = 0, n; block > 1 && start < length; start += n) {
        n = block < length - start ? block : length - start;
        int32_t largest = 0;
        if (f[SHARED] != 0)
            each_row(last, extent, strides, place + start, [&](int64_t at) {
                const float* x = in + at;
                for (int64_t i = 0; i < n; i++) largest = magnitude(x[i]) > largest ? magnitude(x[i]) : largest;
            });
        const float unit = unit_of(largest, f), lowest = lowest_of<way>(unit, f);
        const float highest = unit * f[HIGHEST], end = way == MULTIPLES ? f[END] : unit * f[END];
        each_row(last, extent, strides, place + start, [&](int64_t at) {
            const float* __restrict x = in + at;
            float* __restrict y = out + at;
            for (int64_t i = 0; i < n; i++) y[i] = nearest<way>(x[i], lowest, highest, end, fraction);
        });
    }
    // Blocks of one value there: a block per column, many columns at a time.
    for (int64_t start = 0, n; block == 1 && start < length; start += n) {
        n = COLUMNS < length - start ? COLUMNS : length - start;
        int32_t largest[COLUMNS] = {};
        float lowest[COLUMNS], highest[COLUMNS], end[COLUMNS];
        each_row(last, extent, strides, place + start, [&](int64_t at) {
            const float* x = in + at;
            for (int64_t i = 0; i < n; i++) largest[i] = magnitude(x[i]) > largest[i] ? magnitude(x[i]) : largest[i];
        });
        for (int64_t i = 0; i < n; i++) {
            const float unit = unit_of(largest[i], f);
            lowest[i] = lowest_of<way>(unit, f);
            highest[i] = unit * f[HIGHEST];
            end[i] = way == MULTIPLES ? f[END] : unit * f[END];
        }
        each_row(last, extent, strides, place + start, [&](int64_t at) {
            const float* __restrict x = in + at;
            float* __restrict y = out + at;
            for (int64_t i = 0; i < n; i++) y[i] = nearest<way>(x[i], lowest[i], highest[i], end[i], fraction);
        });
    }
}

template <int way>
static void round_scaled(const float* in, float* out, int dims, const int64_t* sizes, const int64_t* strides,
                         const int64_t* blocks, const float* f) {
    const int last = dims - 1;
    int64_t first[MOST_DIMS] = {}, extent[MOST_DIMS];
    for (;;) {
        int64_t place = 0;
        for (int d = 0; d < last; d++) {
            place += first[d] * strides[d];
            extent[d] = blocks[d] < sizes[d] - first[d] ? blocks[d] : sizes[d] - first[d];
        }
        round_stripe<way>(in, out, last, extent, strides, place, sizes[last], blocks[last], f);
        int d = last - 1;
        for (; d >= 0; d--) {
            if ((first[d] += blocks[d]) < sizes[d]) break;
            first[d] = 0;
        }
        if (d < 0) return;
    }
}
