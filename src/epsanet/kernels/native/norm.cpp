#include "norm.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "convolution.hpp"
#include "threads.hpp"

namespace epsanet {

std::ptrdiff_t norm_floats_cached = 3 * 1024 * 1024;

namespace {

constexpr std::ptrdiff_t floats_of_piece = 32 * 1024;  // what one thread takes at a time

bool past_caches(const float *result, std::ptrdiff_t floats) {
    return floats > norm_floats_cached && reinterpret_cast<std::uintptr_t>(result) % 64 == 0;
}

// A norm's tensors cut into pieces of whole rows, with factors each of one image; with a convolution, its source has
// `widest` channels if those are more.
class Pieces {
  public:
    Pieces(const BatchNorm &norm, int widest)
        : channels_(norm.channels), floats_(norm.pixels * channels_), part_((norm.factors ? norm.image_pixels : norm.pixels) * channels_) {
        // Four vectors or more: sums go through memory, and the same place is not wanted again at once.
        std::ptrdiff_t pixels = 1;
        while (pixels * channels_ % lanes != 0 || pixels * channels_ < 4 * lanes) ++pixels;
        row = int(pixels * channels_);
        step_ = std::max<std::ptrdiff_t>(1, floats_of_piece / (pixels * std::max(channels_, widest))) * row;
        of_part_ = int((part_ + step_ - 1) / step_);
        count = int(floats_ / part_) * of_part_;
    }

    int image(int piece) const { return piece / of_part_; }
    std::ptrdiff_t begin(int piece) const { return image(piece) * part_ + piece % of_part_ * step_; }
    std::ptrdiff_t pixels(int piece) const { return size(piece) / channels_; }
    // `result`: what is written, if it goes to memory.
    Rows rows(int piece, const float *result) const {
        return {size(piece) / row, row, int(size(piece) % row), result && past_caches(result, floats_)};
    }
    // One number a channel, repeated.
    std::vector<float> repeated(const float *values) const {
        std::vector<float> all(row);
        for (int place = 0; place < row; ++place) all[place] = values[place % channels_];
        return all;
    }

    int row, count;

  private:
    std::ptrdiff_t size(int piece) const { return std::min(step_, part_ - piece % of_part_ * step_); }

    int channels_, of_part_;  // the latter: pieces of an image, or of all
    std::ptrdiff_t floats_, part_, step_;
};

// The factors of a piece's image, repeated.
class Factor {
  public:
    Factor(const BatchNorm &norm, const Pieces &pieces, int piece) {
        if (norm.factors) row_ = pieces.repeated(norm.factors + std::ptrdiff_t(pieces.image(piece)) * norm.channels);
    }
    const float *row() const { return row_.empty() ? nullptr : row_.data(); }

  private:
    std::vector<float> row_;
};

// The norm as the loops want it.
struct Repeated {
    Repeated(const BatchNorm &norm, const Pieces &pieces, const float *mean, const float *variance) {
        std::vector<float> scales(norm.channels);
        for (int c = 0; c < norm.channels; ++c) scales[c] = float(norm.weight[c] / std::sqrt(variance[c] + norm.epsilon));
        means = pieces.repeated(mean);
        scale = pieces.repeated(scales.data());
        bias = pieces.repeated(norm.bias);
        relu = norm.relu;
    }
    Norm with(const Factor &factor) const { return {means.data(), scale.data(), bias.data(), relu, factor.row()}; }

