// The inner loops of an evaluation, each one pass over memory: rounding to a fixed-point grid, addition, and the cross
// entropy of many candidates at once. Compiled on the user's machine by `native.py`; `plain.py` computes the same, to
// the last bit, with torch alone. So everything here is written as single IEEE operations in a fixed order: no fused
// multiply-add (-ffp-contract=off), no exp or log of a library.

#include "floats.h"
#include "scaled.h"
#include "chain.h"

static inline int64_t clipped(int64_t n) { return n < 0 ? 0 : n > LANES ? LANES : n; }

// The first n of LANES floats, all of them where `full`; the rest 0.
template <bool full> static inline Floats load(const float* from, int64_t n) {
    Floats v = {};
    memcpy(&v, from, full ? sizeof v : clipped(n) * sizeof(float));
    return v;
}

// Up to WIDE vectors of samples of one state. They are interleaved, because a vector alone is a long chain of dependent
// operations. Adds the rounded losses to `lanes` and the number of correct answers to `right`.
enum { WIDE = 4, TILE = WIDE * LANES };
template <bool full>
static inline __attribute__((always_inline)) void score_tile(const float* z, const int32_t* labels, int64_t classes,
                                                             int64_t samples, int64_t n, float floor, Doubles* lanes,
                                                             Ints* right) {
    Floats lowest = all(floor), best[WIDE], label_logit[WIDE], sum[WIDE];
    Ints arg[WIDE], label[WIDE];
#define EACH _Pragma("GCC unroll 4") for (int k = 0; k < WIDE; k++)
    EACH {
        label[k] = (Ints){} - 1;
        memcpy(&label[k], labels + k * LANES, full ? sizeof label[k] : clipped(n - k * LANES) * sizeof(int32_t));
        best[k] = all(-__builtin_inff());
        label_logit[k] = sum[k] = all(0.0f);
        arg[k] = (Ints){};
    }
    for (int32_t c = 0; c < classes; c++)
        EACH {
            Floats v = load<full>(z + c * samples + k * LANES, n - k * LANES);
            v = v < lowest ? lowest : v;
            Ints more = v > best[k];  // false for a NaN, which stays in `sum` below
            arg[k] = more ? (Ints){} + c : arg[k];
            best[k] = more ? v : best[k];
            label_logit[k] = label[k] == c ? v : label_logit[k];
        }
    for (int32_t c = 0; c < classes; c++)
        EACH {
            Floats v = load<full>(z + c * samples + k * LANES, n - k * LANES);
            v = v < lowest ? lowest : v;
            sum[k] += exp_nonpositive(v - best[k]);
        }
    EACH {
        Floats loss = log_from_one(sum[k]) + (best[k] - label_logit[k]);
        loss = sum[k] == sum[k] ? loss : sum[k];
        Floats scaled = loss * 1048576.0f;  // never negative
        scaled = scaled < 8388608.0f ? (scaled + 8388608.0f) - 8388608.0f : scaled;
        loss = label[k] < 0 ? all(0.0f) : scaled * 9.5367431640625e-7f;
        *lanes += __builtin_convertvector(loss, Doubles);
        *right -= (arg[k] == label[k]);
    }
#undef EACH
}

template <int mode>
static void round_blocks(const float* in, float* out, int64_t blocks, const int64_t* in_places,
                         const int64_t* out_places, int64_t rows, int64_t length, int64_t in_stride,
                         const float* formats, const float* alpha, const float* beta) {
    for (int64_t b = 0; b < blocks; b++) {
        const float* source = in + in_places[b];
        float* target = out + out_places[b];
        for (int64_t r = 0; r < rows; r++, source += in_stride, target += length)
            round_row<mode>(source, target, length, formats + NUMBERS * b, alpha, beta);
    }
}

// Rows of w times a tile of columns of x, summed in float64 in the order of k. Each product is exact, so it makes no
// difference whether product and sum are fused.
template <bool full, int rows>
static inline void ordered_tile(const float* x, const float* w, float* out, int64_t k_size, int64_t samples, int64_t n) {
    Doubles sum[rows] = {};
    for (int64_t k = 0; k < k_size; k++) {
        Doubles v = __builtin_convertvector(load<full>(x + k * samples, n), Doubles);
        for (int r = 0; r < rows; r++) sum[r] += (double)w[r * k_size + k] * v;
    }
    for (int r = 0; r < rows; r++) {
        Floats rounded = __builtin_convertvector(sum[r], Floats);
        memcpy(out + r * samples, &rounded, full ? sizeof rounded : clipped(n) * sizeof(float));
    }
}

