// Sixteen bfloat16 numbers at a time, computed with in float32.

#pragma once

#include <immintrin.h>

#include <cstdint>

using BFloat = uint16_t;

constexpr int64_t kLanes = 16;  // floats of a register

inline __m512 load(const BFloat* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

inline void store(BFloat* x, __m512 y) { _mm256_storeu_si256((__m256i*)x, (__m256i)_mm512_cvtneps_pbh(y)); }

// 2^x to 2e-7: the nearest whole power, and the Taylor series of the rest.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.540353e-4f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.3333558e-3f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

inline __m512 exp(__m512 x) { return exp2(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f))); }

// The first `count` lanes (all for 16 and more), for the end of a row.
inline __mmask16 first_lanes(int64_t count) { return count >= kLanes ? 0xffff : __mmask16((1u << count) - 1); }

inline __m512 load(const BFloat* x, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
}

inline void store(BFloat* x, __mmask16 lanes, __m512 y) {
  _mm256_mask_storeu_epi16(x, lanes, (__m256i)_mm512_cvtneps_pbh(y));
}
