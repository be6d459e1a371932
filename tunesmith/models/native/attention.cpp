// Attention of a pack, forward and backward, in bfloat16 with float32 sums, for CPUs that multiply bfloat16
// (AVX512-BF16). native/__init__.py compiles it at first use; models/attention.py calls it.
//
// T tokens, H query heads, K key heads, D head size. A query i sees a key j when j <= i < ends[j]
// (models/layout.py), and, with a window, when position[i] - position[j] < window.
//
// Scores exist for 32 queries and 64 keys at a time, in the first-level cache; keys that none of the queries sees
// are passed over. Forward is FlashAttention's running softmax (Dao et al. 2022, arXiv:2205.14135, algorithm 1).
// Backward goes twice over the scores, once by queries and once by keys: nothing is added up across threads, so
// the result does not depend on their number.
//
// The processor multiplies pairs: c += a[2k] b[2k] + a[2k + 1] b[2k + 1]. A "pair" below is 32 bits that hold
// two bfloat16 numbers which are neighbours along the dimension that is summed over.

#include <algorithm>
#include <cmath>
#include <limits>

#include "bfloat16.h"

namespace {

using Pair = uint32_t;

constexpr int64_t kQueries = 36;  // of a block of scores
constexpr int64_t kKeys = 64;
constexpr int64_t kMaxSize = 256;  // of a head
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// --- products of pairs

// The left factor: element (row, k) is at data[row * row_step + k * k_step].
struct Left {
  const Pair* data;
  int64_t row_step;
  int64_t k_step;
};

// c [Rows, 16 Vectors] += or = left [Rows, count] times right, whose row k is 16 Vectors pairs at right + k step.
template <int Rows, int Vectors>
void multiply_tile(Left left, const Pair* right, int64_t step, int64_t count, float* c, int64_t c_step, bool add) {
  __m512 sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; ++k) {
    __m512i b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = _mm512_loadu_si512(right + k * step + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const __m512i a = _mm512_set1_epi32(int(left.data[r * left.row_step + k * left.k_step]));
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)a, (__m512bh)b[v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + r * c_step + v * kLanes;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(sum[r][v], _mm512_loadu_ps(to)) : sum[r][v]);
    }
}

template <int Vectors>
void multiply_rows(int64_t rows, Left left, const Pair* right, int64_t step, int64_t count, float* c,
                   int64_t c_step, bool add) {
  while (rows > 0) {
    const int64_t now = std::min<int64_t>(rows, 6);
    switch (now) {
      case 6: multiply_tile<6, Vectors>(left, right, step, count, c, c_step, add); break;
      case 5: multiply_tile<5, Vectors>(left, right, step, count, c, c_step, add); break;
      case 4: multiply_tile<4, Vectors>(left, right, step, count, c, c_step, add); break;
      case 3: multiply_tile<3, Vectors>(left, right, step, count, c, c_step, add); break;
      case 2: multiply_tile<2, Vectors>(left, right, step, count, c, c_step, add); break;
      default: multiply_tile<1, Vectors>(left, right, step, count, c, c_step, add);
    }
    left.data += now * left.row_step;
    c += now * c_step;
    rows -= now;
  }
}

// As multiply_tile, for any number of rows and of columns (a multiple of 16).
void multiply(int64_t rows, int64_t columns, Left left, const Pair* right, int64_t step, int64_t count, float* c,
              int64_t c_step, bool add) {
  for (int64_t at = 0; at < columns; at += 4 * kLanes) {
    switch (std::min<int64_t>(4, (columns - at) / kLanes)) {
      case 4: multiply_rows<4>(rows, left, right + at, step, count, c + at, c_step, add); break;
      case 3: multiply_rows<3>(rows, left, right + at, step, count, c + at, c_step, add); break;
      case 2: multiply_rows<2>(rows, left, right + at, step, count, c + at, c_step, add); break;
      default: multiply_rows<1>(rows, left, right + at, step, count, c + at, c_step, add);
    }
  }
}

// --- a tensor and its two packed forms

// [T, heads, D] of bfloat16; the last dimension is dense.
struct Tensor {
  const BFloat* data;
  int64_t token_step;
  int64_t head_step;

  const BFloat* at(int64_t token, int64_t head) const { return data + token * token_step + head * head_step; }
  Left rows(int64_t token, int64_t head) const { return {(const Pair*)at(token, head), token_step / 2, 1}; }
};

struct Shape {
  int64_t tokens, heads, key_heads, size;

