// Causal attention and the softcapped cross-entropy in fp32, for CPUs of any kind: what tools/cpu/cpu_kernels.py compiles and
// calls where bf16 is not multiplied in hardware. The functions are those of cpu_kernels.cpp, in vectors of the compiler
// rather than of one instruction set. All matrices are row-major; sizes and strides are in elements.
//
// Attention works on the transposed scores, keys down and 64 queries across: then what belongs to a query (its maximum,
// its sum) is in one lane from the first key to the last, and no step adds or compares across lanes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using i64 = int64_t;

#if defined(__AVX512F__)
static const int LANES = 16;
#elif defined(__AVX__)
static const int LANES = 8;
#else
static const int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static const int QUERIES = 64, STRIP = 16, KEYS = 256;  // queries of a block; keys of a strip; keys of scores in the cache
static const float LOG2E = 1.44269504f;

static inline vec load(const float* from) {
    vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float* to, vec x) { std::memcpy(to, &x, sizeof x); }

static inline vec spread(float x) { return x - vec{}; }

static inline ints lane_numbers() {
    ints numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

static inline vec larger(vec a, vec b) { return a > b ? a : b; }

static inline float sum_of(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// 2^x for x from -126 to 127, what is beyond counts as the nearer of them, and NaN stays NaN: the whole part goes into the
// exponent, a polynomial does the rest, to 2e-7.
static inline vec exp2_of(vec x) {
    x = x < -126.0f ? spread(-126.0f) : x;
    x = x > 127.0f ? spread(127.0f) : x;
    vec shifted = x + 12582912.0f;  // 1.5 * 2^23: no digit after the point is left, the lowest bits are the whole part
    vec f = x - (shifted - 12582912.0f);
    vec p = spread(1.5403530e-4f);  // Taylor's coefficients, ln(2)^n / n!
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (vec)((ints)p + ((ints)shifted << 23));
}

// ---------- Products --------------------------------------------------------------------------------------------------
// ROWS x PANELS vectors of C (+)= A B. Of A, element [r, k] is at r * a_row + k * a_step; rows of B and C are contiguous.
template <int ROWS, int PANELS>
static inline void tile(i64 depth, const float* A, i64 a_row, i64 a_step, const float* B, i64 ldb, float* C, i64 ldc,
                        bool add) {
    vec sums[ROWS][PANELS];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) sums[r][p] = add ? load(C + r * ldc + p * LANES) : vec{};
    for (i64 k = 0; k < depth; k++) {
        vec b[PANELS];
        for (int p = 0; p < PANELS; p++) b[p] = load(B + k * ldb + p * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < PANELS; p++) sums[r][p] += A[r * a_row + k * a_step] * b[p];
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) store(C + r * ldc + p * LANES, sums[r][p]);
}

template <int PANELS>
static void panel(i64 rows, i64 depth, const float* A, i64 a_row, i64 a_step, const float* B, i64 ldb, float* C, i64 ldc,
                  bool add) {
    i64 r = 0;
    for (; r + 6 <= rows; r += 6) tile<6, PANELS>(depth, A + r * a_row, a_row, a_step, B, ldb, C + r * ldc, ldc, add);
    for (; r + 2 <= rows; r += 2) tile<2, PANELS>(depth, A + r * a_row, a_row, a_step, B, ldb, C + r * ldc, ldc, add);
    for (; r < rows; r++) tile<1, PANELS>(depth, A + r * a_row, a_row, a_step, B, ldb, C + r * ldc, ldc, add);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns in whole vectors.
static void multiply(i64 rows, i64 columns, i64 depth, const float* A, i64 a_row, i64 a_step, const float* B, i64 ldb,
                     float* C, i64 ldc, bool add) {
    i64 c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES) panel<2>(rows, depth, A, a_row, a_step, B + c, ldb, C + c, ldc, add);
    for (; c < columns; c += LANES) panel<1>(rows, depth, A, a_row, a_step, B + c, ldb, C + c, ldc, add);
}

// ---------- Attention -------------------------------------------------------------------------------------------------
struct Shape {
    i64 B, T, H, K, d;  // batch, time, query heads, key-value heads, width of a head
    i64 padded() const { return (d + LANES - 1) / LANES * LANES; }
};

// out [columns, rows] = in [rows, columns]
static void transpose(const float* in, i64 in_stride, i64 rows, i64 columns, float* out, i64 out_stride) {
    for (i64 c = 0; c < columns; c += LANES)
        for (i64 r = 0; r < rows; r++)
            for (i64 i = c; i < std::min(columns, c + LANES); i++) out[i * out_stride + r] = in[r * in_stride + i];
}

// out [64, padded] = in [64, d], with zeros behind each row
static void copy_rows(const float* in, i64 in_stride, i64 d, float* out, i64 padded) {
    for (i64 i = 0; i < QUERIES; i++) {
        std::copy(in + i * in_stride, in + i * in_stride + d, out + i * padded);
        std::fill(out + i * padded + d, out + (i + 1) * padded, 0.0f);
    }
}

// Of `keys` keys, how many come before the block of queries: all its queries see those. `first` is the number of the
// first key, `start` that of the first query; the rest is seen from its own place on, in strips of 16 keys.
static inline i64 keys_before(i64 first, i64 keys, i64 start) { return std::min(keys, std::max<i64>(0, start - first)); }

// Scores S [keys, 64], keys down: of the keys that begin at `at`, with queries across [d, 64]. Those that a query may not
// see are left as they were, or hidden later.
static void scores(const float* at, i64 stride, i64 keys, i64 before, i64 d, const float* across, float* S) {
    multiply(before, QUERIES, d, at, stride, 1, across, QUERIES, S, QUERIES, false);
    for (i64 j = before; j < keys; j += STRIP) {
        i64 skip = j - before;
        multiply(STRIP, QUERIES - skip, d, at + j * stride, stride, 1, across + skip, QUERIES, S + j * QUERIES + skip,
                 QUERIES, false);
    }
}

// C [d, 64] (+)= A^T B over keys: A [keys, d] as it lies in memory, B [keys, 64] with queries across.
static void over_keys(i64 d, i64 keys, i64 before, const float* A, i64 stride, const float* B, float* C, bool add) {
    multiply(d, QUERIES, before, A, 1, stride, B, QUERIES, C, QUERIES, add);
    for (i64 j = before; j < keys; j += STRIP) {
        i64 skip = j - before;
        multiply(d, QUERIES - skip, STRIP, A + j * stride, 1, stride, B + j * QUERIES + skip, QUERIES, C + skip, QUERIES,
                 true);
    }
}

// C [keys, padded] += A B over queries: A [keys, 64], B [64, padded].
static void over_queries(i64 keys, i64 before, i64 padded, const float* A, const float* B, float* C) {
    multiply(before, padded, QUERIES, A, QUERIES, 1, B, padded, C, padded, true);
    for (i64 j = before; j < keys; j += STRIP) {
        i64 skip = j - before;
        multiply(STRIP, padded, QUERIES - skip, A + j * QUERIES + skip, QUERIES, 1, B + skip * padded, padded,
                 C + j * padded, padded, true);
    }
}

// All bits where a query of the vector sees a key that comes `ahead` places after the first of them.
static inline ints seen(i64 ahead) { return lane_numbers() >= int32_t(std::min<i64>(ahead, LANES)); }

static inline vec only(ints mask, vec x) { return (vec)((ints)x & mask); }

// y [B, T, H, d] and, for the way back, the base-2 logarithm of each query's sum of exponentials, [B, H, T].
extern "C" void attention_forward(const float* q, const float* k, const float* v, float* y, float* logs,
                                  const i64* sizes, int threads) {
    Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    i64 T = s.T, d = s.d, G = s.H / s.K, q_row = s.H * d, k_row = s.K * d;
    float scale = LOG2E / std::sqrt(float(d));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> across(d * QUERIES), S(T * QUERIES), out(d * QUERIES);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < s.B * s.K; task++) {
            i64 b = task / s.K, g = task % s.K, origin = b * T * k_row + g * d;
            for (i64 h = g * G; h < (g + 1) * G; h++)
                for (i64 start = 0; start < T; start += QUERIES) {
                    i64 n = start + QUERIES, at = (b * T + start) * q_row + h * d;
                    transpose(q + at, q_row, QUERIES, d, across.data(), QUERIES);
                    scores(k + origin, k_row, n, start, d, across.data(), S.data());
                    float sums[QUERIES];
                    for (int p = 0; p < QUERIES; p += LANES) {
                        vec most = spread(-INFINITY), sum = {};
                        i64 last = std::min<i64>(n, start + (p / STRIP + 1) * STRIP);  // those after it nobody here sees
                        for (i64 j = 0; j < start; j++) most = larger(most, load(&S[j * QUERIES + p]));
                        for (i64 j = start; j < last; j++) {
                            vec x = load(&S[j * QUERIES + p]);
                            most = seen(j - start - p) ? larger(most, x) : most;
                        }
                        vec shift = most * scale;
                        for (i64 j = 0; j < last; j++) {
                            float* here = &S[j * QUERIES + p];
                            vec e = exp2_of(load(here) * scale - shift);
                            if (j >= start) e = only(seen(j - start - p), e);
                            sum += e;
                            store(here, e);
                        }
                        store(sums + p, sum);
                        for (int i = 0; i < LANES; i++)
                            logs[(b * s.H + h) * T + start + p + i] = shift[i] + std::log2(sum[i]);
                    }
                    over_keys(d, n, start, v + origin, k_row, S.data(), out.data(), false);
                    for (i64 i = 0; i < QUERIES; i++)
                        for (i64 c = 0; c < d; c++) y[at + i * q_row + c] = out[c * QUERIES + i] / sums[i];
                }
        }
    }
}

