// Training one small network, step by step, without leaving the cache: what a population calls for each of its members.
//
// A network is a list of operations on a table of rows. A row is one feature (of an image: one pixel of one channel) of
// all samples of a tile; samples lie side by side, so every loop runs over whole vectors of samples, and a convolution is
// the same sum of weighted rows as a linear layer, taken once per position. Columns behind the last sample of a tile hold
// whatever finite values come out; gradients there are zero, so nothing is ever learned from them.
//
// A member's arithmetic depends on its own operations, the batch and the tile, never on other members or threads.
// Compiled with fused multiply-adds (see `native.py`); `bitfront.population.programs` writes the operations.

#include <math.h>
#include <time.h>

#include "floats.h"

namespace {

// Rows and vectors of a block of a product that stay in registers; RO x RI products of rows for weight gradients.
#ifdef __AVX512F__
enum { MR = 8, NR = 3, RO = 4, RI = 4 };
#else
enum { MR = 4, NR = 1, RO = 4, RI = 4 };
#endif

enum Kind { PRODUCT, ACTIVATE, NORM, ADD, LARGEST, MEAN };
enum Part { PRODUCTS, ELEMENTWISE, NORMS, LOSS, OPTIMIZER, PARTS };

struct Grid {
    float scale, low, high, step;  // clamp(round(x * scale), low, high) * step; scale 0: as it is
};

// How two sets of rows meet, as lists: starts[i] to starts[i + 1] are the entries of list i, pairs of whole numbers.
struct Lists {
    const int32_t* starts;
    const int32_t* pairs;
};

// Mirrored by `native.py`. Places of rows count rows of the table; -1 is the batch. Places of numbers count floats.
struct Operation {
    int64_t kind, in, in2, out;
    int64_t adds, adds2;             // gradient of in and in2: 1 added to what is there, 0 written, -1 not wanted
    int64_t channels_in, channels;   // a row is channel * positions + position
    int64_t positions_in, positions;
    int64_t blocks;                  // weights of a convolution per pair of channels: its kernel's size
    int64_t weight, bias, state;     // in the parameters; in the member's buffers (running mean, then variance); -1: none
    int64_t scratch;                 // PRODUCT: packed weights; NORM: mean and 1 / deviation
    Lists forward;                   // per position of the output: (block, position of the input)
    Lists backward;                  // per position of the input: (block, position of the output)
    Lists pairs;                     // per block: (position of the output, position of the input)
    Grid first, second;              // ACTIVATE: before and after the ReLU; PRODUCT: weight and bias
    float rectify, momentum, epsilon;
};

struct Member {
    const Operation* operations;
    int64_t count, parameters, logits, classes;
    float *values, *buffers, *moment, *moment2;  // parameters, running statistics, what the optimizer remembers
};

struct Scratch {
    float *rows, *gradients, *packed, *learned;
    int64_t stride, tile;  // floats from row to row; samples of a tile
};

struct Optimizer {
    int64_t kind, steps;  // 0 adam, 1 adamw, 2 sgd; steps taken before
    double rate, decay;
};

inline Floats at(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void put(float* p, Floats v) { memcpy(p, &v, sizeof v); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float on_grid(float x, const Grid& g) {
    float v = __builtin_rintf(x * g.scale);
    v = v < g.low ? g.low : v;
    v = v > g.high ? g.high : v;
    return v * g.step;
}
inline float rounded(float x, const Grid& g) { return g.scale ? on_grid(x, g) : x; }
inline bool inside(float x, const Grid& g) { return x >= g.low * g.step && x <= g.high * g.step; }

// Lane i of the result is the sum of the lanes of v[i]: a tree of shuffles.
template <int h> inline Floats halves(Floats a, Floats b) {
#define FIRST(i) ((i) & h ? 16 + (i) - h : (i))
#define SECOND(i) ((i) & h ? 16 + (i) : (i) + h)
#define SIXTEEN(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
    return __builtin_shufflevector(a, b, SIXTEEN(FIRST)) + __builtin_shufflevector(a, b, SIXTEEN(SECOND));
}
inline Floats sums(const Floats* v) {
    Floats a[8], b[4];
    for (int i = 0; i < 8; i++) a[i] = halves<1>(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; i++) b[i] = halves<2>(a[2 * i], a[2 * i + 1]);
    return halves<8>(halves<4>(b[0], b[1]), halves<4>(b[2], b[3]));
}
inline float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}
// Lanes of the samples from `s` on that exist: all ones, else zeros.
inline Ints exist(int64_t s, int64_t n) {
    Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < (int32_t)(n - s < LANES ? n - s : LANES);
}
inline Floats only(Floats v, Ints wanted) { return (Floats)((Ints)v & wanted); }

// -- weighted sums of rows

// `rows` rows of the output, `vectors` vectors each, += or = sum over (block, position) of the list, and channels j below
// `depth`, of packed[block][j][row] * source[j * channel_step + position * stride].
template <int vectors>
inline void block_of(const float* packed, const int32_t* pair, const int32_t* end, int64_t depth, const float* source,
                     int64_t channel_step, int64_t stride, float* target, int64_t target_step, int64_t rows,
                     const float* start, bool adds) {
    Floats acc[MR][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) acc[r][v] = all(start ? start[r] : 0.0f);
    for (; pair < end; pair += 2) {
        const float* a = packed + pair[0] * depth * MR;
        const float* b = source + pair[1] * stride;
        for (int64_t j = 0; j < depth; j++, a += MR, b += channel_step) {
            Floats x[vectors];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) x[v] = at(b + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                Floats w = all(a[r]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) acc[r][v] += w * x[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
        if (r < rows)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                float* p = target + r * target_step + v * LANES;
                put(p, adds ? at(p) + acc[r][v] : acc[r][v]);
            }
}

// All channels of the output at all positions, samples 0 to n. `packed` holds, per MR channels of the output, blocks x
// depth x MR weights; `start` one number per channel (rounded up to MR), or nothing.
void product(const float* packed, int64_t blocks, Lists lists, int64_t depth, const float* source,
             int64_t source_positions, int64_t source_stride, float* target, int64_t channels, int64_t positions,
             int64_t target_stride, int64_t n, const float* start, bool adds) {
    const int64_t wide = ceil_div(n, LANES);
    for (int64_t p = 0; p < positions; p++) {
        const int32_t *pair = lists.pairs + 2 * lists.starts[p], *end = lists.pairs + 2 * lists.starts[p + 1];
        for (int64_t v = 0; v < wide; v += NR)
            for (int64_t c = 0; c < channels; c += MR) {
                const float* a = packed + c * blocks * depth;
                const float* b = source + v * LANES;
                float* out = target + (c * positions + p) * target_stride + v * LANES;
                const int64_t rows = channels - c < MR ? channels - c : MR;
                const float* from = start ? start + c : nullptr;
                const int64_t left = wide - v;
                auto run = left >= 3 && NR >= 3 ? block_of<NR> : left == 2 && NR >= 3 ? block_of<2> : block_of<1>;
                run(a, pair, end, depth, b, source_positions * source_stride, source_stride, out,
                    positions * target_stride, rows, from, adds);
            }
    }
}

// gradient[o * blocks * inputs + i * blocks + block] += sum over pairs and samples of up[o] * down[i].
template <int outs, int ins>
inline void weight_block(const int32_t* pair, const int32_t* end, const float* up, int64_t up_channel,
                         int64_t up_stride, const float* down, int64_t down_channel, int64_t down_stride, int64_t n,
                         float* gradient, int64_t out_step, int64_t in_step) {
    Floats acc[16] = {};
    for (; pair < end; pair += 2) {
        const float* g = up + pair[0] * up_stride;
        const float* x = down + pair[1] * down_stride;
        for (int64_t s = 0; s < n; s += LANES) {
            Floats xs[ins];
#pragma GCC unroll 4
            for (int i = 0; i < ins; i++) xs[i] = at(x + i * down_channel + s);
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++) {
                Floats gs = at(g + o * up_channel + s);
#pragma GCC unroll 4
                for (int i = 0; i < ins; i++) acc[o * 4 + i] += gs * xs[i];
            }
        }
    }
    Floats total = sums(acc);
    for (int o = 0; o < outs; o++)
        for (int i = 0; i < ins; i++) gradient[o * out_step + i * in_step] += total[o * 4 + i];
}

void weight_gradient(const Operation& op, const float* up, int64_t up_stride, const float* down, int64_t down_stride,
                     int64_t n, float* gradient) {
    const int64_t ins = op.channels_in, outs = op.channels;
    for (int64_t k = 0; k < op.blocks; k++) {
        const int32_t *pair = op.pairs.pairs + 2 * op.pairs.starts[k], *end = op.pairs.pairs + 2 * op.pairs.starts[k + 1];
        for (int64_t o = 0; o < outs; o += RO)
            for (int64_t i = 0; i < ins; i += RI) {
                const bool tall = outs - o >= RO, broad = ins - i >= RI;
                for (int64_t oo = o; oo < (tall ? o + 1 : outs); oo++)
                    for (int64_t ii = i; ii < (broad ? i + 1 : ins); ii++) {
                        auto run = tall ? (broad ? weight_block<RO, RI> : weight_block<RO, 1>)
                                        : (broad ? weight_block<1, RI> : weight_block<1, 1>);
                        run(pair, end, up + oo * op.positions * up_stride, op.positions * up_stride, up_stride,
                            down + ii * op.positions_in * down_stride, op.positions_in * down_stride, down_stride, n,
                            gradient + (oo * ins + ii) * op.blocks + k, ins * op.blocks, op.blocks);
                    }
            }
    }
}

// Weights as `product` wants them, rounded to their grid: forward, then bias, then (training only) backward.
struct Packed {
    float *forward, *bias, *backward;
};
Packed packed_of(const Operation& op, float* scratch) {
    const int64_t outs = ceil_div(op.channels, MR) * MR;
    float* forward = scratch + op.scratch;
    float* bias = forward + outs * op.channels_in * op.blocks;
    return {forward, bias, bias + outs};
}

// to[row / MR][block][j][row % MR] = from[row * row_step + j * step + block], rounded; zeros behind the last row.
template <bool grid>
void pack_rows(const float* from, int64_t rows, int64_t row_step, int64_t depth, int64_t step, int64_t blocks,
               const Grid& g, float* to) {
    for (int64_t first = 0; first < rows; first += MR, from += MR * row_step)
        for (int64_t k = 0; k < blocks; k++)
            for (int64_t j = 0; j < depth; j++, to += MR)
                for (int64_t r = 0; r < MR; r++) {
                    const float w = first + r < rows ? from[r * row_step + j * step + k] : 0.0f;
                    to[r] = grid ? on_grid(w, g) : w;
                }
}

void pack(const Operation& op, const float* values, float* scratch, bool train) {
    const Packed to = packed_of(op, scratch);
    const int64_t outs = op.channels, ins = op.channels_in, blocks = op.blocks;
    const float* w = values + op.weight;
    for (int64_t o = 0; o < ceil_div(outs, MR) * MR; o++)
        to.bias[o] = o < outs && op.bias >= 0 ? rounded(values[op.bias + o], op.second) : 0.0f;
    auto run = op.first.scale ? pack_rows<true> : pack_rows<false>;
    run(w, outs, ins * blocks, ins, blocks, blocks, op.first, to.forward);
    if (train && op.adds >= 0) run(w, ins, blocks, outs, ins * blocks, blocks, op.first, to.backward);
}

// -- elementwise operations and norms

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

// Straight through what was rounded inside its range, nothing through what was cut off.
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
        const float w = op.weight >= 0 ? m.values[op.weight + c] : 1.0f, b = op.bias >= 0 ? m.values[op.bias + c] : 0.0f;
        saved[c] = mean;
        saved[op.channels + c] = inverse;
        const float scale = w * inverse;
        for (int64_t p = 0; p < op.positions; p++)
            for (int64_t s = 0; s < ceil_div(n, LANES) * LANES; s++)
                out[p * stride + s] = (in[p * in_stride + s] - mean) * scale + b;
    }
}

void norm_back(const Operation& op, const Member& m, const float* in, int64_t in_stride, const float* up, float* down,
               int64_t stride, int64_t n, const float* scratch, float* learned) {
    const float* saved = scratch + op.scratch;
    const double count = double(n) * op.positions;
    for (int64_t c = 0; c < op.channels; c++) {
        const float mean = saved[c], inverse = saved[op.channels + c];
        const double total = over_channel(op.positions, n, [&](int64_t p, int64_t s) { return at(up + p * stride + s); });
        const double along = over_channel(op.positions, n, [&](int64_t p, int64_t s) {
            return at(up + p * stride + s) * ((at(in + p * in_stride + s) - mean) * inverse);
        });
        if (op.weight >= 0) learned[op.weight + c] += along;
        if (op.bias >= 0) learned[op.bias + c] += total;
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

// -- pooling: windows are the lists, of positions of the input

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

// The gradient of a maximum goes to the first of equals. `down` is set to zero by the caller where it is not added to.
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
                    const bool found = op.kind == LARGEST && x[s] == out[s];
                    d[s] += op.kind == MEAN ? up[s] / (end - begin) : found ? left[s] : 0.0f;
                    left[s] = found ? 0.0f : left[s];
                }
            }
        }
}

