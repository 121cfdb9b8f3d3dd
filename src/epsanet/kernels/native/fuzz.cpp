// Random layers, sizes and pointer alignments through every operation, for AddressSanitizer and UBSan.
//
// Usage: fuzz CALLS [SEED]. Buffers have exactly the size they need, so that one float too far is seen. Instruction
// sets take turns, and AVX-512's loops with them, wherever it runs; a value of each result is checked against plain loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "chain.hpp"
#include "convolution.hpp"
#include "norm.hpp"

#define EPSANET_ISA many_registers
#define EPSANET_MANY_REGISTERS
#include "isa_portable.cpp"

using namespace epsanet;

namespace {

// Memory of a given misalignment in floats, in an allocation that ends with the last float.
class Floats {
  public:
    Floats(std::size_t count, int offset, std::mt19937 &random) : memory_(new float[count + offset]), offset_(offset) {
        std::uint32_t state = std::uint32_t(random());
        for (std::size_t i = 0; i < count; ++i) {
            state = state * 1664525u + 1013904223u;  // a linear congruence: sanitized, the real generator takes a fifth of a run
            get()[i] = float(state >> 8) / float(1 << 23) - 1;  // -1 to 1
        }
    }
    float *get() { return memory_.get() + offset_; }

  private:
    std::unique_ptr<float[]> memory_;
    int offset_;
};

// The groups that the lanes of the finest of some nested groupings hold; order.py says why.
std::vector<int> group_order(const std::set<int> &counts) {
    std::vector<int> order{0};
    for (const int count : counts) {
        const int parts = count / int(order.size());
        std::vector<int> finer;
        for (int part = 0; part < parts; ++part)
            for (const int group : order) finer.push_back(group * parts + part);
        order = finer;
    }
    return order;
}

// Natural channels by lane position.
std::vector<std::int32_t> order_of(int channels, const std::vector<BranchShape> &branches, bool split, bool input) {
    std::vector<std::int32_t> order;
    const int parts = input && !split ? 1 : int(branches.size()), share = channels / parts;
    for (int part = 0; part < parts; ++part) {
        std::set<int> counts;
        for (const BranchShape &branch : branches)
            if (split ? &branch == &branches[part] : parts == 1 || branch.groups <= branches[part].groups)
                counts.insert(branch.groups);
        const std::vector<int> groups = group_order(counts);
        const int size = share / int(groups.size());
        for (int index = 0; index < size; ++index)
            for (const int group : groups) order.push_back(part * share + group * size + index);
    }
    return order;
}

// Where each natural channel lies in a tensor.
std::vector<int> places(const std::vector<std::int32_t> &order, bool ordered) {
    std::vector<int> found(order.size());
    for (int at = 0; at < int(order.size()); ++at) found[ordered ? order[at] : at] = at;
    return found;
}

// A value as plain loops have it, and the sum of its terms' sizes, by which its rounding is judged.
struct Plain {
    double value = 0, size = 0;
    void add(double term) { value += term, size += std::fabs(term); }
    bool agrees(float found) const { return std::fabs(found - value) < 4e-6 * size + 1e-4; }
};

// The tensors of a call; channels are natural ones.
struct Call {
    const Problem &problem;
    const std::vector<int> in_places, out_places;
    const float *x, *dy, *added;
    const std::vector<float *> &weights;

