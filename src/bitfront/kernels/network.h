// The network that is trained, as structures of plain numbers and addresses, and small functions on vectors of floats.
#pragma once

#include "whole.h"

namespace {

// Rows and vectors of a block of a product that stay in registers; RO x RI products of rows for weight gradients.
#ifdef __AVX512F__
enum { MR = 8, NR = 3, RO = 4, RI = 4 };
#else
enum { MR = 4, NR = 1, RO = 4, RI = 4 };
#endif

enum Kind { PRODUCT, ACTIVATE, NORM, ADD, LARGEST, MEAN, ROUND, SPARSE, BEND };
enum Part { PRODUCTS, ELEMENTWISE, NORMS, LOSS, OPTIMIZER, PARTS };

struct Grid {
    float scale, low, high, step;  // clamp(round(x * scale), low, high) * step; with scale 0 x is not rounded
    float way;                     // how it is rounded: a Way
};

// Which rows of two sets belong together, as lists: starts[i] to starts[i + 1] are the entries of list i, pairs of
// integers.
struct Lists {
    const int32_t* starts;
    const int32_t* pairs;
};

// Mirrored by `training.py`. `in`, `in2` and `out` count rows of the table; -1 is the batch. Other offsets count
// floats.
struct Operation {
    int64_t kind, in, in2, out;
    int64_t adds, adds2;           // gradient of in and in2: 1 is added, 0 is written, -1 is not needed
    int64_t channels_in, channels; // a row is channel * positions + position
    int64_t positions_in, positions;
    int64_t blocks;                // weights of a convolution per pair of channels: the size of its kernel
    int64_t weight, bias;          // offsets in the parameters; -1: none
    int64_t state;                 // offset in the buffers (running mean, then variance); -1: none
    int64_t scratch;               // PRODUCT: packed weights; NORM: mean and 1 / deviation
    Lists forward;                 // per position of the output: (block, position of the input); SPARSE: per row, (live weight, row)
    Lists backward;                // per position of the input: (block, position of the output)
    Lists pairs;                   // per block: (position of the output, position of the input)
    Grid first, second;            // ACTIVATE: before and after the ReLU; PRODUCT: weight and bias; BEND: see there
    float rectify, momentum, epsilon;
    int64_t fractions, integers;   // ROUND, SPARSE: offsets of the learned bits in the parameters
    int64_t bias_fractions, slots; // SPARSE: offset of the bits of the bias; number of live weights
    int64_t source;                // SPARSE: the operation that rounds its input
    const int32_t* groups;         // row (ROUND) or live weight (SPARSE) -> which learned bits
    int64_t widths, bias_widths;   // the magnitudes that there may be, as bits; 0: any
    int64_t sharing;               // SPARSE: weights that share bits, those that were removed too
    int64_t way;                   // ROUND: how values become whole numbers
};

struct Member {
    const Operation* operations;
    int64_t count, parameters, logits, classes;
    float *values, *buffers, *first_moment, *second_moment;  // parameters, running statistics, the optimizer's moments
};

struct Scratch {
    float *rows, *row_gradients, *packed, *parameter_gradients;
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
    float v = x * g.scale;
    v = g.way == EVEN ? whole<EVEN>(v) : g.way == HALF_UP ? whole<HALF_UP>(v) : whole<FLOOR>(v);
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
// A mask of the lanes that hold samples, counted from `s`: all ones there, else zeros.
inline Ints exist(int64_t s, int64_t n) {
    Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (lane - (int32_t)(n - s < LANES ? n - s : LANES)) >> 31;
}
inline Floats only(Floats v, Ints wanted) { return (Floats)((Ints)v & wanted); }

}  // namespace
