// Convolutions of many states in one call. Inputs are rounded on the way, a few rows at a time, so that they stay in the
// cache. Sums of whole numbers are exact, so their order does not matter; they are scaled, and get their biases, before
// they are written.
#pragma once

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

#include "rounding.h"

// Channels are the last dimension of inputs and outputs. Sizes count pixels and channels.
struct Shape {
    int64_t samples, height, width, depth, out_height, out_width, out_depth, kernel_height, kernel_width, down, across,
        padding_height, padding_width, dilation_height, dilation_width, pitch;
};
// A state that is rounded: the address of its first value, values from pixel to pixel, and the range of its products.
struct Input { int64_t address, step, first, last; };
// A product of it: the addresses of the result, of the weight, of the sum of the weights of each channel, of what sums
// are multiplied with, and of the bias. The last four are filled up to a multiple of LANES channels.
struct Product { int64_t out, weight, sums, scale, bias; };

typedef int8_t Bytes __attribute__((vector_size(4 * LANES)));

// Whether products of bytes are faster than those of floats here.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
enum { FAST_BYTES = 1 };
#else
enum { FAST_BYTES = 0 };
#endif
// The most accumulators that fit into the registers of the processor, beside weights.
#if defined(__AVX512F__)
enum { PIXELS = 8, VECTORS = 3 };
#else
enum { PIXELS = 4, VECTORS = 1 };
#endif

// sum[i] + the products of four bytes of x, without sign, with the four bytes i of w.
static inline Ints add_products(Ints sum, int32_t x, Bytes w) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
#elif defined(__AVXVNNI__)
    __m256i half[2], weight[2];
    memcpy(half, &sum, sizeof sum);
    memcpy(weight, &w, sizeof w);
    for (int k = 0; k < 2; k++) half[k] = _mm256_dpbusd_avx_epi32(half[k], _mm256_set1_epi32(x), weight[k]);
    memcpy(&sum, half, sizeof sum);
    return sum;
#else
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < 4; k++) sum[i] += (int32_t)(uint8_t)(x >> 8 * k) * w[4 * i + k];
    return sum;
#endif
}

static inline Floats add_product(Floats sum, Floats x, Floats w) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#else
    return sum + x * w;  // exact, so it makes no difference
#endif
}

template <typename T> static inline T at(int64_t address, int64_t index) {
    T v;
    memcpy(&v, (const char*)address + index * sizeof v, sizeof v);
    return v;
}

