// Convolutions and sums that follow each other, in one call: a few samples at a time go through all of them, so that what
// one leaves stays in the cache for the next. Each is computed as alone; only the order of the work is another one.
#pragma once

#include <stdlib.h>

#include "convolution.h"

enum Kind { OF_BYTES, DEPTHWISE, SUM };
// What all states of a step share: the shape of one sample (of a sum: rows of `width` pixels), and the batch norms and
// ReLUs that are pending for its inputs. The second input is that of a sum; the first one's ReLU is that of a sum, because
// roundings have theirs in their numbers. `bytes` is the size of the result of one sample.
struct Stage {
    Shape shape;
    int64_t kind, bytes;
    int64_t mode, alpha, beta, rectify, second_mode, second_alpha, second_beta, second_rectify;
};
// A state: its address, bytes from sample to sample (0 where it is in memory of the chain, which is given an address
// here), values from pixel to pixel, and which states may take its place in memory (those of the same `size`).
struct Place { int64_t address, hop, step, size; };
// The work on one input of a stage: the places of its inputs, and the range of its products, whose places have the same
// numbers.
struct Task { int64_t stage, left, right, first, last; };

// out = a + b, `rows` rows of `length`, each operand after its batch norm and, with a floor of 0, its ReLU.
template <int left, int right>
static void add_rows(const float* a, const float* b, float* __restrict out, int64_t rows, int64_t length,
                     int64_t a_stride, int64_t b_stride, const float* a_alpha, const float* a_beta,
                     const float* b_alpha, const float* b_beta, float a_floor, float b_floor) {
    for (int64_t r = 0; r < rows; r++, a += a_stride, b += b_stride, out += length)
        for (int64_t i = 0; i < length; i++) {
            float v = affine<left>(a[i], a_alpha, a_beta, i), w = affine<right>(b[i], b_alpha, b_beta, i);
            v = v < a_floor ? a_floor : v;
            w = w < b_floor ? b_floor : w;
            out[i] = v + w;
        }
}

static void add_normalised(const float* a, const float* b, float* out, int64_t rows, int64_t length, int64_t a_stride,
                           int64_t b_stride, const float* a_alpha, const float* a_beta, int32_t a_mode, float a_floor,
                           const float* b_alpha, const float* b_beta, int32_t b_mode, float b_floor) {
#define RUN(l, r)                                                                                                \
    add_rows<l, r>(a, b, out, rows, length, a_stride, b_stride, a_alpha, a_beta, b_alpha, b_beta, a_floor, b_floor)
    if (a_mode == NONE && b_mode == NONE) RUN(NONE, NONE);
    else if (a_mode == NONE) b_mode == SEPARATE ? RUN(NONE, SEPARATE) : RUN(NONE, FUSED);
    else if (b_mode == NONE) a_mode == SEPARATE ? RUN(SEPARATE, NONE) : RUN(FUSED, NONE);
    else a_mode == SEPARATE ? RUN(SEPARATE, SEPARATE) : RUN(FUSED, FUSED);
#undef RUN
}

// Gives the places of the chain's memory their addresses, from 0: a place is free after its last task. Returns the size of
// that memory, or -1 where there is no memory to find it out.
static int64_t assign(int64_t stages, const Stage* stage, int64_t tasks, const Task* task, int64_t places, Place* place,
                      int64_t samples) {
    int64_t* last = (int64_t*)malloc((2 * places + stages) * sizeof(int64_t));
    if (!last) return -1;
    int64_t *next = last + places, *head = next + places, end = 0;
    for (int64_t k = 0; k < stages; k++) head[k] = -1;
    for (int64_t t = 0; t < tasks; t++) {
        last[task[t].left] = t;
        if (task[t].right >= 0) last[task[t].right] = t;
    }
    for (int64_t t = 0; t < tasks; t++) {
        for (int64_t p = task[t].first; p < task[t].last; p++) {
            if (place[p].hop) continue;
            int64_t& top = head[place[p].size];
            if (top >= 0) {
                place[p].address = place[top].address;
                top = next[top];
            } else {
                place[p].address = end;
                end += (stage[task[t].stage].bytes * samples + 63) / 64 * 64;
            }
        }
        const int64_t read[2] = {task[t].left, task[t].right == task[t].left ? -1 : task[t].right};
        for (int64_t p : read) {
            if (p < 0 || place[p].hop || last[p] != t) continue;
            next[p] = head[place[p].size];
            head[place[p].size] = p;
        }
    }
    free(last);
    return end;
}

template <int mode>
static int32_t convolve_one(const Stage& stage, const Shape& s, const Input& input, const Product* products,
                            const float* numbers, void* kept) {
    const float *alpha = (const float*)stage.alpha, *beta = (const float*)stage.beta;
    return stage.kind == OF_BYTES ? convolve<mode>(s, input, products, numbers, alpha, beta, (uint8_t*)kept)
                                  : convolve<mode>(s, input, products, numbers, alpha, beta, (float*)kept);
}

// A task for some samples.
static int32_t work(const Stage& stage, const Task& t, const Place* place, int64_t sample, int64_t samples,
                    Product* products, const float* numbers, void* kept) {
    Shape s = stage.shape;
    s.samples = samples;
    const Place& left = place[t.left];
    const int64_t address = left.address + sample * left.hop;
    if (stage.kind == SUM) {
        const Place &right = place[t.right], &out = place[t.first];
        add_normalised((const float*)address, (const float*)(right.address + sample * right.hop),
                       (float*)(out.address + sample * out.hop), samples * s.height, s.width * s.depth,
                       s.width * left.step, s.width * right.step, (const float*)stage.alpha, (const float*)stage.beta,
                       (int32_t)stage.mode, stage.rectify ? 0.0f : -__builtin_inff(), (const float*)stage.second_alpha,
                       (const float*)stage.second_beta, (int32_t)stage.second_mode,
                       stage.second_rectify ? 0.0f : -__builtin_inff());
        return 0;
    }
    for (int64_t p = t.first; p < t.last; p++) products[p].out = place[p].address + sample * place[p].hop;
    const Input input = {address, left.step, t.first, t.last};
    auto run = stage.mode == NONE ? convolve_one<NONE> : stage.mode == SEPARATE ? convolve_one<SEPARATE>
                                                                                 : convolve_one<FUSED>;
    return run(stage, s, input, products, numbers, kept);
}