  int64_t padded() const { return (tokens + kKeys - 1) / kKeys * kKeys; }
  int64_t head_pairs() const { return padded() * size / 2; }  // of one head in either packed form
  int64_t query_blocks() const { return (tokens + kQueries - 1) / kQueries; }
  int64_t key_blocks() const { return padded() / kKeys; }
  int64_t group() const { return heads / key_heads; }
};

// out [heads][T / 64][D / 2][64]: pairs along D, for sums over D. Zeros behind the last token.
void pack_across(const Tensor& x, const Shape& shape, int64_t heads, Pair* out) {
  const int64_t half = shape.size / 2;
#pragma omp for collapse(2) schedule(static)
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t block = 0; block < shape.key_blocks(); ++block) {
      Pair* panel = out + head * shape.head_pairs() + block * kKeys * half;
      for (int64_t i = 0; i < kKeys; ++i) {
        const int64_t token = block * kKeys + i;
        const Pair* row = token < shape.tokens ? (const Pair*)x.at(token, head) : nullptr;
        for (int64_t k = 0; k < half; ++k) panel[k * kKeys + i] = row ? row[k] : 0;
      }
    }
}

// out [heads][T / 2][D]: pairs along T, for sums over tokens. Zeros behind the last token.
void pack_down(const Tensor& x, const Shape& shape, int64_t heads, Pair* out) {
  const int64_t half = shape.padded() / 2;
#pragma omp for collapse(2) schedule(static)
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t two = 0; two < half; ++two) {
      Pair* row = out + head * shape.head_pairs() + two * shape.size;
      for (int64_t d = 0; d < shape.size; d += kLanes) {
        __m512i low = _mm512_setzero_si512(), high = low;
        if (2 * two < shape.tokens)
          low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x.at(2 * two, head) + d)));
        if (2 * two + 1 < shape.tokens)
          high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x.at(2 * two + 1, head) + d)));
        _mm512_storeu_si512(row + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
}

// --- the mask

struct Mask {
  const int32_t* ends;       // [T] one behind the last query that sees the key
  const int32_t* positions;  // [T], or null without a window
  int32_t window;
  int64_t tokens;
  const int32_t* latest;  // [T / 16] the largest of `ends` among 16 keys

  // Bits for the keys [key, key + 16) that a query sees.
  __mmask16 seen(int64_t query, int64_t key) const {
    const __mmask16 inside = tokens - key >= kLanes ? 0xffff : __mmask16((1u << (tokens - key)) - 1);
    const __m512i i = _mm512_set1_epi32(int(query));
    const __m512i j = _mm512_add_epi32(_mm512_set1_epi32(int(key)),
                                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __mmask16 bits = _mm512_mask_cmple_epi32_mask(inside, j, i);
    bits = _mm512_mask_cmpgt_epi32_mask(bits, _mm512_maskz_loadu_epi32(inside, ends + key), i);
    if (positions) {
      const __m512i least = _mm512_set1_epi32(positions[query] - window);
      bits = _mm512_mask_cmpgt_epi32_mask(bits, _mm512_maskz_loadu_epi32(inside, positions + key), least);
    }
    return bits;
  }

  // Whether a query of [first, last) may see a key of [key, key + 16).
  bool meets(int64_t first, int64_t last, int64_t key) const { return key < last && latest[key / kLanes] > first; }

  // The keys [*low, *high) of a block (multiples of 16 within it) outside of which these queries see nothing.
  bool trim(int64_t first, int64_t last, int64_t block, int64_t* low, int64_t* high) const {
    *low = 0;
    *high = kKeys;
    while (*low < *high && !meets(first, last, block * kKeys + *low)) *low += kLanes;
    while (*low < *high && !meets(first, last, block * kKeys + *high - kLanes)) *high -= kLanes;
    return *low < *high;
  }
};

// out [T / 16]
void find_latest(const int32_t* ends, int64_t tokens, int32_t* out) {
#pragma omp single
  for (int64_t key = 0; key < tokens; key += kLanes)
    out[key / kLanes] = *std::max_element(ends + key, ends + std::min(key + kLanes, tokens));
}

struct Problem {
  Shape shape;
  Mask mask;
  float scale;

