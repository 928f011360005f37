// Linear layers and convolutions: weighted sums of rows, the gradients of weights, and weights packed for both.
#pragma once

#include "network.h"

namespace {

// `rows` rows of the output, `vectors` vectors each, += or = sum over (block, position) of the list, and channels j
// below `depth`, of packed[block][j][row] * source[j * channel_step + position * stride].
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
        const int32_t *starts = op.pairs.starts, *pairs = op.pairs.pairs;
        const int32_t *pair = pairs + 2 * starts[k], *end = pairs + 2 * starts[k + 1];
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

// Weights in the layout of `product`, rounded to their grid: forward, then bias, then (training only) backward.
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

}  // namespace
