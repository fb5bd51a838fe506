// Causal attention and the softcapped cross-entropy for CPUs that multiply bf16 by AVX-512: what tools/cpu/cpu_kernels.py
// compiles and calls. All matrices are row-major; sizes are in elements, "words" are 32 bits, two bf16 neighbours.
//
// The instruction behind every product here adds to 16 fp32 sums the products of 16 pairs of bf16: so of a product
// C = A B the reduction runs in pairs, A gives one word for all 16 sums, and B is kept as words of two rows each.
// Attention works on the transposed scores, keys down and 64 queries across: then what belongs to a query (its maximum,
// its sum) is in one lane from the first key to the last, and no step adds or compares across lanes.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

using bf16 = uint16_t;
using i64 = int64_t;

static const int LANES = 16, QUERIES = 64, HALF = 32, KEYS = 256;  // queries of a block; keys of scores in the cache
static const float LOG2E = 1.44269504f;

static inline __m512 widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Words of two rows: the low half of each from `even`, the high half from `odd`.
static inline __m512i pair_up(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32(narrow(even));
    __m512i high = _mm512_cvtepu16_epi32(narrow(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 2^x: the whole part scales, a polynomial does the rest, to 2e-7. Below -126 it fades to 0. NaN stays NaN: of a pair
// with it the larger is, by the instruction, the second.
static inline __m512 exp2_16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);  // Taylor's coefficients, ln(2)^n / n!
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

// ---------- Products --------------------------------------------------------------------------------------------------
// ROWS x 16 * PANELS sums of A B over `words` words of the reduction. A: rows of words, `lda` words apart; B: rows of
// words, `ldb` words apart.
template <int ROWS, int PANELS>
static inline __attribute__((always_inline)) void accumulate(i64 words, const uint32_t* A, i64 lda, const uint32_t* B,
                                                             i64 ldb, __m512 (&sums)[ROWS][PANELS]) {
    for (i64 w = 0; w < words; w++) {
        __m512bh b[PANELS];
        for (int p = 0; p < PANELS; p++) b[p] = (__m512bh)_mm512_loadu_si512(B + w * ldb + p * LANES);
        for (int r = 0; r < ROWS; r++) {
            __m512bh a = (__m512bh)_mm512_set1_epi32(A[r * lda + w]);
            for (int p = 0; p < PANELS; p++) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], a, b[p]);
        }
    }
}

// ROWS x 16 * PANELS of C (+)= A B in fp32.
template <int ROWS, int PANELS>
static inline void tile(i64 words, const uint32_t* A, i64 lda, const uint32_t* B, i64 ldb, float* C, i64 ldc, bool add) {
    __m512 sums[ROWS][PANELS];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++)
            sums[r][p] = add ? _mm512_loadu_ps(C + r * ldc + p * LANES) : _mm512_setzero_ps();
    accumulate<ROWS, PANELS>(words, A, lda, B, ldb, sums);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) _mm512_storeu_ps(C + r * ldc + p * LANES, sums[r][p]);
}

template <int PANELS>
static void panel(i64 rows, i64 words, const uint32_t* A, i64 lda, const uint32_t* B, i64 ldb, float* C, i64 ldc,
                  bool add) {
    i64 r = 0;
    for (; r + 6 <= rows; r += 6) tile<6, PANELS>(words, A + r * lda, lda, B, ldb, C + r * ldc, ldc, add);
    for (; r + 4 <= rows; r += 4) tile<4, PANELS>(words, A + r * lda, lda, B, ldb, C + r * ldc, ldc, add);
    for (; r < rows; r++) tile<1, PANELS>(words, A + r * lda, lda, B, ldb, C + r * ldc, ldc, add);
}

