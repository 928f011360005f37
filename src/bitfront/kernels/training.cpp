// Trains one small network, step by step, with data that stays in the cache. A population calls this for each member.
//
// A network is a list of operations on a table of rows. A row is one feature (of an image: one pixel of one channel) of
// all samples of a tile. Samples lie side by side, so every loop runs over whole vectors of samples. A convolution is
// the same sum of weighted rows as a linear layer, computed once per position. Columns behind the last sample of a tile
// hold arbitrary finite values; gradients there are zero, so they do not change the weights.
//
// A member's arithmetic depends on its operations, the batch and the tile, never on other members or threads.
// Compiled with fused multiply-adds (see `native.py`); `bitfront.population.compiled` writes the operations.

#include <math.h>
#include <time.h>

#include "layers.h"
#include "products.h"

namespace {

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
        const float* up = t.row_gradients + op.out * t.stride;
        float* down = t.row_gradients + op.in * t.stride;  // not touched where the input is the batch
        if (op.kind == PRODUCT) {
            weight_gradient(op, up, t.stride, in.first, in.stride, n, t.parameter_gradients + op.weight);
            if (op.bias >= 0)
                for (int64_t o = 0; o < op.channels; o++)
                    t.parameter_gradients[op.bias + o] += over_channel(op.positions, n, [&](int64_t p, int64_t s) {
                        return at(up + (o * op.positions + p) * t.stride + s);
                    });
            if (op.adds >= 0)
                product(packed_of(op, t.packed).backward, op.blocks, op.backward, op.channels, up, op.positions,
                        t.stride, down, op.channels_in, op.positions_in, t.stride, n, nullptr, op.adds == 1);
        } else if (op.kind == ACTIVATE) {
            if (op.adds >= 0) BY_GRIDS(activate_back, op, in.first, in.stride, up, down, t.stride, whole);
        } else if (op.kind == NORM) {
            norm_back(op, m, in.first, in.stride, up, down, t.stride, n, t.packed, t.parameter_gradients);
        } else if (op.kind == ADD) {
            const int64_t places[2] = {op.in, op.in2}, adds[2] = {op.adds, op.adds2};
            for (int side = 0; side < 2; side++) {
                float* to = t.row_gradients + places[side] * t.stride;
                for (int64_t r = 0; adds[side] >= 0 && r < op.channels * op.positions; r++)
                    for (int64_t s = 0; s < whole; s++)
                        to[r * t.stride + s] = (adds[side] ? to[r * t.stride + s] : 0.0f) + up[r * t.stride + s];
            }
        } else if (op.adds >= 0) {
            if (op.adds == 0) memset(down, 0, op.channels * op.positions_in * t.stride * sizeof(float));
            const float* out = t.rows + op.out * t.stride;
            float* left = t.row_gradients - t.stride;  // the row before the first is free memory
            pool_back(op, in.first, in.stride, out, up, down, t.stride, whole, left);
        }
        clock.stop(part_of(op));
    }
}

// Sum of the cross entropies of n samples, and the gradient of their mean over `batch` samples.
double entropy(const float* z, float* gradient, int64_t stride, const int32_t* labels, int64_t classes, int64_t n,
               int64_t batch, int64_t* correct) {
    Doubles total = {};
    Ints hits = {};
    const float share = 1.0f / batch;
    for (int64_t s = 0; s < n; s += LANES) {
        const Ints there = exist(s, n);
        Ints label = {}, arg = {};
        memcpy(&label, labels + s, (n - s < LANES ? n - s : LANES) * sizeof(int32_t));
        Floats best = at(z + s), label_logit = {}, norm = {};
        for (int32_t c = 0; c < classes; c++) {
            Floats v = at(z + c * stride + s);
            arg = v > best ? (Ints){} + c : arg;
            best = v > best ? v : best;
            label_logit = label == c ? v : label_logit;
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
        Floats loss = log_from_one(norm) + (best - label_logit);
        loss = norm == norm ? loss : norm;
        total += __builtin_convertvector(only(loss, there), Doubles);
        hits -= (arg == label) & there;
    }
    double sum_of_losses = 0;
    for (int i = 0; i < LANES; i++) {
        sum_of_losses += total[i];
        *correct += hits[i];
    }
    return sum_of_losses;
}

// The optimizers of torch.optim with its defaults: betas 0.9 and 0.999, eps 1e-8; SGD with Nesterov momentum 0.9.
void update(const Member& m, const float* parameter_gradients, const Optimizer& o, int64_t step) {
    const float rate = o.rate, decay = o.decay, shrink = 1.0 - o.rate * o.decay;
    float *__restrict p = m.values, *__restrict a = m.first_moment, *__restrict b = m.second_moment;
    const float* __restrict g0 = parameter_gradients;
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
