#include "chain.hpp"

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace epsanet {
namespace {

constexpr std::size_t large_page = std::size_t(2) << 20;

void require(bool condition, const std::string &message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void prefer_large_pages(float *memory, std::size_t floats) {
#ifdef __linux__
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + large_page - 1) / large_page * large_page;
    const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(memory + floats) / large_page * large_page;
    // Only a wish: a system without them goes on with small ones.
    if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)floats;
#endif
}

void Chain::Memory::at_least(std::size_t wanted) {
    if (wanted <= size) return;
    floats.reset();
    size = 0;
    const std::size_t bytes = (wanted * sizeof(float) + large_page - 1) / large_page * large_page;
    floats.reset(static_cast<float *>(std::aligned_alloc(large_page, bytes)));
    if (!floats) throw std::bad_alloc();
    size = bytes / sizeof(float);
    prefer_large_pages(floats.get(), size);
}

Chain::Chain(std::vector<Step> steps) : steps_(std::move(steps)), places_(steps_.size() + 1, -1) {
    const int count = int(steps_.size());
    require(count > 0, "a chain needs steps");
    std::vector<int> last_use(count + 1, -1);
    for (int number = 0; number < count; ++number) {
        const Step &step = steps_[number];
        require(step.source >= 0 && step.source <= number && step.residual >= -1 && step.residual <= number,
                "step " + std::to_string(number) + " uses a value that is not there yet");
        last_use[step.source] = number;
        if (step.residual >= 0) last_use[step.residual] = number;
    }
    for (int value = 0; value < count; ++value)
        require(last_use[value] >= 0, "value " + std::to_string(value) + " is used by no step");
    std::vector<int> free_places;
    for (int number = 0; number < count; ++number) {
        const Step &step = steps_[number];
        const auto ends = [&](int value) { return value > 0 && last_use[value] == number; };
        // A convolution over several panels of channels adds the residual to sums that are in the result's place by then.
        const bool in_place = ends(step.residual) && step.residual != step.source && number + 1 < count &&
                              step.problem(1, 1, 1).in_channels <= panel_depth;
        if (in_place) {
            places_[number + 1] = places_[step.residual];
        } else if (number + 1 < count) {
            if (free_places.empty()) free_places.push_back(place_count_++);
            places_[number + 1] = free_places.back();
            free_places.pop_back();
        }
        if (ends(step.source)) free_places.push_back(places_[step.source]);
        if (ends(step.residual) && step.residual != step.source && !in_place) free_places.push_back(places_[step.residual]);
    }
    sizes(1, 32, 32);  // whose channels fit together at any size
}

std::vector<Size> Chain::sizes(int batch, int height, int width) const {
    std::vector<Size> sizes{{height, width, steps_[0].problem(batch, height, width).in_channels}};
    for (const Step &step : steps_) {
        const Size source = sizes[step.source];
        const Problem problem = step.problem(batch, source.height, source.width);
        const Size result{problem.out_height, problem.out_width, problem.out_channels};
        const std::string name = "step " + std::to_string(sizes.size() - 1);
        require(problem.in_channels == source.channels, name + " takes another number of channels than its source has");
        if (step.residual >= 0) {
            const Size residual = sizes[step.residual];
            require(residual.height == result.height && residual.width == result.width && residual.channels == result.channels,
                    name + " adds a residual of another size than its result");
        }
        sizes.push_back(result);
    }
    return sizes;
}

Size Chain::result_size(int height, int width) const { return sizes(1, height, width).back(); }

void Chain::run(int batch, int height, int width, const float *x, float *y, int threads) {
    const std::vector<Size> all = sizes(batch, height, width);
    std::vector<std::size_t> begins(place_count_ + 1);
    for (std::size_t value = 0; value < all.size(); ++value)
        if (places_[value] >= 0) {
            std::size_t &size = begins[places_[value] + 1];
            size = std::max(size, std::size_t(batch) * all[value].height * all[value].width * all[value].channels);
        }
    for (int place = 0; place < place_count_; ++place) begins[place + 1] = begins[place] + (begins[place + 1] + lanes - 1) / lanes * lanes;
    // Another thread may be in a call of its own: memory for this one is then found anew.
    const std::unique_lock<std::mutex> own(memory_in_use_, std::try_to_lock);
    Memory passing, &memory = own ? memory_ : passing;
    memory.at_least(begins.back());
    const auto place_of = [&](int value) { return memory.floats.get() + begins[places_[value]]; };
    std::vector<float> sums;
    for (std::size_t number = 0; number < steps_.size(); ++number) {
        const Step &step = steps_[number];
        const float *const source = step.source ? place_of(step.source) : x;
        const float *const residual = step.residual > 0 ? place_of(step.residual) : step.residual ? nullptr : x;
        float *const result = number + 1 < steps_.size() ? place_of(int(number) + 1) : y;
        const Problem problem = step.problem(batch, all[step.source].height, all[step.source].width);
        if (step.attends) {
            sums.resize(std::size_t(batch) * problem.out_channels);
            forward(problem, source, step.packed, result, sums.data(), threads);
            recalibrate(problem, step.attention, sums.data(), result, threads);
        } else {
            pointwise({batch, problem.height, problem.width, problem.in_channels, problem.out_channels, problem.stride, source,
                       step.packed, step.bias, residual, step.relu, result, false},
                      threads);
        }
    }
}

}  // namespace epsanet
