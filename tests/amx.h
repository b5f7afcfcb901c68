// Stands in for the matrix unit (AMX), so that the products that need it are tested on processors without one. A
// compiler gets it by -include, before the kernels' own source.
#pragma once
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define __AMX_BF16__ 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace amx {
typedef float row __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
alignas(64) static thread_local row tiles[8][16];  // of 16 rows of 64 bytes each

inline void load(int tile, const void *from, size_t stride) {
    for (int r = 0; r < 16; r++) memcpy(&tiles[tile][r], (const char *)from + r * stride, 64);
}

inline void store(int tile, void *to, size_t stride) {
    for (int r = 0; r < 16; r++) memcpy((char *)to + r * stride, &tiles[tile][r], 64);
}

// Each row of a has 32 bf16 values, each row of b 16 pairs: to[r][c] += the sum of a[r][2 k + i] * b[k][c][i].
inline void add_products(int to, int a, int b) {
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++) {
            words pairs = (words)tiles[b][k], bits = (words)tiles[a][r];
            row even = (row)(pairs << 16), odd = (row)(pairs >> 16 << 16);
            row first = (row)(bits << 16), second = (row)(bits >> 16 << 16);
            tiles[to][r] += first[k] * even;
            tiles[to][r] += second[k] * odd;
        }
}
}  // namespace amx

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(tile) memset(amx::tiles[tile], 0, sizeof amx::tiles[tile])
#define _tile_loadd(tile, from, stride) amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx::store(tile, to, stride)
#define _tile_dpbf16ps(to, a, b) amx::add_products(to, a, b)
#define _tile_loadconfig(config) (void)(config)
#define _tile_release()
#define syscall(...) 0
#endif
