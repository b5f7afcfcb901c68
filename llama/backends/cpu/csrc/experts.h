// Mixtures of experts: which tokens of a step pass which of them, and what each counts.
#pragma once
#include <cmath>
#include <vector>

#include "weights.h"

enum Router { SOFTMAX_OF_CHOSEN, SOFTMAX, SIGMOID_OF_INPUT };  // as Router in config.py

struct Expert {
    Weight w1, w2, w3;
};

struct Experts {
    Weight gate;  // (n, dim): floats
    const Expert *experts;  // (n)
    int32_t n, active, router;
};

// The tokens of every expert that some pass, expert after expert.
struct Routes {
    struct Use {
        int expert, first, n;  // its tokens are those at [first, first + n)
    };
    std::vector<Use> uses;
    std::vector<int> tokens;
    std::vector<float> factors;  // of an expert's output for a token, or of its input

    // scores: (n_tokens, experts). Of equal scores, the first is chosen.
    Routes(const Experts &e, const float *scores, int n_tokens) {
        std::vector<int> chosen(size_t(n_tokens) * e.active);
        std::vector<float> counts(chosen.size());
        std::vector<char> taken(e.n);
        for (int t = 0; t < n_tokens; t++, scores += e.n) {
            int *best = &chosen[size_t(t) * e.active];
            std::fill(taken.begin(), taken.end(), 0);
            for (int i = 0; i < e.active; i++) {
                int at = -1;
                for (int expert = 0; expert < e.n; expert++)
                    if (!taken[expert] && (at < 0 || scores[expert] > scores[at])) at = expert;
                taken[at] = 1;
                best[i] = at;
            }
            float sum = 0.0f, *count = &counts[size_t(t) * e.active];
            for (int i = 0; i < (e.router == SOFTMAX ? e.n : e.active); i++)
                sum += std::exp(scores[e.router == SOFTMAX ? i : best[i]] - scores[best[0]]);
            for (int i = 0; i < e.active; i++) {
                const float score = scores[best[i]];
                count[i] = e.router == SIGMOID_OF_INPUT ? 1.0f / (1.0f + std::exp(-score))
                                                        : std::exp(score - scores[best[0]]) / sum;
            }
        }
        for (int expert = 0; expert < e.n; expert++) {
            const int first = int(tokens.size());
            for (size_t i = 0; i < chosen.size(); i++)
                if (chosen[i] == expert) tokens.push_back(int(i) / e.active), factors.push_back(counts[i]);
            if (int(tokens.size()) > first) uses.push_back({expert, first, int(tokens.size()) - first});
        }
    }
};
