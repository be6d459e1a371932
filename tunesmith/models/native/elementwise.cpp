// What lies between the matrix products of a layer, in bfloat16 with float32 inside: each in one pass over memory,
// where PyTorch's operations make several with copies between them. elementwise.py says what the functions are for.

#include <algorithm>
#include <limits>

#include "bfloat16.h"

namespace {

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace

extern "C" {

// y = silu(g) u, [count] each.
void tunesmith_silu_mul(const BFloat* g, const BFloat* u, int64_t count, int64_t threads, BFloat* y) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512 x = load(g + i, lanes);
    store(y + i, lanes, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), load(u + i, lanes)));
  }
}

// With s = sigmoid(g): du = dy g s, and dg = dy u s (1 + g (1 - s)) over dy.
void tunesmith_silu_mul_backward(BFloat* dy, const BFloat* g, const BFloat* u, int64_t count, int64_t threads,
                                 BFloat* du) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 x = load(g + i, lanes), dx = load(dy + i, lanes), s = sigmoid(x);
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
    store(du + i, lanes, _mm512_mul_ps(dx, _mm512_mul_ps(x, s)));
    store(dy + i, lanes, _mm512_mul_ps(_mm512_mul_ps(dx, load(u + i, lanes)), slope));
  }
}

// Rows x [rows, size]: r = 1 / sqrt(mean(x^2) + eps) into inverse [rows], y = x r w.
void tunesmith_rms_norm(const BFloat* x, const float* w, int64_t rows, int64_t size, float eps, int64_t threads,
                        float* inverse, BFloat* y) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const BFloat* from = x + row * size;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += kLanes) {
      const __m512 a = load(from + i, first_lanes(size - i));
      squares = _mm512_fmadd_ps(a, a, squares);
    }
    const float r = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / float(size) + eps);
    inverse[row] = r;
    for (int64_t i = 0; i < size; i += kLanes) {
      const __mmask16 lanes = first_lanes(size - i);
      const __m512 scaled = _mm512_mul_ps(load(from + i, lanes), _mm512_set1_ps(r));
      store(y + row * size + i, lanes, _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(lanes, w + i)));
    }
  }
}

// dx = r g - x r^3 mean(g x), g = dy w.
void tunesmith_rms_norm_backward(const BFloat* dy, const BFloat* x, const float* w, const float* inverse, int64_t rows,
                                 int64_t size, int64_t threads, BFloat* dx) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const BFloat *from = x + row * size, *grad = dy + row * size;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += kLanes) {
      const __mmask16 lanes = first_lanes(size - i);
      const __m512 g = _mm512_mul_ps(load(grad + i, lanes), _mm512_maskz_loadu_ps(lanes, w + i));
      sum = _mm512_fmadd_ps(g, load(from + i, lanes), sum);
    }
    const float r = inverse[row];
    const __m512 factor = _mm512_set1_ps(-r * r * r * _mm512_reduce_add_ps(sum) / float(size));
    for (int64_t i = 0; i < size; i += kLanes) {
      const __mmask16 lanes = first_lanes(size - i);
      const __m512 g = _mm512_mul_ps(load(grad + i, lanes), _mm512_maskz_loadu_ps(lanes, w + i));
      store(dx + row * size + i, lanes,
            _mm512_fmadd_ps(load(from + i, lanes), factor, _mm512_mul_ps(g, _mm512_set1_ps(r))));
    }
  }
}

// x [tokens, heads, size] of any steps, with a dense last dimension of 32 n numbers; cos and sin [tokens, size]; halves a, b of each
// head become a cos - b sin, b cos + a sin.
void tunesmith_rotate(const BFloat* x, const BFloat* cos, const BFloat* sin, int64_t tokens, int64_t heads,
                      int64_t size, int64_t token_step, int64_t head_step, int64_t out_token_step,
                      int64_t out_head_step, int64_t threads, BFloat* out) {
  const int64_t half = size / 2;
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t token = 0; token < tokens; ++token) {
    const BFloat *c = cos + token * size, *s = sin + token * size;
    for (int64_t head = 0; head < heads; ++head) {
      const BFloat* from = x + token * token_step + head * head_step;
      BFloat* to = out + token * out_token_step + head * out_head_step;
      for (int64_t i = 0; i < half; i += kLanes) {
        const __m512 a = load(from + i), b = load(from + half + i);
        store(to + i, _mm512_fnmadd_ps(b, load(s + i), _mm512_mul_ps(a, load(c + i))));
        store(to + half + i, _mm512_fmadd_ps(a, load(s + half + i), _mm512_mul_ps(b, load(c + half + i))));
      }
    }
  }
}

// Rows z [rows, size] become exp(z - their largest), which goes into largest [rows]; their sums into sums [rows].
void tunesmith_exponentials(BFloat* z, int64_t rows, int64_t size, int64_t threads, float* largest, float* sums) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    BFloat* x = z + row * size;
    __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < size; i += kLanes) {
      const __mmask16 lanes = first_lanes(size - i);
      most = _mm512_mask_max_ps(most, lanes, most, load(x + i, lanes));
    }
    largest[row] = _mm512_reduce_max_ps(most);
    const __m512 reference = _mm512_set1_ps(largest[row]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += kLanes) {
      const __mmask16 lanes = first_lanes(size - i);
      const __m512 y = exp(_mm512_sub_ps(load(x + i, lanes), reference));
      sum = _mm512_mask_add_ps(sum, lanes, sum, y);
      store(x + i, lanes, y);
    }
    sums[row] = _mm512_reduce_add_ps(sum);
  }
}

}  // extern "C"
