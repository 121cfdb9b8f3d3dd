// Layers of an inference network that follow one another, computed in one call.
//
// What lies between them stays in memory of the chain's own: large pages, which the next call finds warm. A result goes
// into the place of its residual where nothing else needs that.
#pragma once

#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "convolution.hpp"

namespace epsanet {

// Value 0 is the chain's input, value i + 1 the result of step i; the last is the chain's result.
struct Step {
    std::function<Problem(int batch, int height, int width)> problem;
    const float *packed;
    int source, residual;  // values; residual -1: none
    bool attends;
    Attention attention;  // where it attends; elsewhere it is a dense 1×1 convolution with these:
    const float *bias;
    bool relu;
};

struct Size {
    int height, width, channels;
};

class Chain {
  public:
    // Throws std::invalid_argument for a step whose values do not exist, a result that nothing uses, and layers that
    // do not fit together; so does `run`.
    explicit Chain(std::vector<Step> steps);
    int in_channels() const { return steps_[0].problem(1, 1, 1).in_channels; }
    Size result_size(int height, int width) const;
    void run(int batch, int height, int width, const float *x, float *y, int threads);

  private:
    std::vector<Size> sizes(int batch, int height, int width) const;  // of all values

    struct Free {
        void operator()(float *pointer) const { std::free(pointer); }
    };
    struct Memory {
        std::unique_ptr<float, Free> floats;
        std::size_t size = 0;

        void at_least(std::size_t floats);
    };

    std::vector<Step> steps_;
    std::vector<int> places_;  // of each value between the steps, -1 for input and result
    int place_count_ = 0;
    Memory memory_;
    std::mutex memory_in_use_;
};

// Ask the system for large pages where memory has none yet: fewer of its addresses need looking up.
void prefer_large_pages(float *memory, std::size_t floats);

}  // namespace epsanet