// C [rows, columns] (+)= A [rows, words] B [words, columns]; columns in multiples of 16.
static void multiply(i64 rows, i64 columns, i64 words, const uint32_t* A, i64 lda, const uint32_t* B, i64 ldb, float* C,
                     i64 ldc, bool add) {
    for (; columns >= 64; columns -= 64, B += 64, C += 64) panel<4>(rows, words, A, lda, B, ldb, C, ldc, add);
    if (columns == 48) panel<3>(rows, words, A, lda, B, ldb, C, ldc, add);
    if (columns == 32) panel<2>(rows, words, A, lda, B, ldb, C, ldc, add);
    if (columns == 16) panel<1>(rows, words, A, lda, B, ldb, C, ldc, add);
}

// ---------- Layouts ---------------------------------------------------------------------------------------------------
// The first so many of 16 lanes.
static inline __mmask16 first_lanes(i64 count) { return count >= LANES ? 0xffff : __mmask16((1u << count) - 1); }

// out [columns, rows] = in [rows, columns], of words, 16 x 16 at a time.
static void transpose(const uint32_t* in, i64 in_stride, i64 rows, i64 columns, uint32_t* out, i64 out_stride) {
    for (i64 r = 0; r < rows; r += LANES)
        for (i64 c = 0; c < columns; c += LANES) {
            i64 height = std::min<i64>(LANES, rows - r), width = std::min<i64>(LANES, columns - c);
            __m512i a[16], b[16];
            for (int i = 0; i < 16; i++)
                a[i] = _mm512_maskz_loadu_epi32(i < height ? first_lanes(width) : 0, in + (r + i) * in_stride + c);
            for (int i = 0; i < 16; i += 2) {  // pairs of words
                b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            }
            for (int i = 0; i < 16; i += 4)  // fours
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                    a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
                }
            for (int i = 0; i < 4; i++) {  // a[4g + i] holds column 4k + i of rows 4g to 4g + 3 in its quarter k
                __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
                __m512i low2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
                __m512i high2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
                b[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
                b[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
                b[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
                b[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
            }
            for (int i = 0; i < width; i++)
                _mm512_mask_storeu_epi32(out + (c + i) * out_stride + r, first_lanes(height), b[i]);
        }
}

// Rows of a head that are soon read, on their way from the memory: they lie far apart, which no processor foresees.
static inline void fetch(const bf16* at, i64 stride, i64 rows, i64 width) {
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < width; c += 32) _mm_prefetch(at + r * stride + c, _MM_HINT_T1);
}

// out [rows / 2, padded] = words of two rows of in [rows, width]; columns beyond `width` are 0.
static void pair_rows(const bf16* in, i64 in_stride, i64 rows, i64 width, uint32_t* out, i64 padded) {
    for (i64 r = 0; r < rows; r += 2)
        for (i64 c = 0; c < padded; c += LANES) {
            __mmask16 mask = first_lanes(std::max<i64>(0, width - c));
            __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in + r * in_stride + c));
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in + (r + 1) * in_stride + c));
            _mm512_storeu_si512(out + r / 2 * padded + c, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// in [width, 64] in fp32, times `factors` [64], to bf16 out [64, width]: a block of results, queries across, as rows.
static void store_transposed(const float* in, i64 width, const float* factors, bf16* out, i64 out_stride, uint32_t* words) {
    for (i64 c = 0; c < width; c += 2)
        for (int p = 0; p < QUERIES; p += LANES) {
            __m512 factor = _mm512_loadu_ps(factors + p);
            __m512 even = _mm512_mul_ps(_mm512_loadu_ps(in + c * QUERIES + p), factor);
            __m512 odd = _mm512_mul_ps(_mm512_loadu_ps(in + (c + 1) * QUERIES + p), factor);
            _mm512_storeu_si512(words + c / 2 * QUERIES + p, pair_up(even, odd));
        }
    transpose(words, QUERIES, width / 2, QUERIES, (uint32_t*)out, out_stride / 2);
}

// ---------- Attention -------------------------------------------------------------------------------------------------
struct Shape {
    i64 B, T, H, K, d;  // batch, time, query heads, key-value heads, width of a head
    i64 padded() const { return (d + 15) / 16 * 16; }
};

// Scores of `keys` keys from number `first` on, keys down, for the 64 queries from number `start` on: only those that a
// query may see need to be right, the rest is hidden later.
static void scores(const bf16* keys_at, i64 stride, i64 first, i64 keys, i64 start, i64 d, const uint32_t* queries, float* S) {
    i64 before = std::min(keys, std::max<i64>(0, start - first));
    const uint32_t* A = (const uint32_t*)(keys_at + first * stride);
    multiply(before, QUERIES, d / 2, A, stride / 2, queries, QUERIES, S, QUERIES, false);
    for (i64 j = before; j < keys; j += LANES) {  // on the diagonal a strip of 16 keys is seen from its own place on
        i64 skip = first + j - start;
        multiply(LANES, QUERIES - skip, d / 2, A + j * (stride / 2), stride / 2, queries + skip, QUERIES,
                 S + j * QUERIES + skip, QUERIES, false);
    }
}

// C [d, 64] (+)= A B over keys of which the first 32 queries do not see the last 32.
static void multiply_seen(i64 d, i64 keys, const uint32_t* A, i64 lda, const uint32_t* B, float* C, bool add) {
    i64 words = (keys - HALF) / 2;
    multiply(d, QUERIES, words, A, lda, B, QUERIES, C, QUERIES, add);
    multiply(d, HALF, HALF / 2, A + words, lda, B + words * QUERIES + HALF, QUERIES, C + HALF, QUERIES, true);
}

// C [keys, wide] += A B over 64 queries, of which the last 64 keys, where they lie on the `diagonal`, are seen from their
// own place on.
static void multiply_seeing(i64 keys, i64 wide, bool diagonal, const bf16* A, const uint32_t* B, float* C) {
    i64 before = diagonal ? keys - QUERIES : keys;
    const uint32_t* words = (const uint32_t*)A;
    multiply(before, wide, QUERIES / 2, words, QUERIES / 2, B, wide, C, wide, true);
    for (i64 j = before; j < keys; j += LANES) {
        i64 skip = (j - before) / 2;
        multiply(LANES, wide, QUERIES / 2 - skip, words + j * (QUERIES / 2) + skip, QUERIES / 2, B + skip * wide, wide,
                 C + j * wide, wide, true);
    }
}

// Which of the 16 queries from start + p on see key j.
static inline __mmask16 seen(i64 j, i64 start, int p) {
    i64 hidden = j - start - p;  // so many of them come before it
    return hidden <= 0 ? 0xffff : hidden >= LANES ? 0 : __mmask16(0xffffu << hidden);
}

// y [B, T, H, d] and, for the way back, the base-2 logarithm of each query's sum of exponentials, [B, H, T].
extern "C" void attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* y, float* logs, const i64* sizes,
                                  int threads) {
    Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    i64 T = s.T, d = s.d, wide = s.padded(), G = s.H / s.K, q_row = s.H * d, k_row = s.K * d;
    float scale = LOG2E / std::sqrt(float(d));
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint32_t> pairs(T / 2 * wide), values(wide * T / 2), queries(wide / 2 * QUERIES);
        std::vector<uint32_t> weights(T / 2 * QUERIES), words(wide / 2 * QUERIES);
        std::vector<float> S(T * QUERIES), out(wide * QUERIES);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < s.B * s.K; task++) {
            i64 b = task / s.K, g = task % s.K;
            const bf16 *keys = k + b * T * k_row + g * d, *vals = v + b * T * k_row + g * d;
            pair_rows(vals, k_row, T, d, pairs.data(), wide);
            transpose(pairs.data(), wide, T / 2, wide, values.data(), T / 2);
            for (i64 h = g * G; h < (g + 1) * G; h++)
                for (i64 start = 0; start < T; start += QUERIES) {
                    i64 n = start + QUERIES, at = (b * T + start) * q_row + h * d;
                    i64 next = n < T ? at + QUERIES * q_row : b * T * q_row + (h + 1) * d;
                    fetch(q + next, q_row, QUERIES, d);
                    fetch(y + at, q_row, QUERIES, d);
                    transpose((const uint32_t*)(q + at), q_row / 2, QUERIES, d / 2, queries.data(), QUERIES);
                    scores(keys, k_row, 0, n, start, d, queries.data(), S.data());
                    __m512 most[QUERIES / LANES];
                    for (__m512& m : most) m = _mm512_set1_ps(-INFINITY);
                    for (i64 j = 0; j < n; j++)
                        for (int p = 0; p < QUERIES; p += LANES) {
                            __m512 x = _mm512_loadu_ps(&S[j * QUERIES + p]), &m = most[p / LANES];
                            m = j < start ? _mm512_max_ps(m, x) : _mm512_mask_max_ps(m, seen(j, start, p), m, x);
                        }
                    float inverse[QUERIES];
                    for (int p = 0; p < QUERIES; p += LANES) {
                        __m512 sum = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
                        __m512 shift = _mm512_mul_ps(most[p / LANES], factor);
                        for (i64 j = 0; j < (p < HALF ? n - HALF : n); j += 2) {
                            __m512 e[2];
                            for (int i = 0; i < 2; i++) {
                                __m512 x = _mm512_loadu_ps(&S[(j + i) * QUERIES + p]);
                                e[i] = exp2_16(_mm512_fmsub_ps(x, factor, shift));
                                e[i] = _mm512_maskz_mov_ps(seen(j + i, start, p), e[i]);
                                sum = _mm512_add_ps(sum, e[i]);
                            }
                            _mm512_storeu_si512(&weights[j / 2 * QUERIES + p], pair_up(e[0], e[1]));
                        }
                        float sums[LANES], shifts[LANES];
                        _mm512_storeu_ps(sums, sum);
                        _mm512_storeu_ps(shifts, shift);
                        for (int i = 0; i < LANES; i++) {
                            inverse[p + i] = 1.0f / sums[i];
                            logs[(b * s.H + h) * T + start + p + i] = shifts[i] + std::log2(sums[i]);
                        }
                    }
                    multiply_seen(d, n, values.data(), T / 2, weights.data(), out.data(), false);
                    store_transposed(out.data(), d, inverse, y + at, q_row, words.data());
                }
        }
    }
}

