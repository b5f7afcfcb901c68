// Packs blocks as GGUF stores them, row by row, into the tiles of weights.h, and unpacks tiles to floats.
#pragma once
#include <algorithm>

#include "weights.h"

// Bytes of a block in GGUF.
inline int block_bytes(int type) {
    switch (type) {
        case Q8_0: return 34;
        case Q4_0: return 18;
        case Q4_1: return 20;
        case Q4_K: return 144;
        default: return 210;
    }
}

// The scale and the minimum of group g of a Q4_K block, 6 bits each in `packed`, 12 bytes.
inline void unpack_six_bits(const uint8_t *packed, int g, uint8_t &scale, uint8_t &minimum) {
    if (g < 4) {
        scale = packed[g] & 63, minimum = packed[g + 4] & 63;
    } else {
        scale = (packed[g + 4] & 15) | (packed[g - 4] >> 6 << 4);
        minimum = (packed[g + 4] >> 4) | (packed[g] >> 6 << 4);
    }
}

// Writes n codes of `bits` bits, code(i), to lane r of vectors of words.
template <class Code> inline void pack_codes(int n, int bits, uint8_t *words, int r, Code code) {
    const int per_word = 32 / bits;
    for (int w = 0; w < n / per_word; w++) {
        uint32_t word = 0;
        for (int c = 0; c < per_word; c++) word |= uint32_t(code(w * per_word + c)) << c * bits;
        memcpy(words + w * 64 + r * 4, &word, 4);
    }
}

// Writes block `from` to row r of a tile's group of columns.
inline void pack_block(int type, const uint8_t *from, uint8_t *head, uint8_t *words, int r) {
    auto halves = [&](const uint8_t *source, int n) {
        for (int i = 0; i < n; i++) memcpy(head + i * 32 + r * 2, source + i * 2, 2);
    };
    auto nibble = [](const uint8_t *codes) {  // the second 16 of 32 columns are in the upper bits
        return [codes](int c) { return codes[c % 16] >> c / 16 * 4 & 15; };
    };
    switch (type) {
        case Q8_0:
            halves(from, 1);
            pack_codes(32, 8, words, r, [&](int c) { return from[2 + c]; });
            break;
        case Q4_0:
            halves(from, 1);
            pack_codes(32, 4, words, r, nibble(from + 2));
            break;
        case Q4_1:
            halves(from, 2);
            pack_codes(32, 4, words, r, nibble(from + 4));
            break;
        case Q4_K:
            halves(from, 2);
            for (int g = 0; g < 8; g++) unpack_six_bits(from + 4, g, head[64 + g * 16 + r], head[192 + g * 16 + r]);
            // 32 bytes hold 64 columns, the second 32 in the upper bits.
            pack_codes(256, 4, words, r, [&](int c) {
                return from[16 + c / 64 * 32 + c % 32] >> c % 64 / 32 * 4 & 15;
            });
            break;
        case Q6_K:
            halves(from + 208, 1);
            for (int i = 0; i < 16; i++) head[32 + i * 16 + r] = from[192 + i];
            // Of 128 columns, a byte holds the low bits of columns c and c + 64, and another the high bits of four.
            pack_codes(256, 4, words, r, [&](int c) {
                return from[c / 128 * 64 + c % 64] >> c % 128 / 64 * 4 & 15;
            });
            pack_codes(256, 2, words + 2048, r, [&](int c) {
                return from[128 + c / 128 * 32 + c % 32] >> c % 128 / 32 * 2 & 3;
            });
    }
}

// Packs rows of blocks into tiles; rows that pad the last tile are zero.
extern "C" void pack(int type, const uint8_t *blocks, int rows, int columns, uint8_t *tiles, int threads) {
    const Layout l = layout(type);
    const int n = columns / l.columns, n_tiles = (rows + TILE - 1) / TILE;
    const size_t tile_size = tile_bytes(type, columns), row_size = size_t(n) * block_bytes(type);
#pragma omp parallel for num_threads(threads)
    for (int tile = 0; tile < n_tiles; tile++) {
        uint8_t *to = tiles + tile * tile_size;
        if ((tile + 1) * TILE > rows) memset(to, 0, tile_size);
        for (int r = 0; r < TILE && tile * TILE + r < rows; r++) {
            const uint8_t *row = blocks + (size_t(tile) * TILE + r) * row_size;
            uint8_t *head = to, *words = to + heads_bytes(l, columns);
            for (int b = 0; b < n; b++, head += l.head, words += l.words)
                pack_block(type, row + b * block_bytes(type), head, words, r);
        }
    }
}

// Dequantizes a tile: calls use(column, the column's values in the 16 rows) for each column.
template <class Use> inline void unpack_tile(int type, const uint8_t *tile, int columns, Use use) {
    const Layout l = layout(type);
    const uint8_t *head = tile, *words = tile + heads_bytes(l, columns);
    auto nibbles = [&](int group, int first, f32 scale, f32 minimum, float offset) {
        for (int c = 0; c < 32; c++) {
            u32 codes = load<u32>(words + group * 256 + c / 8 * 64) >> c % 8 * 4;
            use(first + c, scale * four_bits(codes, offset) + minimum);
        }
    };
    for (int first = 0; first < columns; first += l.columns, head += l.head, words += l.words) {
        f32 scale = from_half(load<u16>(head));
        switch (type) {
            case Q8_0:
                for (int c = 0; c < 32; c++) {
                    i32 code = load<i32>(words + c / 4 * 64) << (24 - c % 4 * 8) >> 24;
                    use(first + c, scale * __builtin_convertvector(code, f32));
                }
                break;
            case Q4_0: nibbles(0, first, scale, f32{}, -8); break;
            case Q4_1: nibbles(0, first, scale, from_half(load<u16>(head + 32)), 0); break;
            case Q4_K: {
                f32 dmin = from_half(load<u16>(head + 32));
                for (int g = 0; g < 8; g++) {
                    f32 minimum = dmin * __builtin_convertvector(widened(load<u8>(head + 192 + g * 16)), f32);
                    f32 group_scale = scale * __builtin_convertvector(widened(load<u8>(head + 64 + g * 16)), f32);
                    nibbles(g, first + g * 32, group_scale, -minimum, 0);
                }
                break;
            }
            default:
                for (int g = 0; g < 16; g++) {
                    i32 code = widened(load<u8>(head + 32 + g * 16)) << 24 >> 24;
                    f32 group_scale = scale * __builtin_convertvector(code, f32);
                    u32 high = load<u32>(words + 2048 + g * 64);
                    for (int c = 0; c < 16; c++) {
                        u32 low = load<u32>(words + (g * 2 + c / 8) * 64) >> c % 8 * 4;
                        use(first + g * 16 + c, group_scale * (four_bits(low, 0) + two_bits(high >> c * 2, -32)));
                    }
                }
        }
    }
}
