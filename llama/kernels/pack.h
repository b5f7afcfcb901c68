// Blocks as GGUF stores them, row by row, into the tiles of weights.h, and back into floats.
#pragma once
#include <algorithm>

#include "weights.h"

// What blocks of one row look like in GGUF: bytes, and values, of each.
inline int block_bytes(int type) {
    switch (type) {
        case Q8_0: return 34;
        case Q4_0: return 18;
        case Q4_1: return 20;
        case Q4_K: return 144;
        default: return 210;
    }
}

inline int block_values(int type) { return type == Q4_K || type == Q6_K ? 256 : 32; }

// The scale and the least value of group g of a Q4_K block: 6 bits each of 12 bytes.
inline void unpack_six_bits(const uint8_t *twelve, int g, uint8_t &scale, uint8_t &least) {
    if (g < 4) {
        scale = twelve[g] & 63, least = twelve[g + 4] & 63;
    } else {
        scale = (twelve[g + 4] & 15) | (twelve[g - 4] >> 6 << 4);
        least = (twelve[g + 4] >> 4) | (twelve[g] >> 6 << 4);
    }
}

// Codes of `bits` bits become row r of vectors of words.
template <class Code> inline void pack_codes(int n, int bits, uint8_t *words, int r, Code code) {
    const int per_word = 32 / bits;
    for (int w = 0; w < n / per_word; w++) {
        uint32_t word = 0;
        for (int c = 0; c < per_word; c++) word |= uint32_t(code(w * per_word + c)) << c * bits;
        memcpy(words + w * 64 + r * 4, &word, 4);
    }
}

// Block `from` becomes column group `to` of a tile, as its row r.
inline void pack_block(int type, const uint8_t *from, uint8_t *to, int r) {
    auto halves = [&](const uint8_t *source, int n) {
        for (int i = 0; i < n; i++) memcpy(to + i * 32 + r * 2, source + i * 2, 2);
    };
    auto nibble = [](const uint8_t *codes) {  // the second half of 32 columns lies high
        return [codes](int c) { return codes[c % 16] >> c / 16 * 4 & 15; };
    };
    switch (type) {
        case Q8_0:
            halves(from, 1);
            pack_codes(32, 8, to + 32, r, [&](int c) { return from[2 + c]; });
            break;
        case Q4_0:
            halves(from, 1);
            pack_codes(32, 4, to + 32, r, nibble(from + 2));
            break;
        case Q4_1:
            halves(from, 2);
            pack_codes(32, 4, to + 64, r, nibble(from + 4));
            break;
        case Q4_K:
            halves(from, 2);
            for (int g = 0; g < 8; g++) unpack_six_bits(from + 4, g, to[64 + g * 16 + r], to[192 + g * 16 + r]);
            // Bytes hold 64 columns together, the second 32 high.
            pack_codes(256, 4, to + 320, r, [&](int c) {
                return from[16 + c / 64 * 32 + c % 32] >> c % 64 / 32 * 4 & 15;
            });
            break;
        case Q6_K:
            halves(from + 208, 1);
            for (int i = 0; i < 16; i++) to[32 + i * 16 + r] = from[192 + i];
            // Of 128 columns, a byte holds the low bits of column c and c + 64, and another the high bits of four.
            pack_codes(256, 4, to + 288, r, [&](int c) {
                return from[c / 128 * 64 + c % 64] >> c % 128 / 64 * 4 & 15;
            });
            pack_codes(256, 2, to + 2336, r, [&](int c) {
                return from[128 + c / 128 * 32 + c % 32] >> c % 128 / 32 * 2 & 3;
            });
    }
}

// Rows of blocks into tiles; rows that fill up the last tile stay zero.
inline void pack_blocks(int type, const uint8_t *blocks, int rows, int columns, uint8_t *tiles, int threads) {
    const int n = columns / block_values(type), n_tiles = (rows + TILE - 1) / TILE;
    const size_t tile_size = tile_bytes(type, columns), row_size = size_t(n) * block_bytes(type);
#pragma omp parallel for num_threads(threads)
    for (int tile = 0; tile < n_tiles; tile++) {
        uint8_t *to = tiles + tile * tile_size;
        if ((tile + 1) * TILE > rows) memset(to, 0, tile_size);
        for (int r = 0; r < TILE && tile * TILE + r < rows; r++) {
            const uint8_t *row = blocks + (size_t(tile) * TILE + r) * row_size;
            for (int b = 0; b < n; b++) pack_block(type, row + b * block_bytes(type), to + b * (tile_size / n), r);
        }
    }
}

// Values of columns [0, columns) of 16 packed rows: use(column, f32 of the rows).
template <class Use> inline void unpacked_tile(int type, const uint8_t *tile, int columns, Use use) {
    const int n = columns / block_values(type);
    const size_t size = tile_bytes(type, columns) / n;
    auto nibbles = [&](const uint8_t *words, int column, f32 scale, f32 least, float offset) {
        for (int c = 0; c < 32; c++)
            use(column + c, scale * four_bits(load<u32>(words + c / 8 * 64) >> c % 8 * 4, offset) + least);
    };
    for (int b = 0; b < n; b++) {
        const uint8_t *block = tile + b * size;
        f32 scale = from_half(load<u16>(block));
        switch (type) {
            case Q8_0:
                for (int c = 0; c < 32; c++) {
                    i32 code = load<i32>(block + 32 + c / 4 * 64) << (24 - c % 4 * 8) >> 24;
                    use(b * 32 + c, scale * __builtin_convertvector(code, f32));
                }
                break;
            case Q4_0: nibbles(block + 32, b * 32, scale, f32{}, -8); break;
            case Q4_1: nibbles(block + 64, b * 32, scale, from_half(load<u16>(block + 32)), 0); break;
            case Q4_K: {
                f32 dmin = from_half(load<u16>(block + 32));
                for (int g = 0; g < 8; g++) {
                    f32 least = dmin * __builtin_convertvector(widened(load<u8>(block + 192 + g * 16)), f32);
                    f32 mine = scale * __builtin_convertvector(widened(load<u8>(block + 64 + g * 16)), f32);
                    nibbles(block + 320 + g * 256, b * 256 + g * 32, mine, -least, 0);
                }
                break;
            }
            default:
                for (int g = 0; g < 16; g++) {
                    i32 code = widened(load<u8>(block + 32 + g * 16)) << 24 >> 24;
                    f32 mine = scale * __builtin_convertvector(code, f32);
                    u32 high = load<u32>(block + 2336 + g * 64);
                    for (int c = 0; c < 16; c++) {
                        u32 low = load<u32>(block + 288 + (g * 2 + c / 8) * 64) >> c % 8 * 4;
                        use(b * 256 + g * 16 + c, mine * (four_bits(low, 0) + two_bits(high >> c * 2, -32)));
                    }
                }
        }
    }
}