// Gradients of q, k and v from that of y, dy. With P the weights, dP = dy V^T and D = sum of dy y over a head:
// dV = P^T dy; dS = P (dP - D) / sqrt(d); dQ = dS K; dK = dS^T Q (Dao et al., FlashAttention, 2022).
extern "C" void attention_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* y, const bf16* dy,
                                   const float* logs, bf16* dq, bf16* dk, bf16* dv, const i64* sizes, int threads) {
    Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    i64 T = s.T, d = s.d, wide = s.padded(), G = s.H / s.K, q_row = s.H * d, k_row = s.K * d;
    float root = 1.0f / std::sqrt(float(d));
    std::vector<float> ones(QUERIES, 1.0f);
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint32_t> pairs(T / 2 * wide), keys_down(wide * T / 2), words(wide / 2 * QUERIES);
        std::vector<uint32_t> q_across(wide / 2 * QUERIES), dy_across(wide / 2 * QUERIES);
        std::vector<uint32_t> q_pairs(QUERIES / 2 * wide), dy_pairs(QUERIES / 2 * wide), dS_pairs(KEYS / 2 * QUERIES);
        std::vector<bf16> P(KEYS * QUERIES), dS(KEYS * QUERIES);
        std::vector<float> S(KEYS * QUERIES), dP(KEYS * QUERIES), dQ(wide * QUERIES), dK(T * wide), dV(T * wide);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < s.B * s.K; task++) {
            i64 b = task / s.K, g = task % s.K, origin = b * T * k_row + g * d;
            pair_rows(k + origin, k_row, T, d, pairs.data(), wide);
            transpose(pairs.data(), wide, T / 2, wide, keys_down.data(), T / 2);
            std::fill(dK.begin(), dK.end(), 0.0f);
            std::fill(dV.begin(), dV.end(), 0.0f);
            for (i64 h = g * G; h < (g + 1) * G; h++)
                for (i64 start = 0; start < T; start += QUERIES) {
                    i64 at = (b * T + start) * q_row + h * d;
                    i64 next = start + QUERIES < T ? at + QUERIES * q_row : b * T * q_row + (h + 1) * d;
                    fetch(q + next, q_row, QUERIES, d);
                    fetch(dy + next, q_row, QUERIES, d);
                    fetch(y + next, q_row, QUERIES, d);
                    fetch(dq + at, q_row, QUERIES, d);
                    transpose((const uint32_t*)(q + at), q_row / 2, QUERIES, d / 2, q_across.data(), QUERIES);
                    transpose((const uint32_t*)(dy + at), q_row / 2, QUERIES, d / 2, dy_across.data(), QUERIES);
                    pair_rows(q + at, q_row, QUERIES, d, q_pairs.data(), wide);
                    pair_rows(dy + at, q_row, QUERIES, d, dy_pairs.data(), wide);
                    float D[QUERIES];
                    for (int i = 0; i < QUERIES; i++) {
                        __m512 sum = _mm512_setzero_ps();
                        for (i64 c = 0; c < d; c += LANES) {
                            __mmask16 mask = first_lanes(d - c);
                            __m512 a = widen(_mm256_maskz_loadu_epi16(mask, dy + at + i * q_row + c));
                            __m512 o = widen(_mm256_maskz_loadu_epi16(mask, y + at + i * q_row + c));
                            sum = _mm512_fmadd_ps(a, o, sum);
                        }
                        D[i] = _mm512_reduce_add_ps(sum);
                    }
                    const float* log_sums = logs + (b * s.H + h) * T + start;
                    for (i64 first = 0; first < start + QUERIES; first += KEYS) {
                        i64 n = std::min<i64>(KEYS, start + QUERIES - first);
                        bool diagonal = first + n == start + QUERIES;
                        scores(k + origin, k_row, first, n, start, d, q_across.data(), S.data());
                        scores(v + origin, k_row, first, n, start, d, dy_across.data(), dP.data());
                        for (int p = 0; p < QUERIES; p += LANES) {
                            __m512 factor = _mm512_set1_ps(LOG2E * root), shift = _mm512_loadu_ps(log_sums + p);
                            __m512 mean = _mm512_loadu_ps(D + p), outer = _mm512_set1_ps(root);
                            for (i64 j = 0; j < (diagonal && p < HALF ? n - HALF : n); j += 2) {
                                __m512 ds[2];
                                for (int i = 0; i < 2; i++) {
                                    i64 here = (j + i) * QUERIES + p;
                                    __mmask16 mask = seen(first + j + i, start, p);
                                    __m512 e = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(&S[here]), factor, shift));
                                    e = _mm512_maskz_mov_ps(mask, e);
                                    __m512 change = _mm512_sub_ps(_mm512_loadu_ps(&dP[here]), mean);
                                    ds[i] = _mm512_maskz_mul_ps(mask, _mm512_mul_ps(e, outer), change);
                                    _mm256_storeu_si256((__m256i*)&P[here], narrow(e));
                                    _mm256_storeu_si256((__m256i*)&dS[here], narrow(ds[i]));
                                }
                                _mm512_storeu_si512(&dS_pairs[j / 2 * QUERIES + p], pair_up(ds[0], ds[1]));
                            }
                        }
                        multiply_seeing(n, wide, diagonal, P.data(), dy_pairs.data(), &dV[first * wide]);
                        multiply_seeing(n, wide, diagonal, dS.data(), q_pairs.data(), &dK[first * wide]);
                        const uint32_t* down = keys_down.data() + first / 2;
                        if (diagonal)
                            multiply_seen(d, n, down, T / 2, dS_pairs.data(), dQ.data(), first > 0);
                        else
                            multiply(d, QUERIES, n / 2, down, T / 2, dS_pairs.data(), QUERIES, dQ.data(), QUERIES, first > 0);
                    }
                    store_transposed(dQ.data(), d, ones.data(), dq + at, q_row, words.data());
                }
            for (i64 t = 0; t < T; t++)
                for (i64 c = 0; c < d; c += LANES) {
                    __mmask16 mask = first_lanes(d - c);
                    i64 to = origin + t * k_row + c;
                    _mm256_mask_storeu_epi16(dk + to, mask, narrow(_mm512_loadu_ps(&dK[t * wide + c])));
                    _mm256_mask_storeu_epi16(dv + to, mask, narrow(_mm512_loadu_ps(&dV[t * wide + c])));
                }
        }
    }
}

