// What the matrix instructions and the conversions to halves compute, lane by lane. machine.h calls the two products when all
// lanes of a warp have arrived; emulator.cpp alone includes this file.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Whether a result gets an error. This is so for every second argument, independent of its last bits.
bool odd(float v) { return as_bits(v) * 0x9e3779b1u >> 31; }

float flush(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }

// One value for each column of a tile.
using Floats = float __attribute__((vector_size(32)));
using Ints = std::int32_t __attribute__((vector_size(32)));
using Unsigned = std::uint32_t __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));
using Longs = std::int64_t __attribute__((vector_size(64)));

// sum + addends[0] + ... + addends[3]
Floats add_aligned(Floats sum, const Floats (&addends)[4]) {
  constexpr int kBits = 24;  // bits of a mantissa below the leading one of the largest addend: one more than a float has
  const auto magnitude = [](Floats v) { return Ints(v) & 0x7fffffff; };
  Ints largest = magnitude(sum);
  for (const Floats& addend : addends) {
    const Ints other = magnitude(addend);
    largest = largest < other ? other : largest;
  }
  Ints exponent = largest >> 23;
  exponent = exponent < kBits + 1 ? Ints{} + (kBits + 1) : exponent;  // large enough that both powers of two are normal
  const Floats scale = Floats((2 * 127 + kBits - exponent) << 23), unscale = Floats((exponent - kBits) << 23);
  // Conversions round toward zero. Integers are unsigned, because the sum of the integers that a NaN and an Inf become
  // exceeds an int. That sum is not used.
  Unsigned total = Unsigned(__builtin_convertvector(sum * scale, Ints));
  Floats plain = sum;
  for (const Floats& addend : addends) {
    total += Unsigned(__builtin_convertvector(addend * scale, Ints));
    plain += addend;
  }
  const Longs bits = Longs(__builtin_convertvector(Ints(total), Doubles)) & ~((std::int64_t(1) << 29) - 1);
  const Floats truncated = __builtin_convertvector(Doubles(bits), Floats) * unscale;
  return exponent == 255 ? plain : truncated;  // NaN or Inf
}

float from_half(std::uint32_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float magnitude = rest < 0x400u ? float(rest) * 0x1p-24f : as_float((rest << 13) + 0x38000000u);
  return sign ? -magnitude : magnitude;
}

std::uint32_t to_half(float v) {
  const std::uint32_t bits = as_bits(v), sign = bits >> 16 & 0x8000u;
  if (std::isnan(v)) return 0x7fffu;
  const float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  if (magnitude < 0x1p-14f) return sign | std::uint32_t(std::nearbyint(magnitude * 0x1p24f));
  const std::uint32_t rest = as_bits(magnitude);
  return sign | ((rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13);
}

void multiply_add_halves(const Fragments* const* lanes) {
  constexpr int kRows = 16, kColumns = 8, kMostDepth = 16, kStep = 4;
  const int registers = lanes[0]->registers, depth = 4 * registers;
  float a[kRows][kMostDepth];
  Floats b[kMostDepth];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& f = *lanes[lane];
    const int g = lane / 4, q = lane % 4;
    for (int n = 0; n < registers; ++n) {
      for (int half = 0; half < 2; ++half) {
        const int k = 2 * q + half + 8 * (n / 2);
        a[g + 8 * (n % 2)][k] = from_half(f.a[n] >> 16 * half & 0xffffu);
        if (n % 2 == 0) b[k][g] = from_half((n == 0 ? f.b0 : f.b1) >> 16 * half & 0xffffu);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    const auto c = [&](int column) -> float& { return lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2]; };
    Floats sum;
    for (int column = 0; column < kColumns; ++column) sum[column] = c(column);
    for (int begin = 0; begin < depth; begin += kStep) {
      Floats products[kStep];  // exact, because the factors have 11 bits each
      for (int k = 0; k < kStep; ++k) products[k] = a[row][begin + k] * b[begin + k];
      sum = add_aligned(sum, products);
    }
    for (int column = 0; column < kColumns; ++column) c(column) = sum[column];
  }
}

void multiply_add64(const Fragments64* const* lanes) {
  constexpr int kRows = 16, kColumns = 8, kDepth = 8;
  double a[kRows][kDepth], b[kDepth][kColumns];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments64& f = *lanes[lane];
    const int g = lane / 4, q = lane % 4;
    a[g][q] = f.a[0];
    a[g + 8][q] = f.a[1];
    a[g][q + 4] = f.a[2];
    a[g + 8][q + 4] = f.a[3];
    b[q][g] = f.b[0];
    b[q + 4][g] = f.b[1];
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      double& c = lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2];
      double sum = c;
      for (int k = 0; k < kDepth; ++k) sum = std::fma(a[row][k], b[k][column], sum);
      c = sum;
    }
  }
}

}  // namespace
}  // namespace emulator
