// One pass of a network over a tile of samples, forward and backward; its loss; and the step of the optimizer.
#pragma once

#include <math.h>
#include <time.h>

#include "bits.h"
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

Part part_of(const Operation& op) {
    return op.kind == PRODUCT || op.kind == SPARSE ? PRODUCTS : op.kind == NORM ? NORMS : ELEMENTWISE;
}

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
        } else if (op.kind == SPARSE) {
            const SlotBits w = slots_of(op, t.packed);
            listed_product(op.forward, op.channels * op.positions, w.value, in.first, in.stride, out.first, out.stride,
                           whole, w.bias, op.positions, false);
        } else if (op.kind == ROUND) {
            learned_round(op, t.packed, in.first, in.stride, out.first, out.stride, whole);
        } else if (op.kind == ACTIVATE) {
            BY_GRIDS(activate, op, in.first, in.stride, out.first, out.stride, whole);
        } else if (op.kind == BEND) {
            bend(op, in.first, in.stride, out.first, out.stride, whole);
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
        if (op.kind == PRODUCT || op.kind == SPARSE) {
            if (op.kind == PRODUCT)
                weight_gradient(op, up, t.stride, in.first, in.stride, n, t.parameter_gradients + op.weight);
            else
                listed_gradient(op, up, t.stride, in.first, in.stride, whole, t.parameter_gradients + op.weight);
            if (op.bias >= 0)
                for (int64_t o = 0; o < op.channels; o++)
                    t.parameter_gradients[op.bias + o] += over_channel(op.positions, n, [&](int64_t p, int64_t s) {
                        return at(up + (o * op.positions + p) * t.stride + s);
                    });
            if (op.adds >= 0 && op.kind == SPARSE)
                listed_product(op.backward, op.channels_in * op.positions_in, slots_of(op, t.packed).value, up,
                               t.stride, down, t.stride, whole, nullptr, 1, op.adds == 1);
            else if (op.adds >= 0)
                product(packed_of(op, t.packed).backward, op.blocks, op.backward, op.channels, up, op.positions,
                        t.stride, down, op.channels_in, op.positions_in, t.stride, n, nullptr, op.adds == 1);
        } else if (op.kind == ROUND) {
            learned_round_back(op, t.packed, in.first, in.stride, t.rows + op.out * t.stride, up, down, t.stride, whole,
                               t.parameter_gradients);
        } else if (op.kind == ACTIVATE) {
            if (op.adds >= 0) BY_GRIDS(activate_back, op, in.first, in.stride, up, down, t.stride, whole);
        } else if (op.kind == BEND) {
            if (op.adds >= 0) bend_back(op, in.first, in.stride, up, down, t.stride, whole);
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

// The same for targets that are probabilities: `targets` are rows of classes, like `z`.
double soft_entropy(const float* z, float* gradient, int64_t stride, const float* targets, int64_t targets_stride,
                    int64_t classes, int64_t n, int64_t batch) {
    Doubles total = {};
    const float share = 1.0f / batch;
    for (int64_t s = 0; s < n; s += LANES) {
        const Ints there = exist(s, n);
        Floats best = at(z + s), norm = {}, expected = {};
        for (int64_t c = 1; c < classes; c++) {
            Floats v = at(z + c * stride + s);
            best = v > best ? v : best;
        }
        for (int64_t c = 0; c < classes; c++) {
            const Floats v = at(z + c * stride + s) - best, e = exp_nonpositive(v);
            put(gradient + c * stride + s, e);
            norm += e;
            expected += at(targets + c * targets_stride + s) * v;
        }
        const Floats factor = share / norm;
        for (int64_t c = 0; c < classes; c++) {
            const Floats g = at(gradient + c * stride + s) * factor - share * at(targets + c * targets_stride + s);
            put(gradient + c * stride + s, only(g, there));
        }
        Floats loss = log_from_one(norm) - expected;
        loss = norm == norm ? loss : norm;
        total += __builtin_convertvector(only(loss, there), Doubles);
    }
    double sum_of_losses = 0;
    for (int i = 0; i < LANES; i++) sum_of_losses += total[i];
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
