// Packs blocks as GGUF stores them, row by row, into the tiles of blocks.h.
#pragma once
#include <algorithm>

#include "threads.h"
#include "weights.h"

// How GGUF stores a block: its bytes, where its scale and its minimum (halves) and its codes are, and four codes at a
// time, of columns 4 * `four` on, each in a byte. `scale` and `minimum` are those of a group of columns.
struct Stored {
    const uint8_t *block;

    uint32_t word(int at) const {
        uint32_t v;
        memcpy(&v, block + at, 4);
        return v;
    }
    // Bits [shift, shift + bits) of each of four bytes.
    uint32_t fields(int at, int shift, int bits) const { return word(at) >> shift & 0x01010101u * ((1 << bits) - 1); }
    // 16 bytes hold 32 columns, the second 16 in the upper bits.
    uint32_t nibbles(int at, int four) const { return fields(at + four % 4 * 4, four / 4 * 4, 4); }
    // One bit a column, in the lowest bit of each byte.
    uint32_t bits(int at, int four) const { return (word(at) >> 4 * four & 15) * 0x00204081u & 0x01010101u; }
    // 32 bytes hold 32 columns of `per_byte` groups each, one after another from the low bits up.
    uint32_t strided(int at, int four, int bits) const {
        const int per_byte = 8 / bits, group = four / 8;
        return fields(at + group / per_byte * 32 + four % 8 * 4, group % per_byte * bits, bits);
    }
    // The scale or the minimum of a group in Q4_K and Q5_K: 6 bits each, in 12 bytes.
    uint8_t six_bits(int g, bool minimum) const {
        const uint8_t *packed = block + 4;
        if (g < 4) return packed[g + minimum * 4] & 63;
        return (packed[g + 4] >> minimum * 4 & 15) | (packed[g - !minimum * 4] >> 6 << 4);
    }
};

template <int TYPE> struct Source;

template <> struct Source<Q8_0> : Stored {
    static constexpr int SIZE = 34, SCALE = 0, MINIMUM = 0;
    uint32_t codes(int four) const { return word(2 + four * 4) ^ (BYTE_OFFSET ? 0x80808080u : 0); }
};
template <> struct Source<Q4_0> : Stored {
    static constexpr int SIZE = 18, SCALE = 0, MINIMUM = 0;
    uint32_t codes(int four) const { return nibbles(2, four); }
};
template <> struct Source<IQ4_NL> : Source<Q4_0> {};
template <> struct Source<Q4_1> : Stored {
    static constexpr int SIZE = 20, SCALE = 0, MINIMUM = 2;
    uint32_t codes(int four) const { return nibbles(4, four); }
};
template <> struct Source<Q5_0> : Stored {
    static constexpr int SIZE = 22, SCALE = 0, MINIMUM = 0;
    uint32_t codes(int four) const { return nibbles(6, four) | bits(2, four) << 4; }
};
template <> struct Source<Q5_1> : Stored {
    static constexpr int SIZE = 24, SCALE = 0, MINIMUM = 2;
    uint32_t codes(int four) const { return nibbles(8, four) | bits(4, four) << 4; }
};
template <> struct Source<Q2_K> : Stored {
    static constexpr int SIZE = 84, SCALE = 80, MINIMUM = 82;
    uint32_t codes(int four) const { return strided(16, four, 2); }
    uint8_t scale(int g) const { return block[g] & 15; }
    uint8_t minimum(int g) const { return block[g] >> 4; }
};
template <> struct Source<Q3_K> : Stored {
    static constexpr int SIZE = 110, SCALE = 108, MINIMUM = 0;
    uint32_t codes(int four) const { return strided(32, four, 2) | strided(0, four, 1) << 2; }
    uint8_t scale(int g) const {
        const int low = block[96 + g % 8] >> g / 8 * 4 & 15, high = block[104 + g % 4] >> g / 4 * 2 & 3;
        return uint8_t((low | high << 4) - 32);
    }
};
template <> struct Source<Q4_K> : Stored {
    static constexpr int SIZE = 144, SCALE = 0, MINIMUM = 2;
    uint32_t codes(int four) const { return strided(16, four, 4); }
    uint8_t scale(int g) const { return six_bits(g, false); }
    uint8_t minimum(int g) const { return six_bits(g, true); }
};
template <> struct Source<Q5_K> : Stored {
    static constexpr int SIZE = 176, SCALE = 0, MINIMUM = 2;
    uint32_t codes(int four) const { return strided(48, four, 4) | strided(16, four, 1) << 4; }
    uint8_t scale(int g) const { return six_bits(g, false); }
    uint8_t minimum(int g) const { return six_bits(g, true); }
};
template <> struct Source<Q6_K> : Stored {
    static constexpr int SIZE = 210, SCALE = 208, MINIMUM = 0;
    // Of 128 columns, a byte holds the low bits of columns c and c + 64, and another the high bits of four.
    uint32_t codes(int four) const {
        const int half = four / 32, c = four % 32;
        const uint32_t low = fields(half * 64 + c % 16 * 4, c / 16 * 4, 4);
        return low | fields(128 + half * 32 + c % 8 * 4, c / 8 * 2, 2) << 4;
    }
    uint8_t scale(int g) const { return block[192 + g]; }
};
template <> struct Source<IQ4_XS> : Stored {
    static constexpr int SIZE = 136, SCALE = 0, MINIMUM = 0;
    uint32_t codes(int four) const { return nibbles(8 + four / 8 * 16, four % 8); }
    uint8_t scale(int g) const {
        const int low = block[4 + g / 2] >> g % 2 * 4 & 15, high = (block[2] | block[3] << 8) >> g * 2 & 3;
        return uint8_t((low | high << 4) - 32);
    }
};