    int seen(const Branch &branch) const { return branch.in_channels / branch.groups; }
    std::ptrdiff_t weight(const Branch &branch, int out, int in, int ky, int kx) const {
        return ((std::ptrdiff_t(out) * seen(branch) + in) * branch.kernel + ky) * branch.kernel + kx;
    }
    bool inside(int row, int column) const { return row >= 0 && row < problem.height && column >= 0 && column < problem.width; }
    int channel_of(const Branch &branch, int out, int in) const {
        return branch.in_offset + out / (branch.out_channels / branch.groups) * seen(branch) + in;
    }
    double input(int image, int row, int column, int channel) const {
        return x[((std::ptrdiff_t(image) * problem.height + row) * problem.width + column) * problem.in_channels + in_places[channel]];
    }
    std::ptrdiff_t result(int image, int row, int column, int channel) const {
        return ((std::ptrdiff_t(image) * problem.out_height + row) * problem.out_width + column) * problem.out_channels + out_places[channel];
    }
    std::ptrdiff_t sum(int image, int channel) const { return std::ptrdiff_t(image) * problem.out_channels + out_places[channel]; }
    double result_gradient(int image, int row, int column, int channel) const {
        return dy[result(image, row, column, channel)] + (added ? double(added[sum(image, channel)]) : 0);
    }