// -- a step

struct Clock {
    double* parts;
    double last;
    static double now() {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec + 1e-9 * t.tv_nsec;
    }
    void start() {
        if (parts) last = now();
    }
    void stop(Part part) {
        if (!parts) return;
        const double t = now();
        parts[part] += t - last;
        last = t;
    }
};

Part part_of(const Operation& op) { return op.kind == PRODUCT ? PRODUCTS : op.kind == NORM ? NORMS : ELEMENTWISE; }

struct Rows {
    float* first;
    int64_t stride;
};

void forward(const Member& m, const float* batch, int64_t batch_stride, int64_t n, const Scratch& t, bool train,
             Clock& clock) {
    auto rows = [&](int64_t place) -> Rows {
        return place < 0 ? Rows{const_cast<float*>(batch), batch_stride} : Rows{t.rows + place * t.stride, t.stride};
    };
    const int64_t whole = ceil_div(n, LANES) * LANES;
    for (int64_t k = 0; k < m.count; k++) {
        const Operation& op = m.operations[k];
        const Rows in = rows(op.in), out = rows(op.out);
        if (op.kind == PRODUCT) {
            const Packed w = packed_of(op, t.packed);
            product(w.forward, op.blocks, op.forward, op.channels_in, in.first, op.positions_in, in.stride, out.first,
                    op.channels, op.positions, out.stride, n, w.bias, false);
        } else if (op.kind == ACTIVATE) {
            BY_GRIDS(activate, op, in.first, in.stride, out.first, out.stride, whole);
        } else if (op.kind == NORM) {
            norm(op, m, in.first, in.stride, out.first, out.stride, n, t.packed, train);
        } else if (op.kind == ADD) {
            const Rows other = rows(op.in2);
            for (int64_t r = 0; r < op.channels * op.positions; r++)
                for (int64_t s = 0; s < whole; s++)
                    out.first[r * out.stride + s] = in.first[r * in.stride + s] + other.first[r * other.stride + s];
        } else {
            pool(op, in.first, in.stride, out.first, out.stride, whole);
        }
        clock.stop(part_of(op));
    }
}

