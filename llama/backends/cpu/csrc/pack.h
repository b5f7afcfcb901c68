// Packs blocks as GGUF stores them, row by row, into the tiles of blocks.h: 16 rows at a time, a row in each lane.
#pragma once
#include "threads.h"
#include "weights.h"

constexpr int MAX_BLOCK_SIZE = 210;
static const uint8_t ZEROS[MAX_BLOCK_SIZE] = {};

// A block of each of 16 rows, as GGUF stores it, in words of four bytes. Words begin at byte BASE of a block.
//
// What Source gives of a type: a block's bytes, where its scale and its minimum (halves) are, its codes of four columns,
// from 4 * `four` on, each in a byte, and the scales and minimums of four groups, from 4 * `four` on, likewise.
template <int BASE> struct Stored {
    u32 words[MAX_BLOCK_SIZE / 4];

    void read(const uint8_t *const *blocks, int size) {
        for (int r = 0; r < LANES; r++)
            for (int w = 0; w < (size - BASE) / 4; w++) memcpy((uint8_t *)&words[w] + r * 4, blocks[r] + BASE + w * 4, 4);
    }
    u32 word(int at) const { return words[(at - BASE) / 4]; }
    // Bits [shift, shift + bits) of each of four bytes.
    u32 fields(int at, int shift, int bits) const { return word(at) >> shift & 0x01010101u * ((1 << bits) - 1); }
    // 16 bytes hold 32 columns, the second 16 in the upper bits.
    u32 nibbles(int at, int four) const { return fields(at + four % 4 * 4, four / 4 * 4, 4); }
    // One bit a column, in the lowest bit of each byte.
    u32 bits(int at, int four) const { return (word(at) >> 4 * four & 15) * 0x00204081u & 0x01010101u; }
    // 32 bytes hold 32 columns of `per_byte` groups each, one after another from the low bits up.
    u32 strided(int at, int four, int bits) const {
        const int per_byte = 8 / bits, group = four / 8;
        return fields(at + group / per_byte * 32 + four % 8 * 4, group % per_byte * bits, bits);
    }
    // Scales or minimums of Q4_K and Q5_K: 6 bits each, in 12 bytes.
    u32 six_bits(int four, bool minimum) const {
        if (four == 0) return fields(4 + minimum * 4, 0, 6);
        return fields(12, minimum * 4, 4) | fields(4 + minimum * 4, 6, 2) << 4;
    }
    // Bytes less 32, in two's complement, of bytes below 64.
    static u32 less_32(u32 bytes) { return ((bytes | 0x80808080u) - 0x20202020u) ^ 0x80808080u; }
};

template <int TYPE> struct Source;

template <> struct Source<Q8_0> : Stored<2> {
    static constexpr int SIZE = 34, SCALE = 0, MINIMUM = 0;
    u32 codes(int four) const { return word(2 + four * 4) ^ (BYTE_OFFSET ? 0x80808080u : 0); }
};
template <> struct Source<Q4_0> : Stored<2> {
    static constexpr int SIZE = 18, SCALE = 0, MINIMUM = 0;
    u32 codes(int four) const { return nibbles(2, four); }
};
template <> struct Source<IQ4_NL> : Source<Q4_0> {};
template <> struct Source<Q4_1> : Stored<0> {
    static constexpr int SIZE = 20, SCALE = 0, MINIMUM = 2;
    u32 codes(int four) const { return nibbles(4, four); }
};
template <> struct Source<Q5_0> : Stored<2> {
    static constexpr int SIZE = 22, SCALE = 0, MINIMUM = 0;
    u32 codes(int four) const { return nibbles(6, four) | bits(2, four) << 4; }
};
template <> struct Source<Q5_1> : Stored<0> {
    static constexpr int SIZE = 24, SCALE = 0, MINIMUM = 2;
    u32 codes(int four) const { return nibbles(8, four) | bits(4, four) << 4; }
};
template <> struct Source<Q2_K> : Stored<0> {
    static constexpr int SIZE = 84, SCALE = 80, MINIMUM = 82;
    u32 codes(int four) const { return strided(16, four, 2); }
    u32 scales(int four) const { return fields(four * 4, 0, 4); }
    u32 minimums(int four) const { return fields(four * 4, 4, 4); }
};
template <> struct Source<Q3_K> : Stored<0> {
    static constexpr int SIZE = 110, SCALE = 108, MINIMUM = 0;
    u32 codes(int four) const { return strided(32, four, 2) | strided(0, four, 1) << 2; }
    u32 scales(int four) const {
        return less_32(fields(96 + four % 2 * 4, four / 2 * 4, 4) | fields(104, four * 2, 2) << 4);
    }
};
template <> struct Source<Q4_K> : Stored<0> {
    static constexpr int SIZE = 144, SCALE = 0, MINIMUM = 2;
    u32 codes(int four) const { return strided(16, four, 4); }
    u32 scales(int four) const { return six_bits(four, false); }
    u32 minimums(int four) const { return six_bits(four, true); }
};
template <> struct Source<Q5_K> : Stored<0> {
    static constexpr int SIZE = 176, SCALE = 0, MINIMUM = 2;
    u32 codes(int four) const { return strided(48, four, 4) | strided(16, four, 1) << 4; }
    u32 scales(int four) const { return six_bits(four, false); }
    u32 minimums(int four) const { return six_bits(four, true); }
};
template <> struct Source<Q6_K> : Stored<0> {
    static constexpr int SIZE = 210, SCALE = 208, MINIMUM = 0;
    // Of 128 columns, a byte holds the low bits of columns c and c + 64, and another the high bits of four.
    u32 codes(int four) const {
        const int half = four / 32, c = four % 32;
        const u32 low = fields(half * 64 + c % 16 * 4, c / 16 * 4, 4);
        return low | fields(128 + half * 32 + c % 8 * 4, c / 8 * 2, 2) << 4;
    }
    u32 scales(int four) const { return word(192 + four * 4); }
};
template <> struct Source<IQ4_XS> : Stored<0> {
    static constexpr int SIZE = 136, SCALE = 0, MINIMUM = 0;
    u32 codes(int four) const { return nibbles(8 + four / 8 * 16, four % 8); }
    u32 scales(int four) const {
        u32 bytes = {};
        for (int i = 0, g = four * 4; i < 4; i++, g++)
            bytes = bytes | ((word(4) >> 4 * g & 15) | (word(0) >> (16 + 2 * g) & 3) << 4) << 8 * i;
        return less_32(bytes);
    }
};

