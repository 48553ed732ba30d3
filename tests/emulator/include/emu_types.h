// CUDA's vector types.
#pragma once

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Always inlined: GCC instruments no store of what a call returns, and TSan would not see it.
#define EMU_MAKE [[gnu::always_inline]] inline
EMU_MAKE float2 make_float2(float x, float y) { return {x, y}; }
EMU_MAKE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
EMU_MAKE double2 make_double2(double x, double y) { return {x, y}; }
EMU_MAKE int2 make_int2(int x, int y) { return {x, y}; }
EMU_MAKE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
EMU_MAKE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
EMU_MAKE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
#undef EMU_MAKE
