// Elementwise operations, batch norms and pooling, forward and backward.
#pragma once

#include <math.h>

#include "network.h"

namespace {

template <bool first, bool rectify, bool second>
void activate(const Operation& op, const float* in, int64_t in_stride, float* out, int64_t stride, int64_t n) {
    const Grid a = op.first, b = op.second;
    for (int64_t r = 0; r < op.channels * op.positions; r++, in += in_stride, out += stride)
        for (int64_t s = 0; s < n; s++) {
            float v = first ? on_grid(in[s], a) : in[s];
            v = rectify && v < 0.0f ? 0.0f : v;
            out[s] = second ? on_grid(v, b) : v;
        }
}

// The straight-through estimator: the gradient passes where the value is inside the range, and is 0 where it is
// clipped.
template <bool first, bool rectify, bool second>
void activate_back(const Operation& op, const float* in, int64_t in_stride, const float* up, float* down,
                   int64_t stride, int64_t n) {
    const Grid a = op.first, b = op.second;
    const float keep = op.adds == 1 ? 1.0f : 0.0f;
    for (int64_t r = 0; r < op.channels * op.positions; r++, in += in_stride, up += stride, down += stride)
        for (int64_t s = 0; s < n; s++) {
            bool passes = !first || inside(in[s], a);
            float v = first ? on_grid(in[s], a) : in[s];
            passes &= !rectify || v > 0.0f;
            v = rectify && v < 0.0f ? 0.0f : v;
            passes &= !second || inside(v, b);
            const float g = passes ? up[s] : 0.0f;
            down[s] = keep ? down[s] + g : g;
        }
}

#define BY_GRIDS(f, ...)                                                                             \
    do {                                                                                             \
        const bool a = op.first.scale != 0, r = op.rectify != 0, b = op.second.scale != 0;           \
        if (a && r && b) f<true, true, true>(__VA_ARGS__);                                           \
        else if (a && r) f<true, true, false>(__VA_ARGS__);                                          \
        else if (a && b) f<true, false, true>(__VA_ARGS__);                                          \
        else if (a) f<true, false, false>(__VA_ARGS__);                                              \
        else if (r && b) f<false, true, true>(__VA_ARGS__);                                          \
        else if (r) f<false, true, false>(__VA_ARGS__);                                              \
        else if (b) f<false, false, true>(__VA_ARGS__);                                              \
        else f<false, false, false>(__VA_ARGS__);                                                    \
    } while (0)

// low + slope * (x - low) below `low`, `high` above `high`; the slope is in `step`. Without bounds it copies.
void bend(const Operation& op, const float* in, int64_t in_stride, float* out, int64_t stride, int64_t n) {
    const float low = op.first.low, high = op.first.high, slope = op.first.step;
    // An infinite bound times 0 is no number.
    const float start = low == -INFINITY ? 0.0f : low;
    for (int64_t r = 0; r < op.channels * op.positions; r++, in += in_stride, out += stride)
        for (int64_t s = 0; s < n; s++) {
            const float x = in[s], below = start + slope * (x - start);
            out[s] = x < low ? below : x > high ? high : x;
        }
}

void bend_back(const Operation& op, const float* in, int64_t in_stride, const float* up, float* down, int64_t stride,
               int64_t n) {
    const float low = op.first.low, high = op.first.high, slope = op.first.step;
    const float keep = op.adds == 1 ? 1.0f : 0.0f;
    for (int64_t r = 0; r < op.channels * op.positions; r++, in += in_stride, up += stride, down += stride)
        for (int64_t s = 0; s < n; s++) {
            const float g = in[s] <= low ? slope * up[s] : in[s] >= high ? 0.0f : up[s];
            down[s] = keep ? down[s] + g : g;
        }
}

// Sum of f(vector, row of x, place) over the samples of a channel.
template <typename F> double over_channel(int64_t positions, int64_t n, F f) {
    double total = 0;
    for (int64_t p = 0; p < positions; p++) {
        Floats lanes = {};
        for (int64_t s = 0; s < n; s += LANES) lanes += only(f(p, s), exist(s, n));
        total += sum(lanes);
    }
    return total;
}

void norm(const Operation& op, const Member& m, const float* in, int64_t in_stride, float* out, int64_t stride,
          int64_t n, float* scratch, bool train) {
    float *saved = scratch + op.scratch, *running = m.buffers + op.state;
    const double count = double(n) * op.positions;
    for (int64_t c = 0; c < op.channels; c++, in += op.positions * in_stride, out += op.positions * stride) {
        float mean = running[c], variance = running[op.channels + c];
        if (train) {
            mean = over_channel(op.positions, n, [&](int64_t p, int64_t s) { return at(in + p * in_stride + s); }) / count;
            const double squares = over_channel(op.positions, n, [&](int64_t p, int64_t s) {
                Floats d = at(in + p * in_stride + s) - mean;
                return d * d;
            });
            variance = squares / count;
            running[c] += op.momentum * (mean - running[c]);
            running[op.channels + c] += op.momentum * (float(squares / (count - 1)) - running[op.channels + c]);
        }
        const float inverse = 1.0f / sqrtf(variance + op.epsilon);
        const float w = op.weight >= 0 ? m.values[op.weight + c] : 1.0f;
        const float b = op.bias >= 0 ? m.values[op.bias + c] : 0.0f;
        saved[c] = mean;
        saved[op.channels + c] = inverse;
        const float scale = w * inverse;
        for (int64_t p = 0; p < op.positions; p++)
            for (int64_t s = 0; s < ceil_div(n, LANES) * LANES; s++)
                out[p * stride + s] = (in[p * in_stride + s] - mean) * scale + b;
    }
}

void norm_back(const Operation& op, const Member& m, const float* in, int64_t in_stride, const float* up, float* down,
               int64_t stride, int64_t n, const float* scratch, float* parameter_gradients) {
    const float* saved = scratch + op.scratch;
    const double count = double(n) * op.positions;
    for (int64_t c = 0; c < op.channels; c++) {
        const float mean = saved[c], inverse = saved[op.channels + c];
        const double total = over_channel(op.positions, n, [&](int64_t p, int64_t s) { return at(up + p * stride + s); });
        const double along = over_channel(op.positions, n, [&](int64_t p, int64_t s) {
            return at(up + p * stride + s) * ((at(in + p * in_stride + s) - mean) * inverse);
        });
        if (op.weight >= 0) parameter_gradients[op.weight + c] += along;
        if (op.bias >= 0) parameter_gradients[op.bias + c] += total;
        if (op.adds >= 0) {
            const float scale = (op.weight >= 0 ? m.values[op.weight + c] : 1.0f) * inverse;
            const float shift = total / count, tilt = along / count * inverse;
            for (int64_t p = 0; p < op.positions; p++)
                for (int64_t s = 0; s < n; s += LANES) {
                    Floats x = at(in + p * in_stride + s), g = at(up + p * stride + s);
                    Floats d = only((g - shift - (x - mean) * tilt) * scale, exist(s, n));
                    float* to = down + p * stride + s;
                    put(to, op.adds == 1 ? at(to) + d : d);
                }
            down += op.positions * stride;
        }
        in += op.positions * in_stride;
        up += op.positions * stride;
    }
}

// -- pooling: the lists hold the positions of the input in each window

void pool(const Operation& op, const float* in, int64_t in_stride, float* out, int64_t stride, int64_t n) {
    for (int64_t c = 0; c < op.channels; c++)
        for (int64_t p = 0; p < op.positions; p++, out += stride) {
            const int32_t begin = op.forward.starts[p], end = op.forward.starts[p + 1];
            for (int32_t e = begin; e < end; e++) {
                const float* x = in + (c * op.positions_in + op.forward.pairs[2 * e + 1]) * in_stride;
                for (int64_t s = 0; s < n; s++) {
                    if (op.kind == MEAN) out[s] = (e == begin ? 0.0f : out[s]) + x[s] / (end - begin);
                    else out[s] = e == begin || x[s] > out[s] || x[s] != x[s] ? x[s] : out[s];
                }
            }
        }
}

// The gradient of a maximum goes to the first of equal values. The caller sets `down` to zero where it is not added to.
void pool_back(const Operation& op, const float* in, int64_t in_stride, const float* out, const float* up, float* down,
               int64_t stride, int64_t n, float* left) {
    for (int64_t c = 0; c < op.channels; c++)
        for (int64_t p = 0; p < op.positions; p++, out += stride, up += stride) {
            const int32_t begin = op.forward.starts[p], end = op.forward.starts[p + 1];
            memcpy(left, up, n * sizeof(float));
            for (int32_t e = begin; e < end; e++) {
                const int64_t row = c * op.positions_in + op.forward.pairs[2 * e + 1];
                const float* x = in + row * in_stride;
                float* d = down + row * stride;
                for (int64_t s = 0; s < n; s++) {
                    const bool largest = op.kind == LARGEST && x[s] == out[s];
                    d[s] += op.kind == MEAN ? up[s] / (end - begin) : largest ? left[s] : 0.0f;
                    left[s] = largest ? 0.0f : left[s];
                }
            }
        }
}

}  // namespace