template <int rows>
static void ordered_rows(const float* x, const float* w, float* out, int64_t k_size, int64_t samples) {
    int64_t s = 0;
    for (; s + LANES <= samples; s += LANES) ordered_tile<true, rows>(x + s, w, out + s, k_size, samples, LANES);
    if (s < samples) ordered_tile<false, rows>(x + s, w, out + s, k_size, samples, samples - s);
}

extern "C" {

// Rounds a tensor whose blocks have a power of two each. It has 1 to MOST_DIMS dimensions, in the order of memory; the
// values of the last one are neighbours. Input and output have the same strides. A block has so many values along each
// dimension, at least 1. `way` and the numbers `f` are those of the enumerations above.
void bitfront_round_scaled(const float* in, float* out, int32_t dims, const int64_t* sizes, const int64_t* strides,
                           const int64_t* blocks, int32_t way, const float* f) {
    auto run = way == MULTIPLES ? round_scaled<MULTIPLES> : way == FLOATS ? round_scaled<FLOATS> : round_scaled<POWERS>;
    run(in, out, dims, sizes, strides, blocks, f);
}

// out[b] = w[b] · x[b], each value summed in float64 in the order of k and rounded once. x has shape (batch, k, samples),
// out (batch, rows, samples); w has shape (rows, k) and a distance of `w_stride` from one b to the next.
void bitfront_ordered(const float* x, const float* w, float* out, int64_t batch, int64_t rows, int64_t k_size,
                      int64_t samples, int64_t w_stride) {
    for (int64_t b = 0; b < batch; b++, x += k_size * samples, w += w_stride, out += rows * samples) {
        int64_t r = 0;
        for (; r + 8 <= rows; r += 8) ordered_rows<8>(x, w + r * k_size, out + r * samples, k_size, samples);
        for (; r + 4 <= rows; r += 4) ordered_rows<4>(x, w + r * k_size, out + r * samples, k_size, samples);
        for (; r < rows; r++) ordered_rows<1>(x, w + r * k_size, out + r * samples, k_size, samples);
    }
}

// out = out · scale + bias in place, two roundings. There are `rows` rows of `length` values. With `per_value` a row has
// one scale and one bias per value and `channels` is `length`; otherwise row r has those of channel r % channels. There
// is a set of `channels` scales for every `rows_per_scale` rows. `bias` may be null.
void bitfront_scale(float* out, int64_t rows, int64_t length, int64_t rows_per_scale, int64_t channels,
                    int32_t per_value, const float* scale, const float* bias) {
    for (int64_t r = 0; r < rows; r++, out += length) {
        const float* s = scale + r / rows_per_scale * channels;
        if (per_value && bias)
            for (int64_t i = 0; i < length; i++) out[i] = out[i] * s[i] + bias[i];
        else if (per_value)
            for (int64_t i = 0; i < length; i++) out[i] = out[i] * s[i];
        else if (bias) {
            const float factor = s[r % channels], sum = bias[r % channels];
            for (int64_t i = 0; i < length; i++) out[i] = out[i] * factor + sum;
        } else {
            const float factor = s[r % channels];
            for (int64_t i = 0; i < length; i++) out[i] = out[i] * factor;
        }
    }
}

// For each of `blocks` blocks: `rows` rows of `length` floats, `in_stride` apart in the input and contiguous in the
// output, rounded with the six numbers of the block. Places count elements. `alpha` and `beta` (length,) belong to the
// batch norm of mode `mode`.
void bitfront_round(const float* in, float* out, int64_t blocks, const int64_t* in_places, const int64_t* out_places,
                    int64_t rows, int64_t length, int64_t in_stride, const float* formats, const float* alpha,
                    const float* beta, int32_t mode) {
    auto run = mode == NONE ? round_blocks<NONE> : mode == SEPARATE ? round_blocks<SEPARATE> : round_blocks<FUSED>;
    run(in, out, blocks, in_places, out_places, rows, length, in_stride, formats, alpha, beta);
}

// Whether convolutions of bytes are faster than those of floats here.
int32_t bitfront_fast_bytes() { return FAST_BYTES; }

// Convolutions (convolution.h). For each of `inputs` inputs six numbers that say how it is rounded: to bytes with
// `bytes`, and all channels are multiplied with all; otherwise to floats, and each channel is multiplied with its
// weight. `alpha` and `beta` are those of `bitfront_round`, for a row of the input. `kept` has room for the rows that
// are in use. Returns 1 if a NaN was rounded to bytes, else 0.
int32_t bitfront_convolve(const Shape* shape, int64_t inputs, const Input* input, const Product* products,
                          const float* numbers, const float* alpha, const float* beta, int32_t mode, int32_t bytes,
                          void* kept) {
    auto run = mode == NONE ? convolve_all<NONE> : mode == SEPARATE ? convolve_all<SEPARATE> : convolve_all<FUSED>;
    return run(*shape, inputs, input, products, numbers, alpha, beta, bytes, kept);
}

// Convolutions and sums that follow each other (chain.h), `at_once` samples at a time. `tasks` are in an order in which
// inputs come before what is computed of them; for each task of a convolution there are the numbers of its rounding.
// `kept` is the size of the rows of an input that are in use. Returns 1 if a NaN was rounded to bytes, -1 if there is no
// memory, else 0.
int32_t bitfront_chain(int64_t stages, const Stage* stage, int64_t tasks, const Task* task, int64_t places, Place* place,
                       Product* products, const float* numbers, int64_t samples, int64_t at_once, int64_t kept) {
    const int64_t size = assign(stages, stage, tasks, task, places, place, at_once);
    char* memory = size < 0 ? nullptr : (char*)malloc(size + kept + 128);
    if (!memory) return -1;
    char* start = (char*)(((int64_t)memory + 63) / 64 * 64);
    for (int64_t p = 0; p < places; p++)
        if (!place[p].hop) place[p].address += (int64_t)start;
    int32_t has_nan = 0;
    for (int64_t i = 0; i < samples; i += at_once)
        for (int64_t t = 0; t < tasks; t++)
            has_nan |= work(stage[task[t].stage], task[t], place, i, samples - i < at_once ? samples - i : at_once,
                            products, numbers + t * NUMBERS, start + size);
    free(memory);
    return has_nan;
}

// out = a + b, `rows` rows of `length`, each operand after its batch norm (modes as above) and, with a floor of 0, its
// ReLU.
void bitfront_add(const float* a, const float* b, float* out, int64_t rows, int64_t length, int64_t a_stride,
                  int64_t b_stride, const float* a_alpha, const float* a_beta, int32_t a_mode, float a_floor,
                  const float* b_alpha, const float* b_beta, int32_t b_mode, float b_floor) {
    add_normalised(a, b, out, rows, length, a_stride, b_stride, a_alpha, a_beta, a_mode, a_floor, b_alpha, b_beta, b_mode,
                   b_floor);
}

// Logits of shape (states, classes, samples), contiguous; labels of shape (samples,). Computes per state the sum of the
// cross entropies, each rounded to a multiple of 2^-20 so that the sum is exact in any order, and the number of samples
// whose largest logit (the first of equal ones) is the label's. With `rectify` the logits pass a ReLU first.
void bitfront_score(const float* logits, const int32_t* labels, int64_t states, int64_t classes, int64_t samples,
                    int32_t rectify, double* loss, int64_t* correct) {
    const float floor = rectify ? 0.0f : -__builtin_inff();
    for (int64_t u = 0; u < states; u++) {
        const float* z = logits + u * classes * samples;
        Doubles lanes = {};
        Ints right = {};
        int64_t start = 0;
        for (; start + TILE <= samples; start += TILE)
            score_tile<true>(z + start, labels + start, classes, samples, TILE, floor, &lanes, &right);
        if (start < samples)
            score_tile<false>(z + start, labels + start, classes, samples, samples - start, floor, &lanes, &right);
        double total = 0;
        int64_t hits = 0;
        for (int k = 0; k < LANES; k++) {
            total += lanes[k];
            hits += right[k];
        }
        loss[u] = total;
        correct[u] = hits;
    }
}

}