void backward(const Member& m, const float* batch, int64_t batch_stride, int64_t n, const Scratch& t, Clock& clock) {
    auto rows = [&](int64_t place) -> Rows {
        return place < 0 ? Rows{const_cast<float*>(batch), batch_stride} : Rows{t.rows + place * t.stride, t.stride};
    };
    const int64_t whole = ceil_div(n, LANES) * LANES;
    for (int64_t k = m.count - 1; k >= 0; k--) {
        const Operation& op = m.operations[k];
        const Rows in = rows(op.in);
        const float* up = t.gradients + op.out * t.stride;
        float* down = t.gradients + op.in * t.stride;  // not touched where the input is the batch
        if (op.kind == PRODUCT) {
            weight_gradient(op, up, t.stride, in.first, in.stride, n, t.learned + op.weight);
            if (op.bias >= 0)
                for (int64_t o = 0; o < op.channels; o++)
                    t.learned[op.bias + o] += over_channel(op.positions, n, [&](int64_t p, int64_t s) {
                        return at(up + (o * op.positions + p) * t.stride + s);
                    });
            if (op.adds >= 0)
                product(packed_of(op, t.packed).backward, op.blocks, op.backward, op.channels, up, op.positions,
                        t.stride, down, op.channels_in, op.positions_in, t.stride, n, nullptr, op.adds == 1);
        } else if (op.kind == ACTIVATE) {
            if (op.adds >= 0) BY_GRIDS(activate_back, op, in.first, in.stride, up, down, t.stride, whole);
        } else if (op.kind == NORM) {
            norm_back(op, m, in.first, in.stride, up, down, t.stride, n, t.packed, t.learned);
        } else if (op.kind == ADD) {
            const int64_t places[2] = {op.in, op.in2}, adds[2] = {op.adds, op.adds2};
            for (int side = 0; side < 2; side++) {
                float* to = t.gradients + places[side] * t.stride;
                for (int64_t r = 0; adds[side] >= 0 && r < op.channels * op.positions; r++)
                    for (int64_t s = 0; s < whole; s++)
                        to[r * t.stride + s] = (adds[side] ? to[r * t.stride + s] : 0.0f) + up[r * t.stride + s];
            }
        } else if (op.adds >= 0) {
            if (op.adds == 0) memset(down, 0, op.channels * op.positions_in * t.stride * sizeof(float));
            const float* out = t.rows + op.out * t.stride;
            float* left = t.gradients - t.stride;  // the row before the first is nobody's
            pool_back(op, in.first, in.stride, out, up, down, t.stride, whole, left);
        }
        clock.stop(part_of(op));
    }
}