    std::vector<float> means, scale, bias;
    bool relu;
};

// `make` gives a piece of norm.x, to be copied to `result` if it is not there.
template <class Make>
void normalise(const BatchNorm &norm, float *result, const float *residual, float *y, float *mean, float *variance, int threads, const Pieces &pieces,
               const Make &make) {
    const Kernels &kernels = kernels_in_use();
    const int channels = norm.channels, row = pieces.row;
    // Each piece measures from its own first pixel, so that a mean far from zero costs no digits.
    std::vector<float> sums(std::size_t(pieces.count) * 2 * row);
    share(pieces.count, threads, [&](int piece, int thread) {
        float *sum = sums.data() + std::size_t(piece) * 2 * row;
        const float *from = make(piece, thread);
        float *copy = result && from != result + pieces.begin(piece) ? result + pieces.begin(piece) : nullptr;
        const Factor factor(norm, pieces, piece);
        std::vector<float> shift = pieces.repeated(from);
        for (int place = 0; factor.row() && place < row; ++place) shift[place] *= factor.row()[place];
        kernels.norm_sums(pieces.rows(piece, copy), from, factor.row(), shift.data(), copy, sum, sum + row);
    });
    std::vector<double> means(channels), squares(channels);  // of the pieces so far; squares of the distance from the mean
    std::ptrdiff_t seen = 0;
    for (int piece = 0; piece < pieces.count; ++piece) {
        const float *sum = sums.data() + std::size_t(piece) * 2 * row, *first = norm.x + pieces.begin(piece);
        const float *factor = norm.factors ? norm.factors + std::ptrdiff_t(pieces.image(piece)) * channels : nullptr;
        const double pixels = double(pieces.pixels(piece)), weight = pixels / (seen + pixels);
        for (int c = 0; c < channels; ++c) {
            double difference = 0, square = 0;
            for (int place = c; place < row; place += channels) difference += sum[place], square += sum[row + place];
            const float shift = factor ? first[c] * factor[c] : first[c];
            difference /= pixels;
            const double step = shift + difference - means[c];
            means[c] += step * weight;
            squares[c] += square - difference * difference * pixels + step * step * seen * weight;
        }
        seen += pieces.pixels(piece);
    }
    for (int c = 0; c < channels; ++c) {
        mean[c] = float(means[c]);
        variance[c] = float(squares[c] < 0 ? 0 : squares[c] / seen);  // a NaN stays one
    }
    const Repeated repeated(norm, pieces, mean, variance);
    share(pieces.count, threads, [&](int piece, int) {
        const std::ptrdiff_t at = pieces.begin(piece);
        const Factor factor(norm, pieces, piece);
        kernels.norm_apply(pieces.rows(piece, y + at), repeated.with(factor), norm.x + at, residual ? residual + at : nullptr, y + at);
    });
}

// Per channel, repeated to a row: what the norm's dx is made of, once the sums over the batch are known.
struct Slopes {
    std::vector<float> slope, offset;
};

Slopes sum_gradients(const BatchNorm &norm, const Pieces &pieces, const Repeated &repeated, const float *dy, const float *y,
                     const float *variance, const Gradients &to, int threads) {
    const Kernels &kernels = kernels_in_use();
    const int channels = norm.channels, row = pieces.row;
    std::vector<float> sums(std::size_t(pieces.count) * 2 * row);
    share(pieces.count, threads, [&](int piece, int) {
        const std::ptrdiff_t at = pieces.begin(piece);
        float *sum = sums.data() + std::size_t(piece) * 2 * row, *before_relu = to.residual ? to.residual + at : nullptr;
        const Factor factor(norm, pieces, piece);
        kernels.norm_gradient_sums(pieces.rows(piece, before_relu), repeated.with(factor), dy + at, norm.x + at, y ? y + at : nullptr, before_relu, sum,
                                   sum + row);
    });
    std::vector<double> total(channels), products(channels);
    for (int piece = 0; piece < pieces.count; ++piece) {
        const float *sum = sums.data() + std::size_t(piece) * 2 * row;
        for (int place = 0; place < row; place += channels)
            for (int c = 0; c < channels; ++c) {
                total[c] += sum[place + c];
                products[c] += sum[row + place + c];
            }
    }
    std::vector<float> slopes(channels), offsets(channels);
    for (int c = 0; c < channels; ++c) {
        const double deviation = 1 / std::sqrt(variance[c] + norm.epsilon), scale = norm.weight[c] * deviation;
        to.weight[c] = float(products[c] * deviation);
        to.bias[c] = float(total[c]);
        slopes[c] = float(-scale * deviation * deviation * products[c] / norm.pixels);
        offsets[c] = float(-scale * total[c] / norm.pixels);
    }
    return {pieces.repeated(slopes.data()), pieces.repeated(offsets.data())};
}

// A K × C matrix, or its transpose, as the loops of 1×1 convolutions want weights.
std::vector<float> pack_dense(const float *weight, int results, int depth, bool transposed) {
    if (transposed) std::swap(results, depth);
    std::vector<float> packed(std::size_t(results) * depth);
    for (int block = 0; block * lanes < results; ++block) {
        const int first = block - block % weight_block, side = std::min(weight_block, results / lanes - first);
        float *to = packed.data() + (std::ptrdiff_t(first) * depth + block - first) * lanes;
        for (int channel = 0; channel < depth; ++channel)
            for (int lane = 0; lane < lanes; ++lane) {
                const std::ptrdiff_t result = block * lanes + lane;
                to[channel * side * lanes + lane] = transposed ? weight[channel * std::ptrdiff_t(results) + result] : weight[result * depth + channel];
            }
    }
    return packed;
}

// y = x · weights of a few pixels after one another.
void multiply_dense(const Kernels &kernels, const float *x, int depth, const float *packed, const float *no_bias, int results, float *y,
                    std::ptrdiff_t pixels, const float *residual, bool past_caches, float *scratch) {
    const std::ptrdiff_t panel = kernels.pixels_of_tile * kernels.tiles_of_panel;
    const Pointwise layer{1, 1, int(pixels), depth, results, 1, x, packed, no_bias, residual, false, y, past_caches};
    for (std::ptrdiff_t begin = 0; begin < pixels; begin += panel)
        kernels.pointwise(layer, begin, std::min(pixels, begin + panel), 0, results / lanes, scratch);
}

struct Free {
    void operator()(float *pointer) const { std::free(pointer); }
};
using Memory = std::unique_ptr<float, Free>;

Memory aligned(std::size_t floats) {
    Memory memory(static_cast<float *>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (!memory) throw std::bad_alloc();
    return memory;
}

// The shortcut's gradient of `pixels` pixels from `first`: where it lies, or `near` with zeros between its rows and columns.
const float *shortcut_of(const Shortcut &shortcut, std::ptrdiff_t first, std::ptrdiff_t pixels, int channels, float *near) {
    if (shortcut.stride == 1) return shortcut.gradient + first * channels;
    const int stride = shortcut.stride, height = (shortcut.height - 1) / stride + 1, width = (shortcut.width - 1) / stride + 1;
    float *to = near;
    for (std::ptrdiff_t pixel = first; pixel < first + pixels; ++pixel, to += channels) {
        const int column = int(pixel % shortcut.width), row = int(pixel / shortcut.width % shortcut.height);
        const std::ptrdiff_t image = pixel / shortcut.width / shortcut.height;
        const std::size_t size = channels * sizeof(float);
        if (column % stride || row % stride)
            std::memset(to, 0, size);
        else
            std::memcpy(to, shortcut.gradient + ((image * height + row / stride) * width + column / stride) * channels, size);
    }
    return near;
}

}  // namespace

void batch_norm(const BatchNorm &norm, const Dense *convolution, float *result, const float *residual, float *y, float *mean,
                float *variance, int threads) {
    const Pieces pieces(norm, convolution ? convolution->in_channels : 0);
    if (!convolution) {
        normalise(norm, nullptr, residual, y, mean, variance, threads, pieces, [&](int piece, int) { return norm.x + pieces.begin(piece); });
        return;
    }
    const Kernels &kernels = kernels_in_use();
    const int depth = convolution->in_channels, results = norm.channels;
    const std::vector<float> packed = pack_dense(convolution->weight, results, depth, false), no_bias(results);
    const std::size_t scratch = kernels.pointwise_scratch(std::min(depth, panel_depth)), piece_size = std::size_t(pieces.pixels(0)) * results;
    std::vector<Memory> memory(threads);
    normalise(norm, result, residual, y, mean, variance, threads, pieces, [&](int piece, int thread) {
        if (!memory[thread]) memory[thread] = aligned(piece_size + scratch);
        const std::ptrdiff_t at = pieces.begin(piece), pixels = pieces.pixels(piece);
        float *const made = pieces.rows(piece, result + at).past_caches ? memory[thread].get() : result + at;
        multiply_dense(kernels, convolution->x + at / results * depth, depth, packed.data(), no_bias.data(), results, made, pixels,
                       nullptr, false, memory[thread].get() + piece_size);
        return made;
    });
}

void batch_norm_gradient(const BatchNorm &norm, const Dense *convolution, const Shortcut *shortcut, const float *dy, const float *y,
                         const float *mean, const float *variance, const Gradients &to, int threads) {
    const Kernels &kernels = kernels_in_use();
    const Pieces pieces(norm, convolution ? convolution->in_channels : 0);
    const Repeated repeated(norm, pieces, mean, variance);
    const Slopes slopes = sum_gradients(norm, pieces, repeated, dy, y, variance, to, threads);
    const float *const g = to.residual ? to.residual : dy;
    const auto gradient = [&](int piece, const Rows &rows, float *dx, float *dfactor) {
        const std::ptrdiff_t at = pieces.begin(piece);
        const Factor factor(norm, pieces, piece);
        kernels.norm_gradient(rows, repeated.with(factor), slopes.slope.data(), slopes.offset.data(), g + at, norm.x + at, to.residual != nullptr, dx,
                              dfactor);
    };
    if (!convolution) {
        const int row = pieces.row;
        std::vector<float> products(norm.factors ? std::size_t(pieces.count) * row : 0);
        share(pieces.count, threads, [&](int piece, int) {
            float *dx = to.x + pieces.begin(piece);
            gradient(piece, pieces.rows(piece, dx), dx, norm.factors ? products.data() + std::size_t(piece) * row : nullptr);
        });
        if (!norm.factors) return;
        std::vector<double> total(norm.pixels / norm.image_pixels * norm.channels);
        for (int piece = 0; piece < pieces.count; ++piece)
            for (int place = 0; place < row; place += norm.channels)
                for (int c = 0; c < norm.channels; ++c)
                    total[std::size_t(pieces.image(piece)) * norm.channels + c] += products[std::size_t(piece) * row + place + c];
        std::copy(total.begin(), total.end(), to.factors);
        return;
    }
    const int depth = convolution->in_channels, results = norm.channels;
    const std::vector<float> packed = pack_dense(convolution->weight, results, depth, true), no_bias(depth);
    const std::size_t piece_pixels = pieces.pixels(0);
    const std::size_t scratch_size = std::max(kernels.pointwise_scratch(std::min(results, panel_depth)), kernels.outer_scratch(depth, results, int(piece_pixels)));
    // The pieces of a group are added up one after another: the order does not depend on threads.
    const int groups = int(std::clamp<std::ptrdiff_t>(norm.pixels / 256, 1, std::min(pieces.count, 16)));
    const std::size_t size = std::size_t(depth) * results;
    const bool results_are_rows = results < depth;
    std::vector<float> sums(size * groups);
    std::vector<Memory> memory(threads);
    share(groups, threads, [&](int group, int thread) {
        if (!memory[thread]) memory[thread] = aligned(piece_pixels * (results + depth) + scratch_size);
        float *const dz = memory[thread].get(), *const near = dz + piece_pixels * results, *const sum = sums.data() + group * size;
        for (int piece = pieces.count * group / groups; piece < pieces.count * (group + 1) / groups; ++piece) {
            const std::ptrdiff_t first = pieces.begin(piece) / results, pixels = pieces.pixels(piece);
            gradient(piece, pieces.rows(piece, nullptr), dz, nullptr);
            const float *x = convolution->x + first * depth;
            float *dx = to.x + first * depth;
            float *const scratch = near + piece_pixels * depth;
            const float *added = shortcut ? shortcut_of(*shortcut, first, pixels, depth, near) : nullptr;
            multiply_dense(kernels, dz, results, packed.data(), no_bias.data(), depth, dx, pixels, added, past_caches(dx, norm.pixels * depth),
                           scratch);
            results_are_rows ? kernels.outer_products(dz, results, x, depth, int(pixels), sum, scratch)
                             : kernels.outer_products(x, depth, dz, results, int(pixels), sum, scratch);
        }
    });
    const int rows = results_are_rows ? results : depth, columns = results_are_rows ? depth : results;
    share(rows, size * groups < 65536 ? 1 : threads, [&](int row, int) {
        std::vector<double> all(columns);
        for (int group = 0; group < groups; ++group)
            for (int column = 0; column < columns; ++column) all[column] += sums[group * size + std::ptrdiff_t(row) * columns + column];
        for (int column = 0; column < columns; ++column)
            to.convolution[results_are_rows ? std::ptrdiff_t(row) * columns + column : std::ptrdiff_t(column) * rows + row] = float(all[column]);
    });
}

}  // namespace epsanet