  float scale2() const { return scale * 1.44269504f; }  // powers of 2 instead of e
};

// --- forward

struct ForwardBlock {
  alignas(64) float scores[kQueries * kKeys];
  alignas(64) BFloat weights[kQueries * kKeys];
  alignas(64) float sums[kQueries * kMaxSize];
  float largest[kQueries], total[kQueries];
};

// One row of scores to unnormalised probabilities in bfloat16, and the row's running maximum and total.
void soften(const Problem& p, int64_t query, int64_t key, int64_t width, const float* scores, BFloat* weights,
            float* sums, float* largest, float* total) {
  __m512 x[kKeys / kLanes];
  __m512 most = _mm512_set1_ps(kNothing);
  for (int64_t at = 0; at < width; at += kLanes) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(p.scale2()));
    x[at / kLanes] = _mm512_mask_mov_ps(_mm512_set1_ps(kNothing), p.mask.seen(query, key + at), scaled);
    most = _mm512_max_ps(most, x[at / kLanes]);
  }
  const float now = std::max(*largest, _mm512_reduce_max_ps(most));
  const __m512 reference = _mm512_set1_ps(now == kNothing ? 0.0f : now);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < width; at += kLanes) {
    const __m512 weight = exp2(_mm512_sub_ps(x[at / kLanes], reference));
    const __m512 kept = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x[at / kLanes], _mm512_set1_ps(kNothing), _CMP_NEQ_UQ),
                                            weight);
    sum = _mm512_add_ps(sum, kept);
    store(weights + at, kept);
  }
  if (now > *largest) {
    const float shrink = *largest == kNothing ? 0.0f : std::exp2(*largest - now);
    for (int64_t d = 0; d < p.shape.size; d += kLanes)
      _mm512_storeu_ps(sums + d, _mm512_mul_ps(_mm512_loadu_ps(sums + d), _mm512_set1_ps(shrink)));
    *total *= shrink;
    *largest = now;
  }
  *total += _mm512_reduce_add_ps(sum);
}

void forward_block(const Problem& p, const Tensor& query, const Pair* keys, const Pair* values, int64_t head,
                   int64_t block, ForwardBlock& own, BFloat* output, float* log_sums) {
  const Shape& s = p.shape;
  const int64_t first = block * kQueries, last = std::min(first + kQueries, s.tokens), rows = last - first;
  const int64_t key_head = head / s.group();
  std::fill_n(own.sums, rows * s.size, 0.0f);
  std::fill_n(own.largest, rows, kNothing);
  std::fill_n(own.total, rows, 0.0f);
  int64_t low, high;
  for (int64_t kb = 0; kb * kKeys < last; ++kb) {
    if (!p.mask.trim(first, last, kb, &low, &high)) continue;
    const int64_t width = high - low, key = kb * kKeys + low;
    const Pair* panel = keys + key_head * s.head_pairs() + kb * kKeys * (s.size / 2) + low;
    multiply(rows, width, query.rows(first, head), panel, kKeys, s.size / 2, own.scores, kKeys, false);
    for (int64_t r = 0; r < rows; ++r)
      soften(p, first + r, key, width, own.scores + r * kKeys, own.weights + r * kKeys, own.sums + r * s.size,
             own.largest + r, own.total + r);
    multiply(rows, s.size, {(const Pair*)own.weights, kKeys / 2, 1},
             values + key_head * s.head_pairs() + key / 2 * s.size, s.size, width / 2, own.sums, s.size, true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 share = _mm512_set1_ps(1.0f / own.total[r]);
    for (int64_t d = 0; d < s.size; d += kLanes)
      store(output + ((first + r) * s.heads + head) * s.size + d,
            _mm512_mul_ps(_mm512_loadu_ps(own.sums + r * s.size + d), share));
    log_sums[head * s.tokens + first + r] = own.largest[r] + std::log2(own.total[r]);
  }
}

// --- backward

struct BackwardBlock {
  alignas(64) float scores[kQueries * kKeys];
  alignas(64) float dweights[kQueries * kKeys];
  alignas(64) BFloat dscores[kQueries * kKeys];
  alignas(64) Pair weight_pairs[kQueries / 2 * kKeys];
  alignas(64) Pair dscore_pairs[kQueries / 2 * kKeys];
  alignas(64) float first_sums[kKeys * kMaxSize];
  alignas(64) float second_sums[kKeys * kMaxSize];
};

struct Backward {
  Problem problem;
  Tensor query, doutput;
  const Pair *keys, *values;             // packed across
  const Pair *key_rows, *query_rows, *doutput_rows;  // packed down
  const float *log_sums, *dots;          // [H, T]; dots: sum over D of output times its gradient

  // Scores and the gradients of the probabilities of a block of queries and the keys [low, high) of a block.
  void products(int64_t head, int64_t first, int64_t rows, int64_t kb, int64_t low, int64_t high,
                BackwardBlock& own) const {
    const Shape& s = problem.shape;
    const int64_t panel = head / s.group() * s.head_pairs() + kb * kKeys * (s.size / 2) + low;
    multiply(rows, high - low, query.rows(first, head), keys + panel, kKeys, s.size / 2, own.scores, kKeys, false);
    multiply(rows, high - low, doutput.rows(first, head), values + panel, kKeys, s.size / 2, own.dweights, kKeys,
             false);
  }

  // The probabilities p of 16 keys to one query, and the gradients of its scores, p (dp - sum(p dp)) scale.
  void slopes(int64_t head, int64_t query_at, int64_t key, const float* scores, const float* dweights,
              __m512* weights, __m512* dscores) const {
    const int64_t at = head * problem.shape.tokens + query_at;
    const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores), _mm512_set1_ps(problem.scale2()),
                                     _mm512_set1_ps(log_sums[at]));
    *weights = _mm512_maskz_mov_ps(problem.mask.seen(query_at, key), exp2(x));
    *dscores = _mm512_mul_ps(*weights, _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(dweights), _mm512_set1_ps(dots[at])),
                                                     _mm512_set1_ps(problem.scale)));
  }
};