// Cross entropy of n samples; its gradient, of the mean over `batch` samples. Returns the sum.
double entropy(const float* z, float* gradient, int64_t stride, const int32_t* labels, int64_t classes, int64_t n,
               int64_t batch, int64_t* correct) {
    Doubles total = {};
    Ints hits = {};
    const float share = 1.0f / batch;
    for (int64_t s = 0; s < n; s += LANES) {
        const Ints there = exist(s, n);
        Ints label = {}, arg = {};
        memcpy(&label, labels + s, (n - s < LANES ? n - s : LANES) * sizeof(int32_t));
        Floats best = at(z + s), own = {}, norm = {};
        for (int32_t c = 0; c < classes; c++) {
            Floats v = at(z + c * stride + s);
            arg = v > best ? (Ints){} + c : arg;
            best = v > best ? v : best;
            own = label == c ? v : own;
        }
        for (int64_t c = 0; c < classes; c++) {
            Floats e = exp_nonpositive(at(z + c * stride + s) - best);
            put(gradient + c * stride + s, e);
            norm += e;
        }
        Floats factor = share / norm;
        for (int32_t c = 0; c < classes; c++) {
            Floats g = at(gradient + c * stride + s) * factor;
            g = label == c ? g - share : g;
            put(gradient + c * stride + s, only(g, there));
        }
        Floats loss = log_from_one(norm) + (best - own);
        loss = norm == norm ? loss : norm;
        total += __builtin_convertvector(only(loss, there), Doubles);
        hits -= (arg == label) & there;
    }
    double found = 0;
    for (int i = 0; i < LANES; i++) {
        found += total[i];
        *correct += hits[i];
    }
    return found;
}

