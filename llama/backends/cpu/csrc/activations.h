// Activations of feed-forwards.
#pragma once
#include "vectors.h"

// As in config.py. SiLU is of a gate, and multiplies what goes up; the others are of what goes up.
enum ActivationKind { SILU, RELU2, XIELU };

struct Activation {
    int32_t kind;
    const float *slopes;  // XIELU's alpha_p, alpha_n, beta and eps
};

inline f32 silu(f32 x) { return x / (1.0f + exponential(-x)); }

// e^x - 1 of x up to 0, where e^x alone would lose what is small.
inline f32 exponential_minus_one(f32 x) {
    f32 p = x * (1.0f / 40320) + 1.0f / 5040;
    p = p * x + 1.0f / 720;
    p = p * x + 1.0f / 120;
    p = p * x + 1.0f / 24;
    p = p * x + 1.0f / 6;
    p = p * x + 0.5f;
    return pick(x < -0.5f, exponential(x) - 1.0f, p * x * x + x);
}

// An activation that has no gate. In one place, so that all who compute it round alike.
__attribute__((noinline)) inline void activate(const Activation &f, float *values) {
    const f32 x = load<f32>(values), zero{};
    if (f.kind == RELU2) {
        const f32 positive = pick(x < zero, zero, x);
        store(values, positive * positive);
        return;
    }
    const f32 limit = all(f.slopes[3]), low = pick(x < limit, x, limit);
    const f32 curved = pick(x > zero, f.slopes[0] * x * x, (exponential_minus_one(low) - x) * f.slopes[1]);
    store(values, curved + f.slopes[2] * x);
}
