// The kernels on matrix tiles with the six tile instructions in plain C++, and AVX-512 through SIMDe
// (Debian: libsimde-dev). For the check program, in place of kernels_amx.cc, with FQT_ONLY_ISA.

#include "baseline.h"

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "simde_missing.h"

namespace {

struct Tile {
  int8_t rows[16][64];
};
thread_local Tile tiles[8];

void load_tile(Tile& tile, const void* base, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) {
    std::memcpy(tile.rows[i], static_cast<const char*>(base) + i * stride, 64);
  }
}

void store_tile(const Tile& tile, void* base, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) {
    std::memcpy(static_cast<char*>(base) + i * stride, tile.rows[i], 64);
  }
}

template <typename A, typename B>
void dot(Tile& sums, const Tile& a, const Tile& b) {
  for (int m = 0; m < 16; ++m) {
    int32_t row[16];
    std::memcpy(row, sums.rows[m], sizeof row);
    for (int k = 0; k < 64; ++k) {
      for (int n = 0; n < 16; ++n) {
        row[n] += static_cast<A>(a.rows[m][k]) * static_cast<B>(b.rows[k / 4][4 * n + k % 4]);
      }
    }
    std::memcpy(sums.rows[m], row, sizeof row);
  }
}

}  // namespace

#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(i) std::memset(&tiles[i], 0, sizeof(Tile))
#define _tile_loadd(i, base, stride) load_tile(tiles[i], base, stride)
#define _tile_stored(i, base, stride) store_tile(tiles[i], base, stride)
#define _tile_dpbssd(c, a, b) dot<int8_t, int8_t>(tiles[c], tiles[a], tiles[b])
#define _tile_dpbusd(c, a, b) dot<uint8_t, int8_t>(tiles[c], tiles[a], tiles[b])
#define _tile_dpbsud(c, a, b) dot<int8_t, uint8_t>(tiles[c], tiles[a], tiles[b])

namespace fqt::amx {
bool runs_here() { return true; }
}  // namespace fqt::amx

#define FQT_ISA amx
#define FQT_SIMD "simd_avx512.inc"
#define FQT_HAS_TILES
#include "kernels.inc"