// As torch.optim has them, with its defaults: betas 0.9 and 0.999, eps 1e-8; Nesterov's momentum 0.9.
void update(const Member& m, const float* learned, const Optimizer& o, int64_t step) {
    const float rate = o.rate, decay = o.decay, shrink = 1.0 - o.rate * o.decay;
    float *__restrict p = m.values, *__restrict a = m.moment, *__restrict b = m.moment2;
    const float* __restrict g0 = learned;
    if (o.kind == 2) {
        for (int64_t i = 0; i < m.parameters; i++) {
            const float g = g0[i] + decay * p[i];
            a[i] = step == 1 ? g : 0.9f * a[i] + g;
            p[i] -= rate * (g + 0.9f * a[i]);
        }
        return;
    }
    const float size = o.rate / (1 - pow(0.9, step)), root = sqrt(1 - pow(0.999, step));
    const bool apart = o.kind == 1;
    for (int64_t i = 0; i < m.parameters; i++) {
        const float w = apart ? p[i] * shrink : p[i];
        const float g = apart ? g0[i] : g0[i] + decay * w;
        a[i] += 0.1f * (g - a[i]);
        b[i] = b[i] * 0.999f + 0.001f * g * g;
        p[i] = w - size * a[i] / (sqrtf(b[i]) / root + 1e-8f);
    }
}

}  // namespace