void backward_queries(const Backward& b, int64_t head, int64_t block, BackwardBlock& own, BFloat* dquery) {
  const Shape& s = b.problem.shape;
  const int64_t first = block * kQueries, last = std::min(first + kQueries, s.tokens), rows = last - first;
  float* sums = own.first_sums;
  std::fill_n(sums, rows * s.size, 0.0f);
  int64_t low, high;
  for (int64_t kb = 0; kb * kKeys < last; ++kb) {
    if (!b.problem.mask.trim(first, last, kb, &low, &high)) continue;
    const int64_t key = kb * kKeys + low;
    b.products(head, first, rows, kb, low, high, own);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t at = 0; at < high - low; at += kLanes) {
        __m512 weights, dscores;
        b.slopes(head, first + r, key + at, own.scores + r * kKeys + at, own.dweights + r * kKeys + at, &weights,
                 &dscores);
        store(own.dscores + r * kKeys + at, dscores);
      }
    multiply(rows, s.size, {(const Pair*)own.dscores, kKeys / 2, 1},
             b.key_rows + head / s.group() * s.head_pairs() + key / 2 * s.size, s.size, (high - low) / 2, sums, s.size,
             true);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < s.size; d += kLanes)
      store(dquery + ((first + r) * s.heads + head) * s.size + d, _mm512_loadu_ps(sums + r * s.size + d));
}

// Two rows of floats as pairs: element j holds both rows' numbers at j.
inline void store_pairs(Pair* out, __m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

void backward_keys(const Backward& b, int64_t key_head, int64_t kb, BackwardBlock& own, BFloat* dkey, BFloat* dvalue) {
  const Shape& s = b.problem.shape;
  std::fill_n(own.first_sums, kKeys * s.size, 0.0f);
  std::fill_n(own.second_sums, kKeys * s.size, 0.0f);
  const int64_t key_start = kb * kKeys, key_end = std::min(key_start + kKeys, s.tokens);
  const int64_t seen_until = *std::max_element(b.problem.mask.ends + key_start, b.problem.mask.ends + key_end);
  for (int64_t head = key_head * s.group(); head < (key_head + 1) * s.group(); ++head)
    for (int64_t first = key_start / kQueries * kQueries; first < seen_until; first += kQueries) {
      const int64_t last = std::min(first + kQueries, s.tokens), rows = last - first;
      int64_t low, high;
      if (!b.problem.mask.trim(first, last, kb, &low, &high)) continue;
      b.products(head, first, rows, kb, low, high, own);
      for (int64_t r = 0; r < rows; r += 2)
        for (int64_t at = 0; at < high - low; at += kLanes) {
          __m512 weights[2] = {}, dscores[2] = {};
          for (int64_t i = 0; i < 2 && r + i < rows; ++i)
            b.slopes(head, first + r + i, key_start + low + at, own.scores + (r + i) * kKeys + at,
                     own.dweights + (r + i) * kKeys + at, weights + i, dscores + i);
          store_pairs(own.weight_pairs + r / 2 * kKeys + at, weights[0], weights[1]);
          store_pairs(own.dscore_pairs + r / 2 * kKeys + at, dscores[0], dscores[1]);
        }
      const int64_t tokens = head * s.head_pairs() + first / 2 * s.size;
      multiply(high - low, s.size, {own.dscore_pairs, 1, kKeys}, b.query_rows + tokens, s.size, (rows + 1) / 2,
               own.first_sums + low * s.size, s.size, true);
      multiply(high - low, s.size, {own.weight_pairs, 1, kKeys}, b.doutput_rows + tokens, s.size, (rows + 1) / 2,
               own.second_sums + low * s.size, s.size, true);
    }
  for (int64_t r = 0; r < key_end - key_start; ++r)
    for (int64_t d = 0; d < s.size; d += kLanes) {
      const int64_t to = ((key_start + r) * s.key_heads + key_head) * s.size + d;
      store(dkey + to, _mm512_loadu_ps(own.first_sums + r * s.size + d));
      store(dvalue + to, _mm512_loadu_ps(own.second_sums + r * s.size + d));
    }
}

}  // namespace