// Gradients of q, k and v from that of y, dy. With P the weights, dP = dy V^T and D = sum of dy y over a head:
// dV = P^T dy; dS = P (dP - D) / sqrt(d); dQ = dS K; dK = dS^T Q (Dao et al., FlashAttention, 2022).
extern "C" void attention_backward(const float* q, const float* k, const float* v, const float* y, const float* dy,
                                   const float* logs, float* dq, float* dk, float* dv, const i64* sizes, int threads) {
    Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    i64 T = s.T, d = s.d, wide = s.padded(), G = s.H / s.K, q_row = s.H * d, k_row = s.K * d;
    float root = 1.0f / std::sqrt(float(d));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> q_across(d * QUERIES), dy_across(d * QUERIES), q_rows(QUERIES * wide), dy_rows(QUERIES * wide);
        std::vector<float> P(KEYS * QUERIES), dS(KEYS * QUERIES), dQ(d * QUERIES), dK(T * wide), dV(T * wide);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < s.B * s.K; task++) {
            i64 b = task / s.K, g = task % s.K, origin = b * T * k_row + g * d;
            std::fill(dK.begin(), dK.end(), 0.0f);
            std::fill(dV.begin(), dV.end(), 0.0f);
            for (i64 h = g * G; h < (g + 1) * G; h++)
                for (i64 start = 0; start < T; start += QUERIES) {
                    i64 at = (b * T + start) * q_row + h * d;
                    copy_rows(q + at, q_row, d, q_rows.data(), wide);
                    copy_rows(dy + at, q_row, d, dy_rows.data(), wide);
                    transpose(q_rows.data(), wide, QUERIES, d, q_across.data(), QUERIES);
                    transpose(dy_rows.data(), wide, QUERIES, d, dy_across.data(), QUERIES);
                    float D[QUERIES];
                    for (i64 i = 0; i < QUERIES; i++) {
                        D[i] = 0;
                        for (i64 c = 0; c < d; c++) D[i] += dy_rows[i * wide + c] * y[at + i * q_row + c];
                    }
                    const float* log_sums = logs + (b * s.H + h) * T + start;
                    for (i64 first = 0; first < start + QUERIES; first += KEYS) {
                        i64 n = std::min<i64>(KEYS, start + QUERIES - first), before = keys_before(first, n, start);
                        const float *keys = k + origin + first * k_row, *values = v + origin + first * k_row;
                        scores(keys, k_row, n, before, d, q_across.data(), P.data());
                        scores(values, k_row, n, before, d, dy_across.data(), dS.data());
                        for (int p = 0; p < QUERIES; p += LANES) {
                            vec shift = load(log_sums + p), mean = load(D + p);
                            i64 last = std::min<i64>(n, before + (p / STRIP + 1) * STRIP);
                            for (i64 j = 0; j < last; j++) {
                                float *weight = &P[j * QUERIES + p], *change = &dS[j * QUERIES + p];
                                vec e = exp2_of(load(weight) * (LOG2E * root) - shift);
                                vec ds = e * root * (load(change) - mean);
                                if (j >= before) {
                                    ints mask = seen(j - before - p);
                                    e = only(mask, e), ds = only(mask, ds);
                                }
                                store(weight, e);
                                store(change, ds);
                            }
                        }
                        over_queries(n, before, wide, P.data(), dy_rows.data(), &dV[first * wide]);
                        over_queries(n, before, wide, dS.data(), q_rows.data(), &dK[first * wide]);
                        over_keys(d, n, before, keys, k_row, dS.data(), dQ.data(), first > 0);
                    }
                    transpose(dQ.data(), QUERIES, d, QUERIES, dq + at, q_row);
                }
            for (i64 t = 0; t < T; t++) {
                std::copy(&dK[t * wide], &dK[t * wide] + d, dk + origin + t * k_row);
                std::copy(&dV[t * wide], &dV[t * wide] + d, dv + origin + t * k_row);
            }
        }
    }
}