// Writes the codes' bits [shift, shift + BITS) of blocks as vectors of words.
template <int BITS, class From> inline void pack_plane(const From &from, int columns, int shift, uint8_t *to) {
    constexpr int PER_WORD = 8 / BITS;
    constexpr uint32_t MASK = BITS == 8 ? ~0u : 0x01010101u * ((1 << BITS) - 1);
#pragma GCC unroll 8
    for (int w = 0; w < columns / 4 / PER_WORD; w++) {
        u32 words = {};
#pragma GCC unroll 8
        for (int i = 0; i < PER_WORD; i++) words = words | (from.codes(w * PER_WORD + i) >> shift & MASK) << i * BITS;
        store(to + w * sizeof words, words);
    }
}

// Writes the bytes of four groups' scales: int8 [4][16].
inline void pack_scales(u32 bytes, uint8_t *to) {
    for (int i = 0; i < 4; i++) {
        // In two conversions, see `widened`.
        const u8 scales = __builtin_convertvector(__builtin_convertvector(bytes >> 8 * i & 255, u16), u8);
        memcpy(to + i * LANES, &scales, sizeof scales);
    }
}

// Packs a block of each of 16 rows.
template <int TYPE> inline void pack_blocks(const uint8_t *const *blocks, uint8_t *head, uint8_t *words) {
    constexpr Format f = format(TYPE);
    using From = Source<TYPE>;
    From from;
    from.read(blocks, From::SIZE);
    for (int r = 0; r < LANES; r++) {
        memcpy(head + r * 2, blocks[r] + From::SCALE, 2);
        if constexpr (f.minimums) {
            uint16_t minimum;
            memcpy(&minimum, blocks[r] + From::MINIMUM, 2);
            if (f.group_scales()) minimum ^= 0x8000;  // GGUF subtracts these
            memcpy(head + 32 + r * 2, &minimum, 2);
        }
    }
    if constexpr (f.group_scales()) {
        uint8_t *scales = head + 32 * (1 + f.minimums);
        for (int four = 0; four < f.groups() / 4; four++) {
            pack_scales(from.scales(four), scales + four * 4 * LANES);
            if constexpr (f.minimums) pack_scales(from.minimums(four), scales + (f.groups() + four * 4) * LANES);
        }
    }
    pack_plane<f.low>(from, f.columns, 0, words);
    if constexpr (f.high > 0) pack_plane<f.high>(from, f.columns, f.low, words + f.low_bytes());
}

// Packs rows of blocks into tiles; rows that pad the last tile are zero.
extern "C" void pack(int type, const uint8_t *blocks, int rows, int columns, uint8_t *tiles, int threads) {
    with_type(type, [&](auto constant) {
        constexpr int TYPE = constant.value;
        constexpr Format f = format(TYPE);
        constexpr int SIZE = Source<TYPE>::SIZE;
        const int n = columns / f.columns, n_tiles = (rows + TILE - 1) / TILE;
        const size_t tile_size = packed_tile_bytes(TYPE, columns), row_size = size_t(n) * SIZE;
        parallel_for(threads, n_tiles, [&](int tile) {
            uint8_t *head = tiles + tile * tile_size, *words = head + heads_bytes(f, columns);
            for (int b = 0; b < n; b++) {
                const uint8_t *sixteen[LANES];
                for (int r = 0; r < LANES; r++) {
                    const int row = tile * TILE + r;
                    sixteen[r] = row < rows ? blocks + row * row_size + size_t(b) * SIZE : ZEROS;
                }
                pack_blocks<TYPE>(sixteen, head + b * f.head_bytes(), words + size_t(b) * f.word_bytes());
            }
        });
    });
}