extern "C" {

// Tensors are [T, heads, D]; steps of query, key and value are their strides of T and heads, in numbers.
// log_sums [H, T]: base-2 logarithms of the rows' sums of exponentials. scratch: 2 K P numbers of 4 bytes, where
// P = round_up(T, 64) D / 2.
void tunesmith_attention_forward(const BFloat* query, const BFloat* key, const BFloat* value, const int64_t* steps,
                                 const int64_t* sizes, const int32_t* ends, const int32_t* positions, int64_t window,
                                 float scale, int64_t threads, Pair* scratch, BFloat* output, float* log_sums) {
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3]};
  int32_t* latest = (int32_t*)scratch;
  scratch += s.key_blocks() * (kKeys / kLanes);
  const Problem p{s, {ends, positions, int32_t(window), s.tokens, latest}, scale};
  const Tensor q{query, steps[0], steps[1]}, k{key, steps[2], steps[3]}, v{value, steps[4], steps[5]};
  Pair *keys = scratch, *values = keys + s.key_heads * s.head_pairs();
#pragma omp parallel num_threads(int(threads))
  {
    find_latest(ends, s.tokens, latest);
    pack_across(k, s, s.key_heads, keys);
    pack_down(v, s, s.key_heads, values);
    ForwardBlock own;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t head = 0; head < s.heads; ++head)
      for (int64_t block = 0; block < s.query_blocks(); ++block)
        forward_block(p, q, keys, values, head, block, own, output, log_sums);
  }
}

// The gradients of query, key and value, dense. scratch: (3 K + 2 H) P + H T numbers of 4 bytes.
void tunesmith_attention_backward(const BFloat* doutput, const BFloat* output, const BFloat* query, const BFloat* key,
                                  const BFloat* value, const int64_t* steps, const int64_t* sizes, const int32_t* ends,
                                  const int32_t* positions, int64_t window, float scale, int64_t threads,
                                  const float* log_sums, Pair* scratch, BFloat* dquery, BFloat* dkey, BFloat* dvalue) {
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3]};
  int32_t* latest = (int32_t*)scratch;
  scratch += s.key_blocks() * (kKeys / kLanes);
  const Problem p{s, {ends, positions, int32_t(window), s.tokens, latest}, scale};
  const Tensor q{query, steps[0], steps[1]}, k{key, steps[2], steps[3]}, v{value, steps[4], steps[5]};
  const Tensor dy{doutput, s.heads * s.size, s.size};
  const int64_t of_keys = s.key_heads * s.head_pairs(), of_queries = s.heads * s.head_pairs();
  Pair *keys = scratch, *values = keys + of_keys, *key_rows = values + of_keys, *query_rows = key_rows + of_keys,
       *doutput_rows = query_rows + of_queries;
  float* dots = (float*)(doutput_rows + of_queries);
  const Backward b{p, q, dy, keys, values, key_rows, query_rows, doutput_rows, log_sums, dots};
#pragma omp parallel num_threads(int(threads))
  {
    find_latest(ends, s.tokens, latest);
    pack_across(k, s, s.key_heads, keys);
    pack_across(v, s, s.key_heads, values);
    pack_down(k, s, s.key_heads, key_rows);
    pack_down(q, s, s.heads, query_rows);
    pack_down(dy, s, s.heads, doutput_rows);
#pragma omp for collapse(2) schedule(static)
    for (int64_t token = 0; token < s.tokens; ++token)
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t at = (token * s.heads + head) * s.size;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < s.size; d += kLanes) sum = _mm512_fmadd_ps(load(output + at + d), load(doutput + at + d), sum);
        dots[head * s.tokens + token] = _mm512_reduce_add_ps(sum);
      }
    BackwardBlock own;
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (int64_t head = 0; head < s.heads; ++head)
      for (int64_t block = 0; block < s.query_blocks(); ++block) backward_queries(b, head, block, own, dquery);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t key_head = 0; key_head < s.key_heads; ++key_head)
      for (int64_t block = 0; block < s.key_blocks(); ++block) backward_keys(b, key_head, block, own, dkey, dvalue);
  }
}

}  // extern "C"