extern "C" {

// `steps` optimizer steps on batches that lie one after another: batch k is `features` rows of `batch` samples,
// `batch_stride` floats apart, and `batch` labels. `losses` gets each batch's mean loss before its step. `parts`, where
// given, gathers the seconds spent on products, elementwise operations, norms, loss and optimizer.
// Returns the right answers, each counted before the step on its batch.
int64_t bitfront_train(const Member* member, const Scratch* scratch, const Optimizer* optimizer, const float* x,
                       const int32_t* labels, int64_t steps, int64_t features, int64_t batch, int64_t batch_stride,
                       double* losses, double* parts) {
    const Member& m = *member;
    const Scratch& t = *scratch;
    Clock clock = {parts, 0};
    int64_t correct = 0;
    for (int64_t k = 0; k < steps; k++, x += features * batch_stride, labels += batch) {
        clock.start();
        memset(t.learned, 0, m.parameters * sizeof(float));
        for (int64_t i = 0; i < m.count; i++)
            if (m.operations[i].kind == PRODUCT) pack(m.operations[i], m.values, t.packed, true);
        clock.stop(PRODUCTS);
        double loss = 0;
        for (int64_t s = 0; s < batch; s += t.tile) {
            const int64_t n = batch - s < t.tile ? batch - s : t.tile;
            forward(m, x + s, batch_stride, n, t, true, clock);
            loss += entropy(t.rows + m.logits * t.stride, t.gradients + m.logits * t.stride, t.stride, labels + s,
                            m.classes, n, batch, &correct);
            clock.stop(LOSS);
            backward(m, x + s, batch_stride, n, t, clock);
        }
        losses[k] = loss / batch;
        // Weights get their gradients also where they are cut off: see `transforms.quantize.through`.
        update(m, t.learned, *optimizer, optimizer->steps + k + 1);
        clock.stop(OPTIMIZER);
    }
    return correct;
}

// Logits in evaluation mode: `x` is features rows of n samples, `stride` apart; `logits` is classes x n, contiguous.
void bitfront_logits(const Member* member, const Scratch* scratch, const float* x, int64_t n, int64_t stride,
                     float* logits) {
    const Member& m = *member;
    const Scratch& t = *scratch;
    Clock clock = {nullptr, 0};
    for (int64_t i = 0; i < m.count; i++)
        if (m.operations[i].kind == PRODUCT) pack(m.operations[i], m.values, t.packed, false);
    for (int64_t s = 0; s < n; s += t.tile) {
        const int64_t part = n - s < t.tile ? n - s : t.tile;
        forward(m, x + s, stride, part, t, false, clock);
        for (int64_t c = 0; c < m.classes; c++)
            memcpy(logits + c * n + s, t.rows + (m.logits + c) * t.stride, part * sizeof(float));
    }
}

}