    Plain forward(int b, int image, int row, int column, int out) const {
        const Branch &branch = problem.branches[b];
        Plain sum;
        for (int ky = 0; ky < branch.kernel; ++ky)
            for (int kx = 0; kx < branch.kernel; ++kx) {
                const int y = row * problem.stride + ky - branch.kernel / 2, at = column * problem.stride + kx - branch.kernel / 2;
                for (int in = 0; inside(y, at) && in < seen(branch); ++in)
                    sum.add(input(image, y, at, channel_of(branch, out, in)) * weights[b][weight(branch, out, in, ky, kx)]);
            }
        return sum;
    }
    Plain input_gradient(int image, int row, int column, int channel) const {
        Plain sum;
        for (int b = 0; b < problem.branch_count; ++b) {
            const Branch &branch = problem.branches[b];
            for (int out = 0; out < branch.out_channels; ++out) {
                const int in = channel - channel_of(branch, out, 0);
                if (in < 0 || in >= seen(branch)) continue;
                for (int ky = 0; ky < branch.kernel; ++ky)
                    for (int kx = 0; kx < branch.kernel; ++kx) {
                        const int y = row - ky + branch.kernel / 2, at = column - kx + branch.kernel / 2;  // times the stride
                        if (y < 0 || y % problem.stride || y / problem.stride >= problem.out_height) continue;
                        if (at < 0 || at % problem.stride || at / problem.stride >= problem.out_width) continue;
                        sum.add(result_gradient(image, y / problem.stride, at / problem.stride, branch.out_offset + out) *
                                weights[b][weight(branch, out, in, ky, kx)]);
                    }
            }
        }
        return sum;
    }
    Plain weight_gradient(int b, std::ptrdiff_t wanted) const {
        const Branch &branch = problem.branches[b];
        const int filter = branch.kernel * branch.kernel, in = int(wanted / filter) % seen(branch), out = int(wanted / filter) / seen(branch);
        const int ky = int(wanted % filter) / branch.kernel, kx = int(wanted % filter) % branch.kernel;
        Plain sum;
        for (int image = 0; image < problem.batch; ++image)
            for (int y = 0; y < problem.out_height; ++y)
                for (int at = 0; at < problem.out_width; ++at) {
                    const int row = y * problem.stride + ky - branch.kernel / 2, column = at * problem.stride + kx - branch.kernel / 2;
                    if (inside(row, column))
                        sum.add(input(image, row, column, channel_of(branch, out, in)) * result_gradient(image, y, at, branch.out_offset + out));
                }
        return sum;
    }
    // What `recalibrate` multiplies a channel of branch b with, from the sums over space.
    double attention(const Attention &maps, const float *sums, int image, int b, int channel) const {
        const int channels = problem.out_channels / problem.branch_count;
        const auto excited = [&](int branch, int at) {
            double z = maps.fc2_bias[at];
            for (int h = 0; h < maps.hidden; ++h) {
                double hidden = maps.fc1_bias[h];
                for (int c = 0; c < channels; ++c)
                    hidden += maps.fc1_weight[h * channels + c] * sums[sum(image, branch * channels + c)] / double(problem.out_height * problem.out_width);
                z += maps.fc2_weight[at * maps.hidden + h] * std::max(hidden, 0.0);
            }
            return std::exp(1 / (1 + std::exp(-z)));
        };
        double total = 0;
        for (int other = 0; other < (maps.over_scales ? problem.branch_count : channels); ++other)
            total += maps.over_scales ? excited(other, channel) : excited(b, other);
        return excited(b, channel) / total;
    }
};

bool wrong(long call, const char *what, const Plain &expected, float found) {
    if (expected.agrees(found)) return false;
    std::fprintf(stderr, "call %ld, %s: %g instead of %g\n", call, what, found, expected.value);
    return true;
}

// A dense 1×1 convolution with bias, residual and ReLU; now and then with channels of several panels.
bool pointwise_wrong(long call, std::mt19937 &random) {
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    const int in = pick(0, 9) ? pick(1, 90) : pick(500, 1100), out = pick(1, 90), stride = pick(1, 3), threads = pick(1, 3);
    const int batch = pick(1, 3), height = pick(1, 9), width = in > 90 ? pick(1, 2) : pick(1, 20);
    std::vector<std::int32_t> in_order(in), out_order(out);
    std::iota(in_order.begin(), in_order.end(), 0);
    std::iota(out_order.begin(), out_order.end(), 0);
    const Problem problem = make_problem(batch, height, width, in, out, stride, {{1, 1}}, false, Lanes::groups, true, in_order.data(), out_order.data());
    const int results = batch * problem.out_height * problem.out_width;
    Floats x(std::size_t(batch) * height * width * in, pick(0, 15), random), weights(std::size_t(in) * out, pick(0, 15), random);
    Floats packed(packed_size(problem, Direction::forward), pick(0, 15), random), bias(out, pick(0, 15), random);
    Floats residual(std::size_t(results) * out, pick(0, 15), random), y(std::size_t(results) * out, pick(0, 15), random);
    const float *const weight_pointer = weights.get();
    pack_weights(problem, Direction::forward, &weight_pointer, packed.get(), threads);
    const Pointwise layer{batch, height, width, in, out, stride, x.get(), packed.get(), bias.get(),
                          pick(0, 1) ? residual.get() : nullptr, pick(0, 1) == 1, y.get(), false};
    pointwise(layer, threads);
    const int pixel = pick(0, results - 1), channel = pick(0, out - 1);
    const int column = pixel % problem.out_width, row = pixel / problem.out_width % problem.out_height;
    const int image = pixel / problem.out_width / problem.out_height;
    const float *source = x.get() + ((std::ptrdiff_t(image) * height + row * stride) * width + column * stride) * in;
    Plain expected;
    for (int c = 0; c < in; ++c) expected.add(double(source[c]) * weights.get()[std::ptrdiff_t(channel) * in + c]);
    expected.add(bias.get()[channel]);
    const std::ptrdiff_t result = std::ptrdiff_t(pixel) * out + channel;
    if (layer.residual) expected.add(layer.residual[result]);
    if (layer.relu) expected.value = std::max(expected.value, 0.0);
    return wrong(call, "1×1 convolution", expected, y.get()[result]);
}

// A chain of 1×1 convolutions, whose values share memory, against each convolution with memory of its own.
bool chain_wrong(long call, std::mt19937 &random) {
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    const int count = pick(1, 6), channels = pick(0, 30) ? pick(0, 7) ? pick(1, 40) : pick(60, 80) : pick(510, 530), threads = pick(1, 3);
    const int batch = pick(1, 3), height = pick(1, 6), width = channels > 80 ? 1 : pick(1, 12);
    std::vector<std::int32_t> order(channels);
    std::iota(order.begin(), order.end(), 0);
    const auto problem = [&](int images, int rows, int columns) {
        return make_problem(images, rows, columns, channels, channels, 1, {{1, 1}}, false, Lanes::groups, true, order.data(), order.data());
    };
    const Problem of_step = problem(batch, height, width);
    const std::size_t size = std::size_t(batch) * height * width * channels;
    std::vector<Floats> weights, biases, values;
    std::vector<Step> steps;
    values.emplace_back(size, pick(0, 15), random);
    for (int number = 0; number < count; ++number) {
        Floats natural(std::size_t(channels) * channels, pick(0, 15), random);
        weights.emplace_back(packed_size(of_step, Direction::forward), pick(0, 15), random);
        const float *const pointer = natural.get();
        pack_weights(of_step, Direction::forward, &pointer, weights.back().get(), threads);
        biases.emplace_back(channels, pick(0, 15), random);
        values.emplace_back(size, pick(0, 15), random);
        Step step{};
        step.problem = problem;
        step.packed = weights.back().get();
        step.bias = biases.back().get();
        step.source = number;  // so that every value is used
        step.residual = pick(-1, number);
        step.relu = pick(0, 1) == 1;
        steps.push_back(step);
        pointwise({batch, height, width, channels, channels, 1, values[number].get(), step.packed, step.bias,
                   step.residual >= 0 ? values[step.residual].get() : nullptr, step.relu, values.back().get(), false},
                  threads);
    }
    Chain chain(steps);
    Floats result(size, pick(0, 15), random);
    chain.run(batch, height, width, values[0].get(), result.get(), threads);
    if (std::memcmp(result.get(), values.back().get(), size * sizeof(float)) == 0) return false;
    std::fprintf(stderr, "call %ld: a chain of %d steps gives other bits than its steps\n", call, count);
    return true;
}

// A batch norm and its gradients, half of the time of a 1×1 convolution, else at times with factors: one channel by plain
// loops. ReLU's sign is that
// of the result: a sum that rounds to either side of zero is no error.
bool norm_wrong(long call, std::mt19937 &random) {
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    norm_floats_cached = pick(0, 1) ? 0 : 3 * 1024 * 1024;
    const bool convolved = pick(0, 1), relu = pick(0, 3) > 0, added = relu && pick(0, 1), weighed = !convolved && pick(0, 1);
    const int results = convolved ? 16 * pick(1, 5) : pick(1, 80), depth = convolved ? 16 * pick(1, 5) : results;
    const int stride = convolved ? pick(0, 2) : 0, threads = pick(1, 3);  // of the shortcut; 0: none
    const bool large = pick(0, 39) == 0;  // of several pieces
    const int batch = pick(1, 3), height = large ? pick(15, 20) : pick(1, 6), width = large ? pick(15, 20) : pick(2, 9);
    const int pixels = batch * height * width, at_pixel = pick(0, pixels - 1), k = pick(0, results - 1), c = pick(0, depth - 1);
    const std::size_t size = std::size_t(pixels) * results, source_size = std::size_t(pixels) * depth;
    Floats x(source_size, pick(0, 15), random), matrix(std::size_t(results) * depth, pick(0, 15), random), z(size, pick(0, 15), random);
    Floats weight(results, pick(0, 15), random), bias(results, pick(0, 15), random), residual(size, pick(0, 15), random), y(size, pick(0, 15), random);
    Floats mean(results, pick(0, 15), random), variance(results, pick(0, 15), random), dy(size, pick(0, 15), random);
    Floats factors(std::size_t(batch) * results, pick(0, 15), random), dfactors(std::size_t(batch) * results, pick(0, 15), random);
    const BatchNorm norm{pixels,    results, convolved ? z.get() : x.get(), weight.get(), bias.get(), 0.1, relu, weighed ? factors.get() : nullptr,
                         height * width};
    const auto factor = [&](int pixel, int channel) { return weighed ? double(factors.get()[pixel / (height * width) * results + channel]) : 1.0; };
    const auto value = [&](int pixel, int channel) { return norm.x[std::ptrdiff_t(pixel) * results + channel] * factor(pixel, channel); };
    const Dense layer{depth, x.get(), matrix.get()};
    const Dense *const convolution = convolved ? &layer : nullptr;
    batch_norm(norm, convolution, convolved ? z.get() : nullptr, added ? residual.get() : nullptr, y.get(), mean.get(), variance.get(), threads);

    Plain at_z, average;
    for (int pixel = 0; pixel < pixels; ++pixel) average.add(value(pixel, k) / pixels);
    for (int in = 0; convolved && in < depth; ++in) at_z.add(double(x.get()[std::ptrdiff_t(at_pixel) * depth + in]) * matrix.get()[std::ptrdiff_t(k) * depth + in]);
    if (convolved && wrong(call, "convolution before a norm", at_z, z.get()[std::ptrdiff_t(at_pixel) * results + k])) return true;
    Plain spread, normed;
    const auto centred = [&](int pixel, int channel) { return value(pixel, channel) - mean.get()[channel]; };
    for (int pixel = 0; pixel < pixels; ++pixel) spread.add(centred(pixel, k) * centred(pixel, k) / pixels);
    if (wrong(call, "mean", average, mean.get()[k]) || wrong(call, "variance", spread, variance.get()[k])) return true;
    const auto deviation = [&](int channel) { return 1 / std::sqrt(variance.get()[channel] + norm.epsilon); };
    const std::ptrdiff_t at = std::ptrdiff_t(at_pixel) * results + k;
    normed.add(centred(at_pixel, k) * deviation(k) * weight.get()[k]);
    normed.add(bias.get()[k]);
    if (added) normed.add(residual.get()[at]);
    if (relu) normed.value = std::max(normed.value, 0.0);
    if (wrong(call, "batch norm", normed, y.get()[at])) return true;

    const int step = std::max(stride, 1), short_height = (height - 1) / step + 1, short_width = (width - 1) / step + 1;
    Floats dshortcut(std::size_t(batch) * short_height * short_width * depth, pick(0, 15), random), dx(source_size, pick(0, 15), random);
    Floats dmatrix(std::size_t(results) * depth, pick(0, 15), random), dresidual(size, pick(0, 15), random);
    Floats dweight(results, pick(0, 15), random), dbias(results, pick(0, 15), random);
    const Shortcut shortcut{dshortcut.get(), height, width, step};
    const Gradients to{dx.get(), convolved ? dmatrix.get() : nullptr, added ? dresidual.get() : nullptr, dweight.get(), dbias.get(),
                       weighed ? dfactors.get() : nullptr};
    batch_norm_gradient(norm, convolution, stride ? &shortcut : nullptr, dy.get(), added ? y.get() : nullptr, mean.get(), variance.get(), to, threads);
    const auto before_relu = [&](int pixel, int channel) {
        const std::ptrdiff_t place = std::ptrdiff_t(pixel) * results + channel;
        return relu && !(y.get()[place] > 0) ? 0.0 : double(dy.get()[place]);
    };
    const auto sums = [&](int channel) {  // of the gradients of bias and weight
        std::pair<Plain, Plain> both;
        for (int pixel = 0; pixel < pixels; ++pixel) {
            both.first.add(before_relu(pixel, channel));
            both.second.add(before_relu(pixel, channel) * centred(pixel, channel) * deviation(channel));
        }
        return both;
    };
    const auto [of_bias, of_weight] = sums(k);
    if (wrong(call, "gradient of a norm's bias", of_bias, dbias.get()[k]) || wrong(call, "gradient of a norm's weight", of_weight, dweight.get()[k])) return true;
    Plain of_residual;
    of_residual.add(before_relu(at_pixel, k));
    if (added && wrong(call, "gradient of a residual", of_residual, dresidual.get()[at])) return true;
    const auto of_result = [&](int pixel, int channel, Plain &sum, double factor) {  // the gradient of z
        const double scale = weight.get()[channel] * deviation(channel) * factor;
        sum.add(scale * before_relu(pixel, channel));
        sum.add(-scale * dbias.get()[channel] / pixels);
        sum.add(-scale * centred(pixel, channel) * deviation(channel) * dweight.get()[channel] / pixels);
    };
    Plain of_source, of_matrix;
    if (!convolved) {
        of_result(at_pixel, k, of_source, factor(at_pixel, k));
        Plain of_factor;
        const int image = at_pixel / (height * width);
        for (int pixel = image * height * width; weighed && pixel < (image + 1) * height * width; ++pixel)
            of_result(pixel, k, of_factor, norm.x[std::ptrdiff_t(pixel) * results + k]);
        return wrong(call, "gradient of a norm", of_source, dx.get()[at]) ||
               (weighed && wrong(call, "gradient of a factor", of_factor, dfactors.get()[image * results + k]));
    }
    for (int channel = 0; channel < results; ++channel) of_result(at_pixel, channel, of_source, matrix.get()[std::ptrdiff_t(channel) * depth + c]);
    const int column = at_pixel % width, row = at_pixel / width % height, image = at_pixel / width / height;
    if (stride && row % step == 0 && column % step == 0)
        of_source.add(dshortcut.get()[((std::ptrdiff_t(image) * short_height + row / step) * short_width + column / step) * depth + c]);
    for (int pixel = 0; pixel < pixels; ++pixel) of_result(pixel, k, of_matrix, x.get()[std::ptrdiff_t(pixel) * depth + c]);
    return wrong(call, "gradient of a convolution before a norm", of_source, dx.get()[std::ptrdiff_t(at_pixel) * depth + c]) ||
           wrong(call, "gradient of a convolution's weight", of_matrix, dmatrix.get()[std::ptrdiff_t(k) * depth + c]);
}

}  // namespace