// Writes the codes' bits [shift, shift + BITS) of a block to lane r of vectors of words.
template <int BITS, class From> inline void pack_plane(const From &from, int columns, int shift, uint8_t *words, int r) {
    constexpr int PER_WORD = 8 / BITS;
    constexpr uint32_t MASK = BITS == 8 ? ~0u : 0x01010101u * ((1 << BITS) - 1);
    for (int w = 0; w < columns / 4 / PER_WORD; w++) {
        uint32_t word = 0;
#pragma GCC unroll 8
        for (int i = 0; i < PER_WORD; i++) word |= (from.codes(w * PER_WORD + i) >> shift & MASK) << i * BITS;
        memcpy(words + w * 64 + r * 4, &word, 4);
    }
}

// Writes a block to row r of a tile.
template <int TYPE> inline void pack_block(const uint8_t *block, uint8_t *head, uint8_t *words, int r) {
    constexpr Format f = format(TYPE);
    using From = Source<TYPE>;
    From from;
    from.block = block;
    memcpy(head + r * 2, block + From::SCALE, 2);
    if constexpr (f.minimums) {
        uint16_t minimum;
        memcpy(&minimum, block + From::MINIMUM, 2);
        if (f.group_scales()) minimum ^= 0x8000;  // GGUF subtracts these
        memcpy(head + 32 + r * 2, &minimum, 2);
    }
    if constexpr (f.group_scales()) {
        uint8_t *scales = head + 32 * (1 + f.minimums) + r;
        for (int g = 0; g < f.groups(); g++) {
            scales[g * LANES] = from.scale(g);
            if constexpr (f.minimums) scales[(f.groups() + g) * LANES] = from.minimum(g);
        }
    }
    pack_plane<f.low>(from, f.columns, 0, words, r);
    if constexpr (f.high > 0) pack_plane<f.high>(from, f.columns, f.low, words + f.low_bytes(), r);
}

// Packs rows of blocks into tiles; rows that pad the last tile are zero.
extern "C" void pack(int type, const uint8_t *blocks, int rows, int columns, uint8_t *tiles, int threads) {
    with_type(type, [&](auto constant) {
        constexpr int TYPE = constant.value;
        constexpr Format f = format(TYPE);
        const int n = columns / f.columns, n_tiles = (rows + TILE - 1) / TILE;
        const size_t tile_size = packed_tile_bytes(TYPE, columns), row_size = size_t(n) * Source<TYPE>::SIZE;
        parallel_for(threads, n_tiles, [&](int tile) {
            uint8_t *to = tiles + tile * tile_size;
            if ((tile + 1) * TILE > rows) memset(to, 0, tile_size);
            for (int b = 0; b < n; b++)
                for (int r = 0; r < TILE && tile * TILE + r < rows; r++)
                    pack_block<TYPE>(
                        blocks + (size_t(tile) * TILE + r) * row_size + size_t(b) * Source<TYPE>::SIZE,
                        to + b * f.head_bytes(), to + heads_bytes(f, columns) + size_t(b) * f.word_bytes(), r
                    );
        });
    });
}
