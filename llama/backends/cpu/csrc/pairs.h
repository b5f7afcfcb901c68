// Vectors of 16 lanes for GCC where registers are narrower: pairs of halves, down to what a register holds, with the
// operators of the compiler's own vectors. GCC keeps a vector that is wider than a register in memory, which makes
// products of floats four times slower and takes it a minute to compile; Clang splits such vectors by itself.
#pragma once
#include <type_traits>

#if defined(__AVX__)
constexpr int REGISTER = 32;  // bytes
#else
constexpr int REGISTER = 16;
#endif

template <class H> struct Pair;
template <class V> struct IsPair : std::false_type {};
template <class H> struct IsPair<Pair<H>> : std::true_type {};

template <class V> struct ElementOf {
    typedef std::remove_reference_t<decltype(std::declval<V &>()[0])> type;
};
template <class V> using Element = typename ElementOf<V>::type;

template <class H> struct Pair {
    H low, high;

    Pair() = default;
    Pair(H low, H high) : low(low), high(high) {}
    template <class G> explicit Pair(Pair<G> v) : low((H)v.low), high((H)v.high) {}  // the same bits

    Element<H> operator[](int i) const { return i < HALF ? low[i] : high[i - HALF]; }
    Element<H> &operator[](int i) { return i < HALF ? low[i] : high[i - HALF]; }

private:
    static constexpr int HALF = sizeof(H) / sizeof(Element<H>);
};
template <class H> struct ElementOf<Pair<H>> : ElementOf<H> {};

// Scalars stand for vectors with that number in every lane.
#define PAIR_OPERATOR(op)                                                                                          \
    template <class H> inline auto operator op(Pair<H> a, Pair<H> b) {                                             \
        return Pair<std::decay_t<decltype(a.low op b.low)>>(a.low op b.low, a.high op b.high);                     \
    }                                                                                                              \
    template <class H, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>>                                 \
    inline auto operator op(Pair<H> a, S s) {                                                                      \
        const Element<H> e(s);                                                                                     \
        return Pair<std::decay_t<decltype(a.low op e)>>(a.low op e, a.high op e);                                  \
    }                                                                                                              \
    template <class H, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>>                                 \
    inline auto operator op(S s, Pair<H> a) {                                                                      \
        const Element<H> e(s);                                                                                     \
        return Pair<std::decay_t<decltype(e op a.low)>>(e op a.low, e op a.high);                                  \
    }
PAIR_OPERATOR(+)
PAIR_OPERATOR(-)
PAIR_OPERATOR(*)
PAIR_OPERATOR(/)
PAIR_OPERATOR(&)
PAIR_OPERATOR(|)
PAIR_OPERATOR(^)
PAIR_OPERATOR(<<)
PAIR_OPERATOR(>>)
PAIR_OPERATOR(<)
PAIR_OPERATOR(>)
PAIR_OPERATOR(==)
#undef PAIR_OPERATOR
template <class H> inline Pair<H> operator-(Pair<H> v) { return {-v.low, -v.high}; }
template <class H, class V> inline Pair<H> &operator+=(Pair<H> &a, V b) { return a = a + b; }
template <class H, class V> inline Pair<H> &operator-=(Pair<H> &a, V b) { return a = a - b; }

// Loads and stores half by half: one copy of a pair would go through memory.
template <class V> inline V load_pair(const void *from) {
    if constexpr (IsPair<V>::value) {
        typedef decltype(V::low) H;
        return {load_pair<H>(from), load_pair<H>((const char *)from + sizeof(H))};
    } else {
        V v;
        memcpy(&v, from, sizeof v);
        return v;
    }
}
template <class V> inline void store_pair(void *to, V v) {
    if constexpr (IsPair<V>::value) {
        store_pair(to, v.low);
        store_pair((char *)to + sizeof v.low, v.high);
    } else {
        memcpy(to, &v, sizeof v);
    }
}

template <class V> inline V pick_pair(decltype(V() < V()) mask, V a, V b) {
    if constexpr (IsPair<V>::value) return {pick_pair(mask.low, a.low, b.low), pick_pair(mask.high, a.high, b.high)};
    else return mask ? a : b;
}

// Converts each lane, as the compiler's __builtin_convertvector does.
template <class To, class From> inline To converted(From v) {
    if constexpr (!IsPair<To>::value && !IsPair<From>::value) {
        return __builtin_convertvector(v, To);
    } else if constexpr (IsPair<To>::value && IsPair<From>::value) {
        typedef decltype(To::low) H;
        return {converted<H>(v.low), converted<H>(v.high)};
    } else if constexpr (IsPair<To>::value) {
        typedef decltype(To::low) H;
        typedef Element<From> Half __attribute__((vector_size(sizeof(From) / 2)));
        return {converted<H>(load_pair<Half>(&v)), converted<H>(load_pair<Half>((const char *)&v + sizeof v / 2))};
    } else {
        typedef Element<To> Half __attribute__((vector_size(sizeof(To) / 2)));
        const Half halves[2] = {converted<Half>(v.low), converted<Half>(v.high)};
        return load_pair<To>(halves);
    }
}

// The lanes of a, followed by those of b, that have these numbers.
template <int... I, class V> inline V shuffled(V a, V b) {
    if constexpr (IsPair<V>::value) {
        Element<V> from[2 * sizeof(V) / sizeof(Element<V>)];
        store_pair(from, a);
        store_pair(from + sizeof(V) / sizeof(Element<V>), b);
        const Element<V> to[] = {from[I]...};
        return load_pair<V>(to);
    } else {
        return __builtin_shuffle(a, b, decltype(a < b){I...});
    }
}
#define __builtin_convertvector(v, To) converted<To>(v)
#define __builtin_shufflevector(a, b, ...) shuffled<__VA_ARGS__>(a, b)

// A vector of 16 numbers.
template <class E, int BYTES> struct Vector {
    typedef Pair<typename Vector<E, BYTES / 2>::type> type;
};
template <class E> struct Vector<E, REGISTER> {
    typedef E type __attribute__((vector_size(REGISTER)));
};