// ---------- Newton-Schulz: a matrix in the cache, half of each symmetric product ----------------------------------------
// ROWS x 32 of C = outer A B + inner old, in bf16; of `old`, [.., ldc] like C, nothing is read where inner is 0.
template <int ROWS>
static inline void rounded_tile(i64 words, const uint32_t* A, const uint32_t* B, i64 ldb, float outer, float inner,
                                const bf16* old, bf16* C, i64 ldc) {
    __m512 sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    accumulate<ROWS, 2>(words, A, words, B, ldb, sums);
    for (int r = 0; r < ROWS; r++) {
        for (int p = 0; p < 2 && inner != 0; p++) {
            __m512 term = widen(_mm256_loadu_si256((const __m256i*)(old + r * ldc + p * LANES)));
            sums[r][p] = _mm512_fmadd_ps(term, _mm512_set1_ps(inner), _mm512_mul_ps(sums[r][p], _mm512_set1_ps(outer)));
        }
        _mm512_storeu_si512(C + r * ldc, (__m512i)_mm512_cvtne2ps_pbh(sums[r][1], sums[r][0]));
    }
}

// C [rows, columns] = outer A B + inner old, of A [rows, 2 * words] and B, words of two rows. Of a symmetric C the upper
// triangle is made, in squares of 32 x 32, and then copied.
static void combine(i64 rows, i64 columns, i64 words, const bf16* A, const uint32_t* B, float outer, float inner,
                    const bf16* old, bf16* C, bool symmetric) {
    const uint32_t* left = (const uint32_t*)A;
    for (i64 n = 0; n < columns; n += 32) {
        i64 last = symmetric ? n + 32 : rows, r = 0;
        for (; r + 12 <= last; r += 12)
            rounded_tile<12>(words, left + r * words, B + n, columns, outer, inner, old + r * columns + n,
                             C + r * columns + n, columns);
        for (; r < last; r += 4)
            rounded_tile<4>(words, left + r * words, B + n, columns, outer, inner, old + r * columns + n,
                            C + r * columns + n, columns);
    }
    if (!symmetric) return;
    uint32_t square[16 * 32];
    for (i64 m = 0; m < rows; m += 32)
        for (i64 n = m + 32; n < columns; n += 32) {
            pair_rows(C + m * columns + n, columns, 32, 32, square, 32);
            transpose(square, 32, 16, 32, (uint32_t*)(C + n * columns + m), columns / 2);
        }
}

