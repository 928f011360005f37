// Trains the weights of a network together with their bits, and with those of its activations, against a pressure.
//
// The steps are those of `training.cpp`, with products over lists of live weights and roundings whose bits are
// parameters (`bits.h`). Every step rounds anew, so a step costs what the weights cost that are still alive.
// `bitfront.learned_bits` writes the operations, and shortens the lists between calls.

#include "passes.h"

namespace {

// Columns of a tile from rows of samples: out[feature][place] = x[order[place]][feature]. Zeros behind the last sample.
void gather(const float* x, const int32_t* order, int64_t width, int64_t n, float* out, int64_t stride) {
    for (int64_t s = 0; s < n; s++) {
        const float* from = x + int64_t(order[s]) * width;
        for (int64_t f = 0; f < width; f++) out[f * stride + s] = from[f];
    }
    for (int64_t f = 0; f < width; f++)
        for (int64_t s = n; s < to_lanes(n); s++) out[f * stride + s] = 0;
}

}  // namespace

extern "C" {

// One optimizer step per batch of `order`, the places of samples in `x` (samples x features), `labels` and `targets`
// (samples x classes, or null: then the labels are the targets). `rates` and `betas` have a number per step. The
// parameters from `first_bits` on are bits, and learn `bits_rate` times as fast. `gathered` has room for features +
// classes rows, `widths` for a number per group of weights. Returns the sum of the losses before the steps.
double bitfront_learn(const Member* member, const Scratch* scratch, const Pressure* cost, const float* x,
                      int64_t features, const int32_t* order, const int32_t* labels, const float* targets,
                      int64_t samples, int64_t batch, const double* rates, const double* betas, int64_t taken,
                      int64_t first_bits, double bits_rate, float* gathered, float* widths) {
    const Member& m = *member;
    const Scratch& t = *scratch;
    Clock clock = {nullptr, 0};
    double total = 0;
    int64_t correct = 0;
    float* soft = gathered + features * t.stride;
    for (int64_t k = 0; k * batch < samples; k++) {
        const int32_t* places = order + k * batch;
        const int64_t size = samples - k * batch < batch ? samples - k * batch : batch;
        memset(t.parameter_gradients, 0, m.parameters * sizeof(float));
        prepare_bits(m, *cost, t.packed, widths);
        for (int64_t s = 0; s < size; s += t.tile) {
            const int64_t n = size - s < t.tile ? size - s : t.tile;
            gather(x, places + s, features, n, gathered, t.stride);
            forward(m, gathered, t.stride, n, t, true, clock);
            const float* z = t.rows + m.logits * t.stride;
            float* gradient = t.row_gradients + m.logits * t.stride;
            if (targets) {
                gather(targets, places + s, m.classes, n, soft, t.stride);
                total += soft_entropy(z, gradient, t.stride, soft, t.stride, m.classes, n, size);
            } else {
                int32_t wanted[4096];
                for (int64_t i = 0; i < n; i++) wanted[i] = labels[places[s + i]];
                total += entropy(z, gradient, t.stride, wanted, m.classes, n, size, &correct);
            }
            backward(m, gathered, t.stride, n, t, clock);
        }
        finish_bits(m, *cost, betas[k], t.packed, t.parameter_gradients);
        Optimizer optimizer = {0, 0, rates[k], 0};
        Member part = m;
        part.parameters = first_bits;
        update(part, t.parameter_gradients, optimizer, taken + k + 1);
        optimizer.rate *= bits_rate;
        part.parameters = m.parameters - first_bits;
        part.values += first_bits, part.first_moment += first_bits, part.second_moment += first_bits;
        update(part, t.parameter_gradients + first_bits, optimizer, taken + k + 1);
    }
    return total;
}

// Logits of n samples, x being n x features; `logits` is classes x n. Returns what the bits cost.
double bitfront_learned_logits(const Member* member, const Scratch* scratch, const Pressure* cost, const float* x,
                               int64_t features, const int32_t* order, int64_t n, float* gathered, float* widths,
                               float* logits) {
    const Member& m = *member;
    const Scratch& t = *scratch;
    Clock clock = {nullptr, 0};
    const double total = prepare_bits(m, *cost, t.packed, widths);
    for (int64_t s = 0; s < n; s += t.tile) {
        const int64_t part = n - s < t.tile ? n - s : t.tile;
        gather(x, order + s, features, part, gathered, t.stride);
        forward(m, gathered, t.stride, part, t, false, clock);
        for (int64_t c = 0; c < m.classes; c++)
            memcpy(logits + c * n + s, t.rows + (m.logits + c) * t.stride, part * sizeof(float));
    }
    return total;
}

}
