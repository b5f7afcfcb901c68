// Quantized blocks as the kernels store them: tiles of 16 rows (see D31).
//
// A tile is first the heads of all its blocks, one after another, and then their codes, as vectors of 16 words with one
// row in each lane, so that nothing is summed over lanes. A byte of a word belongs to one of four adjacent columns; where
// codes have fewer than 8 bits, it has the codes of several such fours, the first in its low bits. Codes of 3, 5 and 6
// bits are in two planes: words of their low bits, and then words of the others.
//
// A head is: half scale[16]; half minimum[16], if the type has minimums; and if groups of columns have scales of their
// own, int8 scale[groups][16], and with minimums int8 minimum[groups][16]. A value is
//     scale * group scale * (code - offset) + minimum * group minimum.
#pragma once
#include <cstddef>
#include <type_traits>

#include "dot.h"

enum BlockType : int32_t {
    Q8_0 = 3, Q4_0, Q4_1, Q4_K, Q6_K, Q5_0, Q5_1, Q5_K, Q2_K, Q3_K, IQ4_NL, IQ4_XS
};

struct Format {
    int columns;    // of a block
    int group;      // columns that share a scale
    int low, high;  // bits of a code in the first and in the second plane
    int offset;
    bool minimums;
    bool table;  // codes are indices of a table

    constexpr int groups() const { return columns / group; }
    constexpr bool group_scales() const { return columns > group; }
    constexpr int head_bytes() const {
        return LANES * (1 + minimums) * (2 + (group_scales() ? groups() : 0));
    }
    constexpr int low_bytes() const { return columns * low / 8 * LANES; }
    constexpr int word_bytes() const { return columns * (low + high) / 8 * LANES; }
};

constexpr Format format(int type) {
    switch (type) {
        case Q8_0: return {32, 32, 8, 0, BYTE_OFFSET, false, false};
        case Q4_0: return {32, 32, 4, 0, 8, false, false};
        case Q4_1: return {32, 32, 4, 0, 0, true, false};
        case Q5_0: return {32, 32, 4, 1, 16, false, false};
        case Q5_1: return {32, 32, 4, 1, 0, true, false};
        case IQ4_NL: return {32, 32, 4, 0, BYTE_OFFSET, false, true};
        case Q2_K: return {256, 16, 2, 0, 0, true, false};
        case Q3_K: return {256, 16, 2, 1, 4, false, false};
        case Q4_K: return {256, 32, 4, 0, 0, true, false};
        case Q5_K: return {256, 32, 4, 1, 0, true, false};
        case Q6_K: return {256, 16, 4, 2, 32, false, false};
        default: return {256, 32, 4, 0, BYTE_OFFSET, false, true};
    }
}