// X [n, rows, columns], rows <= columns, both in whole 32: X = a X + (b G + c G G) X with G = X X^T, for each row a, b, c
// of the coefficients [steps, 3].
extern "C" void newton_schulz(bf16* stack, i64 n, i64 rows, i64 columns, const float* coefficients, int steps,
                              int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint32_t> pairs(std::max(rows, columns) * std::max(rows, columns) / 2);
        std::vector<bf16> gram(rows * rows), polynomial(rows * rows), next(rows * columns);
#pragma omp for schedule(dynamic)
        for (i64 i = 0; i < n; i++) {
            bf16* x = stack + i * rows * columns;
            for (int step = 0; step < steps; step++) {
                float a = coefficients[3 * step], b = coefficients[3 * step + 1], c = coefficients[3 * step + 2];
                transpose((const uint32_t*)x, columns / 2, rows, columns / 2, pairs.data(), rows);
                combine(rows, rows, columns / 2, x, pairs.data(), 1.0f, 0.0f, x, gram.data(), true);
                pair_rows(gram.data(), rows, rows, rows, pairs.data(), rows);
                combine(rows, rows, rows / 2, gram.data(), pairs.data(), c, b, gram.data(), polynomial.data(), true);
                pair_rows(x, columns, rows, columns, pairs.data(), columns);
                combine(rows, columns, rows / 2, polynomial.data(), pairs.data(), 1.0f, a, x, next.data(), false);
                std::copy(next.begin(), next.end(), x);
            }
        }
    }
}

