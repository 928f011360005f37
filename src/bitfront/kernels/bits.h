// Roundings and products whose bits are learned: a number of fractional bits per value, in the parameters.
//
// A learned rounding (ROUND) has F fractional and I integer bits per row, or for groups of rows. Its values are
// multiples of 2^-F from -(2^I - 2^-F), or from 0 after a ReLU, to 2^I - 2^-F; with I + F <= 0 bits only 0 is left. A
// learned product (SPARSE) has lists of its live weights. A weight is rounded to a multiple of 2^-F. Its integer bits
// follow from its value, so it never saturates. Counts of bits have no sign bit.
//
// Inputs are rounded half to even, half up or down, as the operation says; parameters half to even, since they are
// rounded once and for all. The gradients are the same.
//
// Where only some widths are supported, the next one at or above the learned width is taken, and the bits that are left
// over become fractional ones; above the largest one fractional bits are lost. Gradients pass straight through this,
// and nothing presses on values that have the smallest width.
//
// Gradients: straight through for values; d q / d F = ln 2 (x - q) where nothing saturates, and for saturated values
// those of the largest number, ln 2 2^-F and ln 2 2^I (Sun et al. 2024, arXiv:2405.00645).
#pragma once

#include <math.h>

#include "network.h"

namespace {

// What the bits cost: `pairs` per product of a bit of an input with a bit of a weight, `stored` per bit of a weight,
// `biases` per bit of a bias: once where it is stored, once per output that it is added to where products cost.
struct Pressure {
    double pairs, stored, biases;

