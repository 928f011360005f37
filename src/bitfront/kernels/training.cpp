// Trains one small network, step by step, with data that stays in the cache. A population calls this for each member.
//
// A network is a list of operations on a table of rows. A row is one feature (of an image: one pixel of one channel) of
// all samples of a tile. Samples lie side by side, so every loop runs over whole vectors of samples. A convolution is
// the same sum of weighted rows as a linear layer, computed once per position. Columns behind the last sample of a tile
// hold arbitrary finite values; gradients there are zero, so they do not change the weights.
//
// A member's arithmetic depends on its operations, the batch and the tile, never on other members or threads.
// Compiled with fused multiply-adds (see `native.py`); `bitfront.population.compiled` writes the operations.

#include "passes.h"

extern "C" {

// `steps` optimizer steps on batches that lie one after another: batch k is `features` rows of `batch` samples,
// `batch_stride` floats apart, and `batch` labels. `losses` gets each batch's mean loss before its step. To `parts`,
// where given, the seconds are added that products, elementwise operations, norms, loss and optimizer take. Returns the
// number of correct answers, counted before the step on each batch.
int64_t bitfront_train(const Member* member, const Scratch* scratch, const Optimizer* optimizer, const float* x,
                       const int32_t* labels, int64_t steps, int64_t features, int64_t batch, int64_t batch_stride,
                       double* losses, double* parts) {
    const Member& m = *member;
    const Scratch& t = *scratch;
    Clock clock = {parts, 0};
    int64_t correct = 0;
    for (int64_t k = 0; k < steps; k++, x += features * batch_stride, labels += batch) {
        clock.start();
        memset(t.parameter_gradients, 0, m.parameters * sizeof(float));
        for (int64_t i = 0; i < m.count; i++)
            if (m.operations[i].kind == PRODUCT) pack(m.operations[i], m.values, t.packed, true);
        clock.stop(PRODUCTS);
        double loss = 0;
        for (int64_t s = 0; s < batch; s += t.tile) {
            const int64_t n = batch - s < t.tile ? batch - s : t.tile;
            forward(m, x + s, batch_stride, n, t, true, clock);
            loss += entropy(t.rows + m.logits * t.stride, t.row_gradients + m.logits * t.stride, t.stride, labels + s,
                            m.classes, n, batch, &correct);
            clock.stop(LOSS);
            backward(m, x + s, batch_stride, n, t, clock);
        }
        losses[k] = loss / batch;
        // Clipped weights get their gradients too: see `transforms.quantize.through`.
        update(m, t.parameter_gradients, *optimizer, optimizer->steps + k + 1);
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