// The first n of LANES channels of a result, scaled and with their biases; all of them if n is larger.
static inline void finish(Floats sum, const Product& to, int64_t channel, float* out, int64_t n) {
    const Floats v = sum * at<Floats>(to.scale, channel / LANES) + at<Floats>(to.bias, channel / LANES);
    if (n >= LANES) {
        memcpy(out, &v, sizeof v);
        return;
    }
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(out, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    for (int64_t i = 0; i < n; i++) out[i] = v[i];
#endif
}

// Products of bytes: some pixels of a row, times some vectors of output channels. The weight lies as
// (vectors, kernel height, quads of a row of the kernel, LANES channels, 4).
template <int pixels, int vectors>
static inline void multiply_tile(const Shape& s, const uint8_t* const* rows, int64_t pixel, const Product& to,
                                 int64_t vector, int32_t zero, float* out) {
    const int64_t quads = (s.kernel_width * s.depth + 3) / 4, block = s.kernel_height * quads, step = s.across * s.depth;
    Ints sum[pixels][vectors];
    for (int k = 0; k < vectors; k++) {
        const Ints start = at<Ints>(to.sums, vector + k) * -zero;
        for (int p = 0; p < pixels; p++) sum[p][k] = start;
    }
    int64_t at_weight = vector * block;
    for (int64_t row = 0; row < s.kernel_height; row++) {
        const uint8_t* x = rows[row] + pixel * step;
        for (int64_t q = 0; q < quads; q++, x += 4, at_weight++) {
            Bytes weight[vectors];
            for (int k = 0; k < vectors; k++) weight[k] = at<Bytes>(to.weight, at_weight + k * block);
            for (int p = 0; p < pixels; p++) {
                int32_t four;
                memcpy(&four, x + p * step, sizeof four);
                for (int k = 0; k < vectors; k++) sum[p][k] = add_products(sum[p][k], four, weight[k]);
            }
        }
    }
    for (int p = 0; p < pixels; p++)
        for (int k = 0; k < vectors; k++) {
            const int64_t channel = (vector + k) * LANES;
            finish(__builtin_convertvector(sum[p][k], Floats), to, channel, out + (pixel + p) * s.out_depth + channel,
                   s.out_depth - channel);
        }
}

template <int pixels>
static inline void multiply_pixels(const Shape& s, const uint8_t* const* rows, int64_t pixel, const Product& to,
                                   int32_t zero, float* out) {
    const int64_t count = (s.out_depth + LANES - 1) / LANES;
    int64_t v = 0;
    for (; v + VECTORS <= count; v += VECTORS) multiply_tile<pixels, VECTORS>(s, rows, pixel, to, v, zero, out);
    if (VECTORS > 2 && v + 2 <= count) multiply_tile<pixels, 2>(s, rows, pixel, to, v, zero, out), v += 2;
    if (v < count) multiply_tile<pixels, 1>(s, rows, pixel, to, v, zero, out);
}

// Products of floats, each channel of the input with its weight, which lies as (kernel height, kernel width, channels).
template <int pixels>
static inline void multiply_pixels(const Shape& s, const float* const* rows, int64_t pixel, const Product& to,
                                   int32_t, float* out) {
    const int64_t count = (s.depth + LANES - 1) / LANES, step = s.across * s.depth;
    // Each value of a row takes part in three sums, so it is read once for them.
    const bool three = s.kernel_width == 3 && s.across == 1 && s.dilation_width == 1;
    for (int64_t v = 0; v < count; v++) {
        Floats sum[pixels] = {};
        int64_t tap = v;
        for (int64_t row = 0; row < (three ? s.kernel_height : 0); row++, tap += 3 * count) {
            const float* x = rows[row] + pixel * step + v * LANES;
            const Floats weight[3] = {at<Floats>(to.weight, tap), at<Floats>(to.weight, tap + count),
                                      at<Floats>(to.weight, tap + 2 * count)};
            _Pragma("GCC unroll 10") for (int i = 0; i < pixels + 2; i++) {
                Floats value;
                memcpy(&value, x + i * step, sizeof value);
                if (i < pixels) sum[i] = add_product(sum[i], value, weight[0]);
                if (i >= 1 && i <= pixels) sum[i - 1] = add_product(sum[i - 1], value, weight[1]);
                if (i >= 2) sum[i - 2] = add_product(sum[i - 2], value, weight[2]);
            }
        }
        for (int64_t row = 0; row < (three ? 0 : s.kernel_height); row++)
            for (int64_t column = 0; column < s.kernel_width; column++, tap += count) {
                const float* x = rows[row] + column * s.dilation_width * s.depth + pixel * step + v * LANES;
                const Floats weight = at<Floats>(to.weight, tap);
                for (int p = 0; p < pixels; p++) {
                    Floats value;
                    memcpy(&value, x + p * step, sizeof value);
                    sum[p] = add_product(sum[p], value, weight);
                }
            }
        for (int p = 0; p < pixels; p++)
            finish(sum[p], to, v * LANES, out + (pixel + p) * s.depth + v * LANES, s.depth - v * LANES);
    }
}

// The pixels that are left at the end of a row, at most `most`.
template <int most, typename Value>
static inline void multiply_rest(const Shape& s, const Value* const* rows, int64_t pixel, const Product& to,
                                 int32_t zero, float* out) {
    if (s.out_width - pixel == most) multiply_pixels<most>(s, rows, pixel, to, zero, out);
    else if constexpr (most > 1) multiply_rest<most - 1>(s, rows, pixel, to, zero, out);
}

// The rows of an input that a row of the output needs, rounded. `pitch` values are kept of a row, with its padding, and
// after them a row of padding alone.
template <int mode, typename Value>
static int32_t convolve(const Shape& s, const Input& input, const Product* products, const float* numbers,
                        const float* alpha, const float* beta, Value* kept) {
    const int64_t span = (s.kernel_height - 1) * s.dilation_height + 1;
    const int32_t zero = sizeof(Value) == 1 ? (int32_t)(numbers[ZERO] + numbers[STEP]) : 0;
    const int64_t left = s.padding_width * s.depth, right = left + s.width * s.depth;
    for (int64_t row = 0; row <= span; row++) {
        Value* to = kept + row * s.pitch;
        for (int64_t i = 0; i < (row < span ? left : right); i++) to[i] = (Value)zero;
        for (int64_t i = right; i < s.pitch; i++) to[i] = (Value)zero;
    }
    const bool dense = input.step == s.depth;
    int32_t has_nan = 0;
    for (int64_t sample = 0; sample < s.samples; sample++) {
        int64_t next = 0;  // the first row that is not rounded
        const float* in = (const float*)input.address + sample * s.height * s.width * input.step;
        for (int64_t y = 0; y < s.out_height; y++) {
            const int64_t top = y * s.down - s.padding_height, end = top + span < s.height ? top + span : s.height;
            for (next = next < top ? top : next; next < end; next++) {
                const float* source = in + next * s.width * input.step;
                Value* target = kept + next % span * s.pitch + s.padding_width * s.depth;
                const int64_t length = dense ? s.width * s.depth : s.depth;
                for (int64_t n = 0; n < s.width * s.depth; n += length, source += input.step, target += length)
                    has_nan |= round_row<mode>(source, target, length, numbers, alpha, beta);
            }
            const Value* rows[s.kernel_height];
            for (int64_t k = 0; k < s.kernel_height; k++) {
                const int64_t row = top + k * s.dilation_height;
                rows[k] = kept + (row < 0 || row >= s.height ? span : row % span) * s.pitch;
            }
            for (int64_t p = input.first; p < input.last; p++) {
                float* out = (float*)products[p].out + (sample * s.out_height + y) * s.out_width * s.out_depth;
                int64_t x = 0;
                for (; x + PIXELS <= s.out_width; x += PIXELS)
                    multiply_pixels<PIXELS>(s, rows, x, products[p], zero, out);
                multiply_rest<PIXELS - 1>(s, rows, x, products[p], zero, out);
            }
        }
    }
    return has_nan;
}

template <int mode>
static int32_t convolve_all(const Shape& s, int64_t inputs, const Input* input, const Product* products,
                            const float* numbers, const float* alpha, const float* beta, int32_t bytes, void* kept) {
    int32_t has_nan = 0;
    for (int64_t i = 0; i < inputs; i++, numbers += NUMBERS)
        has_nan |= bytes ? convolve<mode>(s, input[i], products, numbers, alpha, beta, (uint8_t*)kept)
                         : convolve<mode>(s, input[i], products, numbers, alpha, beta, (float*)kept);
    return has_nan;
}