    double of_bias(const Operation& op) const { return biases * (pairs > 0 ? op.positions : 1); }
};

const float LN2 = 0.69314718f;
// Fractional and integer bits stay in this range, so that every value is exact in a float.
enum { MOST_BITS = 20 };

inline float power_of_two(int32_t e) {
    const int32_t bits = (e + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline int32_t whole_bits(float bits) {
    const float r = __builtin_rintf(bits);
    return r < -MOST_BITS ? -MOST_BITS : r > MOST_BITS ? MOST_BITS : (int32_t)r;
}
// Bits of the magnitude of a whole number.
inline int32_t length_of(float whole) { return whole == 0.0f ? 0 : 1 + ilogbf(whole); }

// The supported width at or above `bits`, else the largest. `widths` has bit k set if k is supported; 0: all are.
inline int32_t supported(int32_t bits, int64_t widths) {
    if (widths == 0) return bits;
    if (bits < 0) bits = 0;
    const uint32_t above = bits > 31 ? 0 : (uint32_t)widths >> bits;
    return above ? bits + __builtin_ctz(above) : 31 - __builtin_clz((uint32_t)widths);
}
// Whether fewer than `bits` can cost less.
inline bool shrinks(int32_t bits, int64_t widths) { return widths == 0 || bits > __builtin_ctz((uint32_t)widths); }
// Bits of the magnitude of a value that is rounded to `whole`, a multiple of 2^-f. Where only some widths are supported,
// that of a value below the grid is negative, so that more fractional bits bring it back.
inline int32_t learned_length(float value, float whole, int32_t f, int64_t widths) {
    if (whole != 0.0f || widths == 0) return length_of(whole);
    const int32_t length = value == 0.0f ? -2 * MOST_BITS : f + 1 + ilogbf(value);
    return length < -2 * MOST_BITS ? -2 * MOST_BITS : length > 0 ? 0 : length;
}
// Fractional bits of a value with `length` bits and `f` fractional ones, once it has `width` bits.
inline int32_t refined(int32_t f, int32_t length, int32_t width) {
    const int32_t more = f + width - length;
    return more < -MOST_BITS ? -MOST_BITS : more > MOST_BITS ? MOST_BITS : more;
}
// A value as a multiple of 2^-f of at most `width` bits; it can be one step too large where width is below the learned.
inline float in_width(float value, int32_t f, int32_t width) {
    const float high = power_of_two(width) - 1.0f, whole = __builtin_rintf(value * power_of_two(f));
    return (whole < -high ? -high : whole > high ? high : whole) * power_of_two(-f);
}

inline int64_t to_lanes(int64_t n) { return ceil_div(n, LANES) * LANES; }

// Per row of a rounding: 2^F, 2^-F, 2^I, the largest whole number, the bits, and what a bit more would cost.
struct RowBits {
    float *scale, *step, *top, *high, *bits, *pressure;
};
inline RowBits rows_of(const Operation& op, float* scratch) {
    const int64_t n = to_lanes(op.channels * op.positions);
    float* p = scratch + op.scratch;
    return {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n, p + 5 * n};
}

// Per live weight: its value, its bits, what a bit more would cost; per channel its bias.
struct SlotBits {
    float *value, *bits, *pressure, *bias;
};
inline SlotBits slots_of(const Operation& op, float* scratch) {
    const int64_t n = to_lanes(op.slots);
    float* p = scratch + op.scratch;
    return {p, p + n, p + 2 * n, p + 3 * n};
}

inline int32_t learned_width(const Operation& op, const float* values, int64_t row) {
    const int32_t sum = whole_bits(values[op.fractions + op.groups[row]]) + whole_bits(values[op.integers + op.groups[row]]);
    return sum < 0 ? 0 : sum > MOST_BITS ? MOST_BITS : sum;
}

void prepare_rows(const Operation& op, const float* values, float* scratch) {
    const RowBits rows = rows_of(op, scratch);
    for (int64_t r = 0; r < op.channels * op.positions; r++) {
        const int32_t i = whole_bits(values[op.integers + op.groups[r]]);
        const int32_t learned = learned_width(op, values, r), bits = supported(learned, op.widths);
        const int32_t f = op.widths ? refined(-i, 0, bits) : whole_bits(values[op.fractions + op.groups[r]]);
        rows.scale[r] = power_of_two(f);
        rows.step[r] = power_of_two(-f);
        rows.top[r] = power_of_two(i);
        rows.high[r] = power_of_two(bits) - 1.0f;
        rows.bits[r] = bits;
        rows.pressure[r] = 0;
    }
}

// Of the bias of a channel.
inline int32_t length_of_bias(const Operation& op, const float* values, int64_t channel) {
    const int32_t f = whole_bits(values[op.bias_fractions + channel]);
    const float value = values[op.bias + channel];
    return learned_length(value, __builtin_rintf(value * power_of_two(f)), f, op.bias_widths);
}
// The bias of a channel, and its bits.
inline float bias_of(const Operation& op, const float* values, int64_t channel, float& bits) {
    const float value = values[op.bias + channel];
    const int32_t f = whole_bits(values[op.bias_fractions + channel]), length = length_of_bias(op, values, channel);
    const int32_t width = supported(length, op.bias_widths);
    const float rounded = op.bias_widths ? in_width(value, refined(f, length, width), width)
                                         : __builtin_rintf(value * power_of_two(f)) * power_of_two(-f);
    bits = width;
    return rounded;
}

// Weights that share fractional bits have the width of the widest of them; `widths` is scratch, one number per group of
// weights. Groups without a live weight may come before others.
void prepare_slots(const Operation& op, const float* values, float* scratch, float* widths) {
    const SlotBits slots = slots_of(op, scratch);
    for (int64_t s = 0; s < op.slots; s++) widths[op.groups[s]] = op.widths ? -2 * MOST_BITS : 0;
    for (int64_t s = 0; s < op.slots; s++) {
        const int32_t f = whole_bits(values[op.fractions + op.groups[s]]);
        const float whole = __builtin_rintf(values[op.weight + s] * power_of_two(f));
        slots.value[s] = whole * power_of_two(-f);
        float& width = widths[op.groups[s]];
        const float bits = learned_length(values[op.weight + s], whole, f, op.widths);
        width = bits > width ? bits : width;
        slots.pressure[s] = 0;
    }
    for (int64_t s = 0; op.widths && s < op.slots; s++) {
        const int32_t f = whole_bits(values[op.fractions + op.groups[s]]), length = widths[op.groups[s]];
        const int32_t width = supported(length, op.widths);
        slots.value[s] = in_width(values[op.weight + s], refined(f, length, width), width);
    }
    for (int64_t s = 0; s < op.slots; s++)
        slots.bits[s] = slots.value[s] == 0.0f ? 0.0f : supported(widths[op.groups[s]], op.widths);
    for (int64_t c = 0; c < op.channels; c++) {
        float bits;
        slots.bias[c] = op.bias < 0 ? 0 : bias_of(op, values, c, bits);
    }
}

// Rounds everything for the coming step, and says what it costs and what one more bit anywhere would cost.
double prepare_bits(const Member& m, const Pressure& cost, float* scratch, float* widths) {
    double total = 0;
    for (int64_t k = 0; k < m.count; k++) {
        const Operation& op = m.operations[k];
        if (op.kind == ROUND) prepare_rows(op, m.values, scratch);
        if (op.kind != SPARSE) continue;
        prepare_slots(op, m.values, scratch, widths);
        const SlotBits slots = slots_of(op, scratch);
        const RowBits rows = rows_of(m.operations[op.source], scratch);
        for (int64_t r = 0; r < op.channels * op.positions; r++)
            for (int32_t e = op.forward.starts[r]; e < op.forward.starts[r + 1]; e++) {
                const int32_t slot = op.forward.pairs[2 * e], row = op.forward.pairs[2 * e + 1];
                total += cost.pairs * slots.bits[slot] * rows.bits[row];
                slots.pressure[slot] += cost.pairs * rows.bits[row];
                rows.pressure[row] += cost.pairs * slots.bits[slot];
            }
        // Zeros among weights that share bits are stored too. Weights that share bits are one after another.
        for (int64_t s = 0, group = -1; s < op.slots; s++) {
            if (slots.value[s] == 0 || op.groups[s] == group) continue;
            group = op.groups[s];
            total += cost.stored * op.sharing * slots.bits[s];
            slots.pressure[s] += cost.stored * op.sharing;
        }
        for (int64_t s = 0; op.widths && s < op.slots; s++)
            if (!shrinks(widths[op.groups[s]], op.widths)) slots.pressure[s] = 0;
        const Operation& rounding = m.operations[op.source];
        for (int64_t r = 0; rounding.widths && r < rounding.channels * rounding.positions; r++)
            if (!shrinks(learned_width(rounding, m.values, r), rounding.widths)) rows.pressure[r] = 0;
        for (int64_t c = 0; op.bias >= 0 && c < op.channels; c++) {
            float bits;
            bias_of(op, m.values, c, bits);
            total += cost.of_bias(op) * bits;
        }
    }
    return total;
}

// What F and I get beside the gradients of the samples: through the weights, and from the pressure `beta`.
void finish_bits(const Member& m, const Pressure& cost, double beta, float* scratch, float* gradients) {
    for (int64_t k = 0; k < m.count; k++) {
        const Operation& op = m.operations[k];
        if (op.kind == ROUND) {
            const RowBits rows = rows_of(op, scratch);
            for (int64_t r = 0; r < op.channels * op.positions; r++) {
                const float g = rows.bits[r] > 0 ? beta * rows.pressure[r] : 0;
                gradients[op.fractions + op.groups[r]] += g;
                gradients[op.integers + op.groups[r]] += g;
            }
        }
        if (op.kind != SPARSE) continue;
        const SlotBits slots = slots_of(op, scratch);
        for (int64_t s = 0; s < op.slots; s++) {
            const float through = LN2 * (m.values[op.weight + s] - slots.value[s]) * gradients[op.weight + s];
            const float pressed = slots.value[s] != 0 ? beta * slots.pressure[s] : 0;
            gradients[op.fractions + op.groups[s]] += through + pressed;
        }
        for (int64_t c = 0; op.bias >= 0 && c < op.channels; c++) {
            const float through = LN2 * (m.values[op.bias + c] - slots.bias[c]) * gradients[op.bias + c];
            const bool pressed = slots.bias[c] != 0 && shrinks(length_of_bias(op, m.values, c), op.bias_widths);
            gradients[op.bias_fractions + c] += through + (pressed ? beta * cost.of_bias(op) : 0);
        }
    }
}

template <int way>
void learned_round_in(const Operation& op, float* scratch, const float* in, int64_t in_stride, float* out,
                      int64_t stride, int64_t n) {
    const RowBits rows = rows_of(op, scratch);
    for (int64_t r = 0; r < op.channels * op.positions; r++, in += in_stride, out += stride) {
        const float scale = rows.scale[r], step = rows.step[r], high = rows.high[r], low = op.rectify ? 0.0f : -high;
        for (int64_t s = 0; s < n; s++) {
            float v = whole<way>(in[s] * scale);
            v = v < low ? low : v;
            v = v > high ? high : v;
            out[s] = v * step;
        }
    }
}

void learned_round(const Operation& op, float* scratch, const float* in, int64_t in_stride, float* out, int64_t stride,
                   int64_t n) {
    if (op.way == EVEN) learned_round_in<EVEN>(op, scratch, in, in_stride, out, stride, n);
    else if (op.way == HALF_UP) learned_round_in<HALF_UP>(op, scratch, in, in_stride, out, stride, n);
    else learned_round_in<FLOOR>(op, scratch, in, in_stride, out, stride, n);
}

void learned_round_back(const Operation& op, float* scratch, const float* in, int64_t in_stride, const float* out,
                        const float* up, float* down, int64_t stride, int64_t n, float* gradients) {
    const RowBits rows = rows_of(op, scratch);
    for (int64_t r = 0; r < op.channels * op.positions; r++, in += in_stride, out += stride, up += stride) {
        const Floats most = all(rows.high[r] * rows.step[r]), least = op.rectify ? all(0.0f) : -most;
        const Floats finest = all(rows.step[r]), top = all(rows.top[r]);
        Floats of_fractions = {}, of_integers = {};
        for (int64_t s = 0; s < n; s += LANES) {
            const Floats x = at(in + s), q = at(out + s), g = at(up + s);
            const Ints over = above(x, most), under = op.rectify ? at_most(x, least) : below(x, least);
            const Floats edge = choose(over, g, op.rectify ? all(0.0f) : -g);
            const Ints outside = over | under;
            of_fractions += choose(outside, edge * finest, g * (x - q));
            of_integers += choose(outside, edge * top, all(0.0f));
            if (op.adds >= 0) {
                const Floats d = choose(outside, all(0.0f), g);
                put(down + s, op.adds == 1 ? at(down + s) + d : d);
            }
        }
        gradients[op.fractions + op.groups[r]] += LN2 * sum(of_fractions);
        gradients[op.integers + op.groups[r]] += LN2 * sum(of_integers);
        down += stride;
    }
}

// Rows of the target = start of their channel + weighted rows of the source, by lists of (live weight, row).
template <int vectors>
void listed_rows(const Lists& lists, int64_t count, const float* weights, const float* source, int64_t source_stride,
                 float* target, int64_t target_stride, const float* start, int64_t positions, bool adds) {
    for (int64_t r = 0; r < count; r++, target += target_stride) {
        Register acc[vectors * REGISTERS];
#pragma GCC unroll 16
        for (int v = 0; v < vectors * REGISTERS; v++)
            acc[v] = adds ? register_at(target + v * WIDTH) : every(start ? start[r / positions] : 0.0f);
        const int32_t *pair = lists.pairs + 2 * lists.starts[r], *end = lists.pairs + 2 * lists.starts[r + 1];
        for (; pair < end; pair += 2) {
            const Register w = every(weights[pair[0]]);
            const float* x = source + pair[1] * source_stride;
#pragma GCC unroll 16
            for (int v = 0; v < vectors * REGISTERS; v++) acc[v] += w * register_at(x + v * WIDTH);
        }
#pragma GCC unroll 16
        for (int v = 0; v < vectors * REGISTERS; v++) memcpy(target + v * WIDTH, &acc[v], sizeof acc[v]);
    }
}

// A block of samples of all rows fits into the nearest cache, so it goes through all rows before the next one.
void listed_product(const Lists& lists, int64_t count, const float* weights, const float* source,
                    int64_t source_stride, float* target, int64_t target_stride, int64_t n, const float* start,
                    int64_t positions, bool adds) {
    int64_t s = 0;
    for (; s + 4 * LANES <= n; s += 4 * LANES)
        listed_rows<4>(lists, count, weights, source + s, source_stride, target + s, target_stride, start, positions, adds);
    for (; s < n; s += LANES)
        listed_rows<1>(lists, count, weights, source + s, source_stride, target + s, target_stride, start, positions, adds);
}

// As many sums as fit into the registers.
enum { AT_A_TIME = REGISTERS == 1 ? 16 : REGISTERS == 2 ? 4 : 2 };

// The sums of the products of `up` with the rows of some pairs, lane by lane.
inline void gradients_of(const int32_t* pair, const float* up, const float* in, int64_t in_stride, int64_t n, Floats* to) {
    Register acc[AT_A_TIME][REGISTERS] = {};
    const float* x[AT_A_TIME];
    for (int e = 0; e < AT_A_TIME; e++) x[e] = in + pair[2 * e + 1] * in_stride;
    for (int64_t s = 0; s < n; s += LANES)
#pragma GCC unroll 4
        for (int v = 0; v < REGISTERS; v++) {
            const Register g = register_at(up + s + v * WIDTH);
#pragma GCC unroll 16
            for (int e = 0; e < AT_A_TIME; e++) acc[e][v] += g * register_at(x[e] + s + v * WIDTH);
        }
    memcpy(to, acc, sizeof acc);
}

// gradient[live weight] += sum over the samples of up[row of the output] * in[row of the input], for every pair.
void listed_gradient(const Operation& op, const float* up, int64_t up_stride, const float* in, int64_t in_stride,
                     int64_t n, float* gradient) {
    for (int64_t r = 0; r < op.channels * op.positions; r++, up += up_stride) {
        const int32_t *pair = op.forward.pairs + 2 * op.forward.starts[r], *end = op.forward.pairs + 2 * op.forward.starts[r + 1];
        for (; pair + 32 <= end; pair += 32) {
            Floats acc[16];
#pragma GCC unroll 1
            for (int from = 0; from < 16; from += AT_A_TIME)
                gradients_of(pair + 2 * from, up, in, in_stride, n, acc + from);
            const Floats total = sums(acc);
            for (int e = 0; e < 16; e++) gradient[pair[2 * e]] += total[e];
        }
        for (; pair < end; pair += 2) {
            Floats acc = {};
            const float* x = in + pair[1] * in_stride;
            for (int64_t s = 0; s < n; s += LANES) acc += at(up + s) * at(x + s);
            gradient[pair[0]] += sum(acc);
        }
    }
}

}  // namespace