int main(int count, char **arguments) {
    const long calls = count > 1 ? std::atol(arguments[1]) : 1000;
    std::mt19937 random(count > 2 ? unsigned(std::atol(arguments[2])) : 1);
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    const std::vector<std::string> sets = instruction_sets();
    constexpr double budget = 2e5;  // multiplications: small sizes have the most edges
    for (long call = 0; call < calls; ++call) {
        const std::size_t set = call % (sets.size() + 1);
        set == sets.size() ? set_kernels(kernels_many_registers) : set_instruction_set(sets[set]);
        const bool images = pick(0, 2) == 0, split = pick(0, 1), ordered = !images && pick(0, 2) == 0;
        const int doublings = pick(0, 5), groups = images ? pick(1, 5) : 1 << doublings;  // of the finest grouping
        std::vector<BranchShape> branches(pick(1, 3));
        for (BranchShape &branch : branches)
            branch = {2 * pick(0, 5) + 1, pick(0, 1) ? groups : images ? 1 : 1 << pick(0, doublings)};
        const int share = int(branches.size()), largest = groups >= 16 ? 2 : 5;
        const int in_channels = groups * pick(1, largest) * (split ? share : 1), out_channels = groups * pick(1, largest) * share;
        const std::vector<std::int32_t> in_order = order_of(in_channels, branches, split, true), out_order = order_of(out_channels, branches, split, false);
        // Branches of few groups and many channels get small maps, so that no call takes long.
        double work = 0;
        for (const BranchShape &branch : branches)
            work += double(branch.kernel) * branch.kernel * in_channels / (split ? share : 1) * out_channels / share / branch.groups;
        const auto size = [&](int most) {
            const int drawn = pick(1, std::clamp(int(budget / work), 1, most));
            work *= drawn;
            return drawn;
        };
        const int width = size(17), height = size(9), batch = size(images ? 19 : 3), threads = pick(1, 3);
        const Problem problem = make_problem(batch, height, width, in_channels, out_channels, pick(1, 3), branches, split,
                                             images ? Lanes::images : Lanes::groups, ordered, in_order.data(), out_order.data());
        check_orders(problem);
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
            const std::size_t size = std::size_t(branch.out_channels) * (branch.in_channels / branch.groups) * branch.kernel * branch.kernel;
            weights.emplace_back(size, pick(0, 15), random);
            gradients.emplace_back(size, pick(0, 15), random);
            weight_pointers.push_back(weights.back().get());
            gradient_pointers.push_back(gradients.back().get());
        }
        pack_weights(problem, Direction::forward, weight_pointers.data(), packed.get(), threads);
        pack_weights(problem, Direction::backward, weight_pointers.data(), packed_back.get(), threads);
        forward(problem, x.get(), packed.get(), y.get(), sums.get(), threads);
        const int b = pick(0, problem.branch_count - 1), out = pick(0, out_channels / share - 1), image = pick(0, batch - 1);
        const int row = pick(0, problem.out_height - 1), column = pick(0, problem.out_width - 1);
        Call plain{problem, places(in_order, ordered), places(out_order, ordered), x.get(), dy.get(), nullptr, weight_pointers};
        const std::ptrdiff_t result = plain.result(image, row, column, problem.branches[b].out_offset + out);
        Plain expected = plain.forward(b, image, row, column, out), sum;
        if (wrong(call, "forward", expected, y.get()[result])) return 1;
        for (int at = 0; at < problem.out_height * problem.out_width; ++at)
            sum.add(y.get()[plain.result(image, 0, at, problem.branches[b].out_offset + out)]);
        const std::ptrdiff_t place = plain.sum(image, problem.branches[b].out_offset + out);
        if (wrong(call, "sums", sum, sums.get()[place])) return 1;
        if (pointwise_wrong(call, random) || chain_wrong(call, random) || norm_wrong(call, random)) return 1;
        const float *add = pick(0, 1) ? sums.get() : nullptr;
        input_gradient(problem, dy.get(), add, packed_back.get(), dx.get(), threads);
        weight_gradient(problem, x.get(), dy.get(), add, gradient_pointers.data(), threads);
        plain.added = add;
        const int source_row = pick(0, height - 1), source_column = pick(0, width - 1), channel = pick(0, in_channels - 1);
        const std::ptrdiff_t source = ((std::ptrdiff_t(image) * height + source_row) * width + source_column) * in_channels + plain.in_places[channel];
        const int weight = pick(0, problem.branches[b].out_channels * plain.seen(problem.branches[b]) * problem.branches[b].kernel * problem.branches[b].kernel - 1);
        if (wrong(call, "input gradient", plain.input_gradient(image, source_row, source_column, channel), dx.get()[source]) ||
            wrong(call, "weight gradient", plain.weight_gradient(b, weight), gradient_pointers[b][weight]))
            return 1;
        const int channels = out_channels / share, hidden = pick(1, 3);
        Floats fc1(std::size_t(hidden) * channels + hidden, pick(0, 15), random);
        Floats fc2(std::size_t(hidden) * channels + channels, pick(0, 15), random);
        Floats scale(out_channels, pick(0, 15), random), shift(out_channels, pick(0, 15), random);
        const Attention attention{fc1.get(), fc1.get() + hidden * channels, fc2.get(), fc2.get() + hidden * channels,
                                  hidden, pick(0, 1) == 1, scale.get(), shift.get(), pick(0, 1) == 1};
        Plain recalibrated;
        recalibrated.add(y.get()[result] * plain.attention(attention, sums.get(), image, b, out) * scale.get()[place % out_channels]);
        recalibrated.add(shift.get()[place % out_channels]);
        if (attention.relu) recalibrated.value = std::max(recalibrated.value, 0.0);
        recalibrate(problem, attention, sums.get(), y.get(), threads);
        if (wrong(call, "attention", recalibrated, y.get()[result])) return 1;
    }
    std::printf("%ld calls, no report\n", calls);
}
