// Random layers, sizes and pointer alignments through every operation, for AddressSanitizer and UBSan.
//
// Usage: fuzz CALLS [SEED]. Buffers have exactly the size they need, so that one float too far is seen. Instruction
// sets take turns; the first values of each call are checked against a plain loop.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "convolution.hpp"

using namespace epsanet;

namespace {

// Memory of a given misalignment in floats, in an allocation that ends with the last float.
class Floats {
  public:
    Floats(std::size_t count, int offset, std::mt19937 &random) : memory_(new float[count + offset]), offset_(offset) {
        std::uniform_real_distribution<float> value(-1, 1);
        for (std::size_t i = 0; i < count; ++i) get()[i] = value(random);
    }
    float *get() { return memory_.get() + offset_; }

  private:
    std::unique_ptr<float[]> memory_;
    int offset_;
};

std::vector<std::int32_t> order_of(int channels, const std::vector<BranchShape> &branches, bool one_tensor) {
    // Any order that keeps a branch's groups whole will do; this one is for equal group counts.
    std::vector<std::int32_t> order;
    const int parts = one_tensor ? 1 : int(branches.size());
    for (int part = 0; part < parts; ++part) {
        const int share = channels / parts, groups = branches[part].groups, size = share / groups;
        for (int index = 0; index < size; ++index)
            for (int group = 0; group < groups; ++group) order.push_back(part * share + group * size + index);
    }
    return order;
}

double plain_forward(const Problem &problem, const float *x, float *const *weights, int b, int out, int row, int column) {
    const Branch &branch = problem.branches[b];
    const int seen = branch.in_channels / branch.groups, made = branch.out_channels / branch.groups;
    double sum = 0;
    for (int in = 0; in < seen; ++in)
        for (int ky = 0; ky < branch.kernel; ++ky)
            for (int kx = 0; kx < branch.kernel; ++kx) {
                const int y = row * problem.stride + ky - branch.kernel / 2, at = column * problem.stride + kx - branch.kernel / 2;
                if (y < 0 || y >= problem.height || at < 0 || at >= problem.width) continue;
                const int channel = branch.in_offset + out / made * seen + in;
                sum += double(x[(std::ptrdiff_t(y) * problem.width + at) * problem.in_channels + channel]) *
                       weights[b][((std::ptrdiff_t(out) * seen + in) * branch.kernel + ky) * branch.kernel + kx];
            }
    return sum;
}

}  // namespace

int main(int count, char **arguments) {
    const long calls = count > 1 ? std::atol(arguments[1]) : 1000;
    std::mt19937 random(count > 2 ? unsigned(std::atol(arguments[2])) : 1);
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    const std::vector<std::string> sets = instruction_sets();
    for (long call = 0; call < calls; ++call) {
        set_instruction_set(sets[call % sets.size()]);
        const bool images = pick(0, 2) == 0, split = pick(0, 1), ordered = !images && pick(0, 2) == 0;
        const int groups = images ? pick(1, 5) : std::vector<int>{1, 2, 4, 8, 16, 32}[pick(0, 5)];
        std::vector<BranchShape> branches(pick(1, 3));
        for (BranchShape &branch : branches) branch = {2 * pick(0, 5) + 1, groups};
        const int share = int(branches.size()), largest = groups >= 16 ? 2 : 5;
        const int in_channels = groups * pick(1, largest) * (split ? share : 1), out_channels = groups * pick(1, largest) * share;
        const std::vector<std::int32_t> in_order = order_of(in_channels, branches, !split), out_order = order_of(out_channels, branches, false);
        const int batch = images ? pick(1, 19) : pick(1, 3), height = pick(1, 9), width = pick(1, 17), threads = pick(1, 3);
        const Problem problem = make_problem(batch, height, width, in_channels, out_channels, pick(1, 3), branches, split,
                                             images ? Lanes::images : Lanes::groups, ordered, in_order.data(), out_order.data());
        const std::size_t pixels = std::size_t(batch) * height * width;
        const std::size_t results = std::size_t(batch) * problem.out_height * problem.out_width * out_channels;
        Floats x(pixels * in_channels, pick(0, 15), random), dx(pixels * in_channels, pick(0, 15), random);
        Floats y(results, pick(0, 15), random), dy(results, pick(0, 15), random);
        Floats sums(std::size_t(batch) * out_channels, pick(0, 15), random);
        Floats packed(packed_size(problem, Direction::forward), pick(0, 15), random);
        Floats packed_back(packed_size(problem, Direction::backward), pick(0, 15), random);
        std::vector<Floats> weights, gradients;
        std::vector<float *> weight_pointers, gradient_pointers;
        for (int b = 0; b < problem.branch_count; ++b) {
            const Branch &branch = problem.branches[b];
            const std::size_t size = std::size_t(branch.out_channels) * (branch.in_channels / groups) * branch.kernel * branch.kernel;
            weights.emplace_back(size, pick(0, 15), random);
            gradients.emplace_back(size, pick(0, 15), random);
            weight_pointers.push_back(weights.back().get());
            gradient_pointers.push_back(gradients.back().get());
        }
        pack_weights(problem, Direction::forward, weight_pointers.data(), packed.get(), threads);
        pack_weights(problem, Direction::backward, weight_pointers.data(), packed_back.get(), threads);
        forward(problem, x.get(), packed.get(), y.get(), sums.get(), threads);
        if (!ordered) {
            const int b = pick(0, problem.branch_count - 1), out = pick(0, out_channels / share - 1);
            const int row = pick(0, problem.out_height - 1), column = pick(0, problem.out_width - 1);
            const double expected = plain_forward(problem, x.get(), weight_pointers.data(), b, out, row, column);
            const double value = y.get()[(std::ptrdiff_t(row) * problem.out_width + column) * out_channels + problem.branches[b].out_offset + out];
            if (!(std::fabs(value - expected) < 1e-3)) {
                std::fprintf(stderr, "call %ld: %g instead of %g\n", call, value, expected);
                return 1;
            }
        }
        if (ordered) {
            Floats bias(out_channels, pick(0, 15), random);
            Problem finished = problem;
            finished.bias = bias.get();
            finished.residual = pick(0, 1) ? dy.get() : nullptr;
            finished.relu = pick(0, 1) == 1;
            forward(finished, x.get(), packed.get(), y.get(), nullptr, threads);
        }
        const float *add = pick(0, 1) ? sums.get() : nullptr;
        input_gradient(problem, dy.get(), add, packed_back.get(), dx.get(), threads);
        weight_gradient(problem, x.get(), dy.get(), add, gradient_pointers.data(), threads);
        const int channels = out_channels / share, hidden = pick(1, 3);
        Floats fc1(std::size_t(hidden) * channels + hidden, pick(0, 15), random);
        Floats fc2(std::size_t(hidden) * channels + channels, pick(0, 15), random);
        Floats scale(out_channels, pick(0, 15), random), shift(out_channels, pick(0, 15), random);
        const Attention attention{fc1.get(), fc1.get() + hidden * channels, fc2.get(), fc2.get() + hidden * channels,
                                  hidden, pick(0, 1) == 1, scale.get(), shift.get(), pick(0, 1) == 1};
        recalibrate(problem, attention, sums.get(), y.get(), threads);
    }
    std::printf("%ld calls, no report\n", calls);
}