// ---------- Softcapped cross-entropy ----------------------------------------------------------------------------------
// All bits of those of the tokens from c on whose bit is 1 in a row of the mask, the lowest bit first.
static inline ints allowed_at(const uint8_t* row, i64 c) {
    uint32_t word = row[c / 8];
    if (LANES == 16) word |= uint32_t(row[c / 8 + 1]) << 8;
    if (LANES == 4) word >>= c % 8;
    return ((int32_t(word) >> lane_numbers()) & 1) != 0;
}

// For each row of z [rows, V], V a multiple of 16: loss = log sum exp(u) - u[target] with u = cap tanh(z / cap). The
// exponentials need no largest one taken off: u is at most cap. Where `gradient` is asked for it takes the place of z:
// dz = (softmax(u) - 1[target]) (1 - (u / cap)^2). With `bits` [V, V / 8] only those tokens count whose bit is 1 in the
// row of the token before; the loss of a target that does not is infinite.
extern "C" void softcapped_cross_entropy(float* z, const i64* targets, float* losses, i64 rows, i64 V, float cap,
                                         int gradient, const uint8_t* bits, const i64* before, int threads) {
    float inward = 2 * LOG2E / cap, outward = cap * LOG2E;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> tanhs(V), exponentials(V);
#pragma omp for schedule(static)
        for (i64 row = 0; row < rows; row++) {
            float* at = z + row * V;
            i64 target = targets[row];
            const uint8_t* allowed = bits ? bits + before[row] * (V / 8) : nullptr;
            vec sum = {};
            for (i64 c = 0; c < V; c += LANES) {
                vec t = 1.0f - 2.0f / (exp2_of(load(at + c) * inward) + 1.0f);  // tanh(z / cap)
                vec weight = exp2_of(t * outward - outward);                    // exp(u - cap)
                if (allowed) weight = only(allowed_at(allowed, c), weight);
                store(&tanhs[c], t);
                store(&exponentials[c], weight);
                sum += weight;
            }
            float total = sum_of(sum), t = tanhs[target];
            losses[row] = exponentials[target] == 0.0f ? INFINITY : std::log(total) + cap * (1.0f - t);
            if (!gradient) continue;
            float inverse = 1.0f / total, own = (exponentials[target] * inverse - 1.0f) * (1.0f - t * t);
            for (i64 c = 0; c < V; c += LANES) {
                vec th = load(&tanhs[c]);
                store(at + c, load(&exponentials[c]) * inverse * (1.0f - th * th));
            }
            at[target] = own;
        }
    }
}