// ---------- Softcapped cross-entropy ----------------------------------------------------------------------------------
// For each row of z [rows, V], V a multiple of 16: loss = log sum exp(u) - u[target] with u = cap tanh(z / cap). The
// exponentials need no largest one taken off: u is at most cap. Where `gradient` is asked for it takes the place of z:
// dz = (softmax(u) - 1[target]) (1 - (u / cap)^2). With `bits` [V, V / 8] only those tokens count whose bit is 1 in the
// row of the token before; the loss of a target that does not is infinite.
extern "C" void softcapped_cross_entropy(bf16* z, const i64* targets, float* losses, i64 rows, i64 V, float cap,
                                         int gradient, const uint8_t* bits, const i64* before, int threads) {
    __m512 inward = _mm512_set1_ps(2 * LOG2E / cap), outward = _mm512_set1_ps(cap * LOG2E), one = _mm512_set1_ps(1.0f);
    __m512 two = _mm512_set1_ps(2.0f);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> tanhs(V), exponentials(V);
#pragma omp for schedule(static)
        for (i64 row = 0; row < rows; row++) {
            bf16* at = z + row * V;
            i64 target = targets[row];
            const __mmask16* allowed = bits ? (const __mmask16*)(bits + before[row] * (V / 8)) : nullptr;
            __m512 sum = _mm512_setzero_ps();
            for (i64 c = 0; c < V; c += LANES) {
                __m512 e = exp2_16(_mm512_mul_ps(widen(_mm256_loadu_si256((const __m256i*)(at + c))), inward));
                __m512 t = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one)));  // tanh(z / cap)
                __m512 weight = exp2_16(_mm512_fmsub_ps(t, outward, outward));              // exp(u - cap)
                if (allowed) weight = _mm512_maskz_mov_ps(allowed[c / LANES], weight);
                _mm512_storeu_ps(&tanhs[c], t);
                _mm512_storeu_ps(&exponentials[c], weight);
                sum = _mm512_add_ps(sum, weight);
            }
            float total = _mm512_reduce_add_ps(sum), t = tanhs[target];
            losses[row] = exponentials[target] == 0.0f ? INFINITY : std::log(total) + cap * (1.0f - t);
            if (!gradient) continue;
            __m512 inverse = _mm512_set1_ps(1.0f / total);
            for (i64 c = 0; c < V; c += LANES) {
                __m512 th = _mm512_loadu_ps(&tanhs[c]), p = _mm512_mul_ps(_mm512_loadu_ps(&exponentials[c]), inverse);
                _mm256_storeu_si256((__m256i*)(at + c), narrow(_mm512_mul_ps(p, _mm512_fnmadd_ps(th, th, one))));
            }
            __m512 own = _mm512_set1_ps((exponentials[target] / total - 1.0f) * (1.0f - t * t));
            _mm_mask_storeu_epi16(at + target, 1, _mm256_castsi256_si128(narrow(own)));
        }
    }
}