// The values that the codes of IQ4_NL and IQ4_XS stand for, plus BYTE_OFFSET.
constexpr int8_t TABLE[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
struct OffsetTable {
    uint8_t bytes[16];
    constexpr OffsetTable() : bytes() {
        for (int i = 0; i < 16; i++) bytes[i] = uint8_t(TABLE[i] + BYTE_OFFSET);
    }
};
constexpr OffsetTable OFFSET_TABLE;

// Calls use(std::integral_constant<int, TYPE>) for a type of blocks.
template <class Use> inline void with_type(int type, Use use) {
    switch (type) {
        case Q8_0: return use(std::integral_constant<int, Q8_0>());
        case Q4_0: return use(std::integral_constant<int, Q4_0>());
        case Q4_1: return use(std::integral_constant<int, Q4_1>());
        case Q5_0: return use(std::integral_constant<int, Q5_0>());
        case Q5_1: return use(std::integral_constant<int, Q5_1>());
        case Q2_K: return use(std::integral_constant<int, Q2_K>());
        case Q3_K: return use(std::integral_constant<int, Q3_K>());
        case Q4_K: return use(std::integral_constant<int, Q4_K>());
        case Q5_K: return use(std::integral_constant<int, Q5_K>());
        case Q6_K: return use(std::integral_constant<int, Q6_K>());
        case IQ4_NL: return use(std::integral_constant<int, IQ4_NL>());
        case IQ4_XS: return use(std::integral_constant<int, IQ4_XS>());
    }
}

// Bytes of the heads of a tile, padded so that words are aligned to cache lines.
inline size_t heads_bytes(const Format &f, int columns) {
    return (size_t(columns / f.columns) * f.head_bytes() + 63) / 64 * 64;
}

inline size_t packed_tile_bytes(int type, int columns) {
    const Format f = format(type);
    return heads_bytes(f, columns) + size_t(columns / f.columns) * f.word_bytes();
}

// The codes of four adjacent columns, number `four` of those of a plane's words, in the four bytes of each lane.
template <int BITS> inline u32 plane_codes(const uint8_t *words, int four) {
    constexpr int PER_WORD = 8 / BITS;
    constexpr uint32_t MASK = BITS == 8 ? ~0u : 0x01010101u * ((1 << BITS) - 1);
    return load<u32>(words + four / PER_WORD * 64) >> four % PER_WORD * BITS & MASK;
}

// The same of 32 columns, number `span` of a block, from both planes.
template <int TYPE> struct Span {
    static constexpr Format F = format(TYPE);
    const uint8_t *low, *high;
    Span(const uint8_t *words, int span) : low(words + span * F.low * 64), high(words + F.low_bytes() + span * F.high * 64) {}

    u32 codes(int four) const {
        const u32 codes = plane_codes<F.low>(low, four);
        if constexpr (F.table) return look_up(OFFSET_TABLE.bytes, codes);
        if constexpr (F.high > 0) return codes | plane_codes<F.high>(high, four) << F.low;
        return codes;
    }
};

inline f32 from_int8(const uint8_t *from) {
    return __builtin_convertvector(widened(load<u8>(from)) << 24 >> 24, f32);
}

// The scales and the minimums of the groups of a block, in 16 rows.
template <int TYPE> struct Head {
    static constexpr Format F = format(TYPE);
    const uint8_t *head;
    f32 block_scale, block_minimum;

    explicit Head(const uint8_t *head) : head(head), block_scale(from_half(load<u16>(head))) {
        if constexpr (F.minimums) block_minimum = from_half(load<u16>(head + 32));
    }
    f32 scale(int group) const {
        if constexpr (!F.group_scales()) return block_scale;
        return block_scale * from_int8(head + 32 * (1 + F.minimums) + group * LANES);
    }
    f32 minimum(int group) const {
        if constexpr (!F.minimums) return f32{};
        if constexpr (!F.group_scales()) return block_minimum;
        return block_minimum * from_int8(head + 64 + (F.groups() + group) * LANES);
    }
};

// Dequantizes a tile: calls use(column, the column's values in the 16 rows) for each column.
template <class Use> inline void unpack_tile(int type, const uint8_t *tile, int columns, Use use) {
    with_type(type, [&](auto constant) {
        constexpr int TYPE = constant.value;
        constexpr Format f = format(TYPE);
        const uint8_t *head = tile, *words = tile + heads_bytes(f, columns);
        for (int first = 0; first < columns; first += f.columns, head += f.head_bytes(), words += f.word_bytes()) {
            const Head<TYPE> scales(head);
            for (int four = 0; four < f.columns / 4; four++) {
                const int group = four * 4 / f.group;
                const f32 scale = scales.scale(group), minimum = scales.minimum(group);
                const u32 bytes = Span<TYPE>(words, four / 8).codes(four % 8);
                for (int c = 0; c < 4; c++) {
                    i32 code = (i32)(bytes >> 8 * c & 255);
                    if (f.offset == 0 && (f.low == 8 || f.table)) code = code << 24 >> 24;
                    use(first + four * 4 + c, scale * __builtin_convertvector(code - f.offset, f32) + minimum);
                }
            }
        }
    });
}
