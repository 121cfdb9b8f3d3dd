// The loops, compiled once for each instruction set in a namespace of its own (see problem.hpp on why no standard
// library: its inline functions would be shared between instruction sets).
//
// A vector's lanes are groups: one load of neighbouring channels serves sixteen (group, result) pairs, so no lane is
// empty although a group may have only one result channel. Input gradients are the same walk with taps reversed and
// the two sides of a group exchanged; weight gradients sum x · dy lane by lane.
#include <string.h>

#include "problem.hpp"

namespace epsanet {
namespace EPSANET_ISA {
namespace {

using Offset = ptrdiff_t;

inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }
inline int divide_up(int a, int b) { return (a + b - 1) / b; }

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// Distances in a scratch copy. Lanes of groups: rows × pixels × channels. Lanes of images: channels × rows × pixels
// × 16 images.
struct Grid {
    Offset pixel, row, channel;
    int first_row, rows;
};

Grid grid_of(const Problem &problem, int first_row, int rows, int width, int places) {
    if (problem.lanes_are == Lanes::images)
        return {lanes, Offset(width) * lanes, Offset(rows) * width * lanes + lanes, first_row, rows};
    // One vector more a pixel keeps neighbouring pixels off the same cache sets.
    return {places + lanes, Offset(width) * (places + lanes), 1, first_row, rows};
}

// Neighbouring channels: where they lie in the tensor (in lane order) and in scratch.
struct Run {
    int offset, place, count;
};

// ---------------------------------------------------------------------------------------------- copies in and out

// Places 0 to 3 are those of a, 4 to 7 those of b. GCC has Clang's name for it from version 12 on only.
template <int first, int second, int third, int fourth> inline Four shuffle(Four a, Four b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, first, second, third, fourth);
#else
    typedef int Places __attribute__((vector_size(16)));
    return __builtin_shuffle(a, b, Places{first, second, third, fourth});
#endif
}

// Four channels of four images to four images of four channels, and back.
inline void transpose(Four &a, Four &b, Four &c, Four &d) {
    const Four ab_low = shuffle<0, 4, 1, 5>(a, b), ab_high = shuffle<2, 6, 3, 7>(a, b);
    const Four cd_low = shuffle<0, 4, 1, 5>(c, d), cd_high = shuffle<2, 6, 3, 7>(c, d);
    a = shuffle<0, 1, 4, 5>(ab_low, cd_low);
    b = shuffle<2, 3, 6, 7>(ab_low, cd_low);
    c = shuffle<0, 1, 4, 5>(ab_high, cd_high);
    d = shuffle<2, 3, 6, 7>(ab_high, cd_high);
}

inline Four &four(float *at) { return *reinterpret_cast<Four *>(at); }
inline Four four(const float *at) { return *reinterpret_cast<const Four *>(at); }

void copy_in_images(const float *from, Offset image_step, int images, const float *add, int channels, float *to,
                    Offset plane) {
    int channel = 0;
    for (; channel + 4 <= channels; channel += 4) {
        for (int image = 0; image < lanes; image += 4) {
            Four rows[4];
            for (int n = 0; n < 4; ++n) {
                rows[n] = Four{};
                if (image + n < images) {
                    rows[n] = four(from + (image + n) * image_step + channel);
                    if (add) rows[n] += four(add + Offset(image + n) * channels + channel);
                }
            }
            transpose(rows[0], rows[1], rows[2], rows[3]);
            for (int c = 0; c < 4; ++c) four(to + (channel + c) * plane + image) = rows[c];
        }
    }
    for (; channel < channels; ++channel)
        for (int image = 0; image < lanes; ++image) {
            float value = 0;
            if (image < images) {
                value = from[image * image_step + channel];
                if (add) value += add[Offset(image) * channels + channel];
            }
            to[channel * plane + image] = value;
        }
}

// to[i] = from[places[i]], + addend[places[i]] unless that is null; the places are those of `count` neighbours from `first`
// on, in another order.
inline void permute(const float *from, const float *addend, const int32_t *places, [[maybe_unused]] int first, int count, float *to) {
#ifdef EPSANET_PICK
    if (count % lanes == 0 && count <= most_picked) {
        for (int c = 0; c < count; c += lanes) {
            Vector picked = pick(from + first, count, places + c, first);
            if (addend) picked = add(picked, pick(addend + first, count, places + c, first));
            store(to + c, picked);
        }
        return;
    }
#endif
    for (int c = 0; c < count; ++c) to[c] = from[places[c]];
    for (int c = 0; addend && c < count; ++c) to[c] += addend[places[c]];
}

// Rows of an N H W C tensor into scratch, with `padding` empty columns on both sides.
void copy_in(const Problem &problem, const float *tensor, int image, int height, int width, int channels,
             const int32_t *order, const Run *runs, int run_count, const float *add, const Grid &grid, float *scratch) {
    const Offset image_step = Offset(height) * width * channels;
    const int padding = problem.padding;
    const float *from = tensor + image * image_step + Offset(grid.first_row) * width * channels;
    if (problem.lanes_are == Lanes::images) {
        const int images = least(lanes, problem.batch - image);
        if (add) add += Offset(image) * channels;
        for (int row = 0; row < grid.rows; ++row) {
            float *to = scratch + row * grid.row;
            for (int channel = 0; channel < channels; ++channel) {
                float *at = to + channel * grid.channel;
                memset(at, 0, sizeof(float) * padding * lanes);
                memset(at + (padding + width) * lanes, 0, sizeof(float) * padding * lanes);
            }
            to += padding * lanes;
            for (int column = 0; column < width; ++column, from += channels, to += lanes)
                copy_in_images(from, image_step, images, add, channels, to, grid.channel);
        }
        return;
    }
    if (add) add += Offset(image) * channels;
    for (int row = 0; row < grid.rows; ++row) {
        float *to = scratch + row * grid.row;
        memset(to, 0, sizeof(float) * padding * grid.pixel);
        memset(to + (padding + width) * grid.pixel, 0, sizeof(float) * padding * grid.pixel);
        to += padding * grid.pixel;
        for (int column = 0; column < width; ++column, from += channels, to += grid.pixel) {
            for (const Run *run = runs; run < runs + run_count; ++run) {
                float *place = to + run->place;
                if (order) {
                    permute(from, add, order + run->offset, run->offset, run->count, place);
                } else {
                    memcpy(place, from + run->offset, sizeof(float) * run->count);
                    if (add)
                        for (int c = 0; c < run->count; ++c) place[c] += add[run->offset + c];
                }
            }
        }
    }
}

constexpr int most_inverted = 128;  // channels of a run; more are written one by one

// Rows of scratch into an N H W C tensor, and optionally their sums over space.
void copy_out(const Problem &problem, const Grid &grid, const float *scratch, const Run *runs, int run_count,
              const int32_t *order, float *tensor, int image, int height, int width, int channels, float *sums,
              Offset sums_step) {
    const Offset image_step = Offset(height) * width * channels;
    float *to = tensor + image * image_step + Offset(grid.first_row) * width * channels;
    if (problem.lanes_are == Lanes::images) {
        const int images = least(lanes, problem.batch - image);
        for (const Run *run = runs; run < runs + run_count; ++run) {
            for (Offset pixel = 0; pixel < Offset(grid.rows) * width; ++pixel) {
                const float *from = scratch + run->place * grid.channel + pixel * lanes;
                float *at = to + pixel * channels + run->offset;
                int channel = 0;
                for (; channel + 4 <= run->count; channel += 4)
                    for (int n = 0; n < images; n += 4) {
                        Four rows[4];
                        for (int c = 0; c < 4; ++c) rows[c] = four(from + (channel + c) * grid.channel + n);
                        transpose(rows[0], rows[1], rows[2], rows[3]);
                        for (int i = 0; i < 4; ++i)
                            if (n + i < images) four(at + (n + i) * image_step + channel) = rows[i];
                    }
                for (; channel < run->count; ++channel)
                    for (int n = 0; n < images; ++n) at[n * image_step + channel] = from[channel * grid.channel + n];
            }
            for (int channel = 0; sums && channel < run->count; ++channel) {
                const float *from = scratch + (run->place + channel) * grid.channel;
                float total[lanes];
                Vector sum = zero();
                for (Offset pixel = 0; pixel < Offset(grid.rows) * width; ++pixel)
                    sum = add(sum, load(from + pixel * lanes));
                store(total, sum);
                for (int n = 0; n < images; ++n) sums[n * sums_step + run->offset + channel] = total[n];
            }
        }
        return;
    }
    for (const Run *run = runs; run < runs + run_count; ++run) {
        int32_t back[most_inverted];  // the place in scratch of each channel, if the run's channels are neighbours
        bool inverted = order && run->count <= most_inverted;
        for (int c = 0; inverted && c < run->count; ++c) {
            const int channel = order[run->offset + c] - run->offset;
            inverted = channel >= 0 && channel < run->count;
            if (inverted) back[channel] = c;
        }
        for (int row = 0; row < grid.rows; ++row)
            for (int column = 0; column < width; ++column) {
                const float *from = scratch + row * grid.row + column * grid.pixel + run->place;
                float *at = to + (Offset(row) * width + column) * channels;
                if (inverted)
                    permute(from, nullptr, back, 0, run->count, at + run->offset);
                else if (order)
                    for (int c = 0; c < run->count; ++c) at[order[run->offset + c]] = from[c];
                else
                    memcpy(at + run->offset, from, sizeof(float) * run->count);
            }
    }
    if (!sums) return;
    for (const Run *run = runs; run < runs + run_count; ++run)
        for (int c = 0; c < run->count; c += lanes) {
            Vector sum = zero();
            for (int row = 0; row < grid.rows; ++row)
                for (int column = 0; column < width; ++column)
                    sum = add(sum, load(scratch + row * grid.row + column * grid.pixel + run->place + c));
            float total[lanes];
            store(total, sum);
            for (int lane = 0; lane < lanes && c + lane < run->count; ++lane) {
                const int position = run->offset + c + lane;
                sums[order ? order[position] : position] = total[lane];
            }
        }
}

int input_runs(const Problem &problem, Run *runs) {
    if (!problem.split) {
        runs[0] = {0, 0, problem.in_channels};
        return 1;
    }
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        runs[b] = {branch.in_offset, branch.in_place, branch.in_channels};
    }
    return problem.branch_count;
}

int output_runs(const Problem &problem, Run *runs) {
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        runs[b] = {branch.out_offset, branch.out_place, branch.out_channels};
    }
    return problem.branch_count;
}

// -------------------------------------------------------------------------------------- forward and input gradient

// One place of the kernel: what to add to the source's address and to the weights'.
struct Tap {
    Offset source, weights;
};
constexpr int max_chunk_taps = 256;

// `pixels` × `blocks` result vectors stay in registers over all taps and channels of a group.
template <int width, int weight_lanes, int blocks, int pixels>
void accumulate(float *result, Offset result_pixel, Offset result_block, const float *source, Offset source_pixel,
                Offset source_channel, int depth, const Tap *taps, int tap_count, const float *weights) {
    Vector sum[pixels][blocks];
    for (int p = 0; p < pixels; ++p)
        for (int b = 0; b < blocks; ++b) sum[p][b] = zero();
    for (const Tap *tap = taps; tap < taps + tap_count; ++tap) {
        const float *from = source + tap->source, *weight = weights + tap->weights;
        for (int channel = 0; channel < depth; ++channel) {
            Vector w[blocks];
            for (int b = 0; b < blocks; ++b)
                w[b] = weight_lanes == 1 ? repeat<1>(weight + b) : load(weight + b * lanes);
            for (int p = 0; p < pixels; ++p) {
                const Vector x = repeat<width>(from + p * source_pixel);
                for (int b = 0; b < blocks; ++b) sum[p][b] = multiply_add(x, w[b], sum[p][b]);
            }
            from += source_channel;
            weight += blocks * weight_lanes;
        }
    }
    for (int p = 0; p < pixels; ++p)
        for (int b = 0; b < blocks; ++b) {
            float *to = result + p * result_pixel + b * result_block;
            store(to, add(load(to), sum[p][b]));
        }
}

// The same with one result vector at a time, for whole rows of `columns` taps: a source vector is loaded once for all of
// a row's taps, whose weights stay in registers. `columns` neighbouring taps start at each of `taps`.
template <int width, int weight_lanes, int columns, int pixels>
void accumulate_rows(float *result, Offset result_pixel, const float *source, Offset source_pixel,
                     Offset source_channel, int depth, const Tap *taps, int tap_count, const float *weights,
                     Offset weights_column, Offset weights_channel) {
    Vector sum[pixels];
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) sum[p] = zero();
    for (const Tap *tap = taps; tap < taps + tap_count; ++tap) {
        const float *from = source + tap->source, *weight = weights + tap->weights;
        for (int channel = 0; channel < depth; ++channel) {
            Vector w[columns];
#pragma GCC unroll 16
            for (int c = 0; c < columns; ++c)
                w[c] = weight_lanes == 1 ? repeat<1>(weight + c * weights_column) : load(weight + c * weights_column);
#pragma GCC unroll 32
            for (int q = 0; q < pixels + columns - 1; ++q) {
                const Vector x = repeat<width>(from + q * source_pixel);
#pragma GCC unroll 16
                for (int c = 0; c < columns; ++c)
                    if (q - c >= 0 && q - c < pixels) sum[q - c] = multiply_add(x, w[c], sum[q - c]);
            }
            from += source_channel;
            weight += weights_channel;
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
        float *to = result + p * result_pixel;
        store(to, add(load(to), sum[p]));
    }
}

using AccumulateRows = void (*)(float *, Offset, const float *, Offset, Offset, int, const Tap *, int, const float *,
                                Offset, Offset);

template <int width, int weight_lanes, int columns> AccumulateRows accumulate_rows_for(int pixels) {
    AccumulateRows chosen = nullptr;
#define EPSANET_PIXELS(count) \
    if constexpr (count <= max_pixels[0]) \
        if (pixels == count) chosen = accumulate_rows<width, weight_lanes, columns, count>;
    EPSANET_PIXELS(4) EPSANET_PIXELS(5) EPSANET_PIXELS(6) EPSANET_PIXELS(7) EPSANET_PIXELS(8) EPSANET_PIXELS(9)
    EPSANET_PIXELS(10) EPSANET_PIXELS(11) EPSANET_PIXELS(12) EPSANET_PIXELS(13) EPSANET_PIXELS(14)
#undef EPSANET_PIXELS
    return chosen;
}

template <int width, int weight_lanes> AccumulateRows accumulate_rows_for(int columns, int pixels) {
    switch (columns) {
        case 3: return accumulate_rows_for<width, weight_lanes, 3>(pixels);
        case 5: return accumulate_rows_for<width, weight_lanes, 5>(pixels);
        case 7: return accumulate_rows_for<width, weight_lanes, 7>(pixels);
        case 9: return accumulate_rows_for<width, weight_lanes, 9>(pixels);
        default: return nullptr;
    }
}

// Null where there is no such loop: odd sizes, and instruction sets with too few registers.
AccumulateRows accumulate_rows_of(const Layout &layout, int columns, int pixels) {
    if constexpr (weights_fit_registers) {
        if (layout.weight_lanes == 1) return accumulate_rows_for<16, 1>(columns, pixels);
        switch (layout.width) {
            case 1: return accumulate_rows_for<1, lanes>(columns, pixels);
            case 2: return accumulate_rows_for<2, lanes>(columns, pixels);
            case 4: return accumulate_rows_for<4, lanes>(columns, pixels);
            case 8: return accumulate_rows_for<8, lanes>(columns, pixels);
            default: return accumulate_rows_for<16, lanes>(columns, pixels);
        }
    }
    return nullptr;
}

using Accumulate = void (*)(float *, Offset, Offset, const float *, Offset, Offset, int, const Tap *, int,
                            const float *);

template <int width, int weight_lanes, int blocks> Accumulate accumulate_for(int pixels) {
    constexpr int most_pixels = max_pixels[blocks - 1];
    Accumulate chosen = nullptr;
#define EPSANET_PIXELS(count) \
    if constexpr (count <= most_pixels) \
        if (pixels == count) chosen = accumulate<width, weight_lanes, blocks, count>;
    EPSANET_PIXELS(1) EPSANET_PIXELS(2) EPSANET_PIXELS(3) EPSANET_PIXELS(4) EPSANET_PIXELS(5) EPSANET_PIXELS(6)
    EPSANET_PIXELS(7) EPSANET_PIXELS(8) EPSANET_PIXELS(9) EPSANET_PIXELS(10) EPSANET_PIXELS(11) EPSANET_PIXELS(12)
    EPSANET_PIXELS(13) EPSANET_PIXELS(14)
#undef EPSANET_PIXELS
    return chosen;
}

template <int blocks> Accumulate accumulate_of(const Layout &layout, int pixels) {
    if (layout.weight_lanes == 1) return accumulate_for<16, 1, blocks>(pixels);
    switch (layout.width) {
        case 1: return accumulate_for<1, lanes, blocks>(pixels);
        case 2: return accumulate_for<2, lanes, blocks>(pixels);
        case 4: return accumulate_for<4, lanes, blocks>(pixels);
        case 8: return accumulate_for<8, lanes, blocks>(pixels);
        default: return accumulate_for<16, lanes, blocks>(pixels);
    }
}

// The taps that any of `pixels` results of a row needs; rows and columns of padding fall away.
int find_taps(const Problem &problem, const Branch &branch, Direction direction, const Grid &source, int row,
              int first_pixel, int pixels, int phase, int tap_begin, int tap_end, Offset weights_tap, Tap *taps) {
    const int kernel = branch.kernel, padding = kernel / 2, stride = problem.stride;
    int count = 0;
    for (int ky = tap_begin; ky < tap_end; ++ky) {
        if (direction == Direction::forward) {
            const int from = row * stride + ky - padding;
            if (from < 0 || from >= problem.height) continue;
            const int begin = most(0, padding - (first_pixel + pixels - 1) * stride);
            const int end = least(kernel, problem.width + padding - first_pixel * stride);
            for (int kx = begin; kx < end; ++kx)
                taps[count++] = {(from - source.first_row) * source.row +
                                     (first_pixel * stride + kx - padding + problem.padding) * source.pixel,
                                 (ky * kernel + kx) * weights_tap};
        } else {
            const int from = row + padding - ky;
            if (from < 0 || from % stride || from / stride >= problem.out_height) continue;
            const Offset from_row = (from / stride - source.first_row) * source.row;
            // No division for each tap: on few channels it would take longer than what the tap is for.
            int kx = (phase + padding) % stride, column = (phase + padding - kx) / stride + first_pixel;
            for (; kx < kernel; kx += stride, --column) {
                if (column + pixels <= 0 || column >= problem.out_width) continue;
                taps[count++] = {from_row + (column + problem.padding) * source.pixel, (ky * kernel + kx) * weights_tap};
            }
        }
    }
    return count;
}

void convolve(const Problem &problem, const Branch &branch, Direction direction, const Unit &unit, const float *weights,
              const Grid &source_grid, const float *source, const Grid &result_grid, float *result) {
    const Layout layout = layout_of(problem, branch, direction);
    const bool forward = direction == Direction::forward, images = problem.lanes_are == Lanes::images;
    const int kernel = branch.kernel, groups = branch.groups;
    const int result_width = forward ? problem.out_width : problem.width;
    const int source_place = forward ? branch.in_place : branch.out_place;
    const int result_place = forward ? branch.out_place : branch.in_place;
    const Offset source_channel = images ? source_grid.channel : groups;
    const Offset source_outer = images ? layout.depth * source_grid.channel : lanes;
    const Offset result_block = images ? result_grid.channel : most(groups, lanes);
    const Offset result_outer = images ? layout.results * result_grid.channel : lanes;
    const int phases = forward ? 1 : problem.stride;
    source += source_place * source_grid.channel;
    result += result_place * result_grid.channel;

    for (int outer = most(unit.outer, 0); outer < (unit.outer < 0 ? layout.outer : unit.outer + 1); ++outer)
        for (int block = most(unit.block, 0); block < layout.blocks; block += weight_block) {
            const int blocks = least(weight_block, layout.blocks - block);
            const Offset weights_tap = Offset(layout.depth) * blocks * layout.weight_lanes;
            const float *block_weights =
                weights + Offset(outer * layout.blocks + block) * kernel * kernel * layout.depth * layout.weight_lanes;
            // As many rows of the kernel at a time as their weights stay in the first cache, and never so many that
            // rounding errors pile up in one sum.
            const int chunk = most(1, least(most(1, 5120 / int(weights_tap * kernel)), max_chunk_taps / kernel));
            for (int tap_begin = 0; tap_begin < kernel; tap_begin += chunk)
                for (int row = unit.row_begin; row < unit.row_end; ++row)
                    for (int phase = 0; phase < phases; ++phase) {
                        const int pixels = divide_up(result_width - phase, phases);
                        if (pixels <= 0) continue;
                        const int pieces = divide_up(pixels, max_pixels[blocks - 1]);
                        for (int piece = 0; piece < pieces; ++piece) {
                            const int first = pixels * piece / pieces, count = pixels * (piece + 1) / pieces - first;
                            Tap taps[max_chunk_taps];
                            const int tap_count =
                                find_taps(problem, branch, direction, source_grid, row, first, count, phase, tap_begin,
                                          least(kernel, tap_begin + chunk), weights_tap, taps);
                            if (!tap_count) continue;
                            float *to = result + outer * result_outer + block * result_block +
                                        (row - result_grid.first_row) * result_grid.row +
                                        (phase + Offset(first) * phases) * result_grid.pixel;
                            // The same columns of all rows of the kernel: all of them where as many taps follow
                            // one another.
                            const bool whole_rows =
                                tap_count >= kernel &&
                                taps[kernel - 1].weights - taps[0].weights == (kernel - 1) * weights_tap;
                            const AccumulateRows run_rows =
                                problem.stride == 1 && whole_rows && (blocks == 1 || count >= 7)
                                    ? accumulate_rows_of(layout, kernel, count)
                                    : nullptr;
                            if (run_rows) {
                                // One tap a row is enough; backwards the last column of the kernel comes first.
                                for (int t = 0; t < tap_count / kernel; ++t)
                                    taps[t] = taps[t * kernel + (forward ? 0 : kernel - 1)];
                                for (int b = 0; b < blocks; ++b)
                                    run_rows(to + b * result_block, result_grid.pixel, source + outer * source_outer,
                                             source_grid.pixel, source_channel, layout.depth, taps,
                                             tap_count / kernel, block_weights + b * layout.weight_lanes,
                                             forward ? weights_tap : -weights_tap, blocks * layout.weight_lanes);
                                continue;
                            }
                            const Accumulate run =
                                blocks == 1 ? accumulate_of<1>(layout, count) : accumulate_of<2>(layout, count);
                            run(to, phases * result_grid.pixel, result_block, source + outer * source_outer,
                                (forward ? problem.stride : 1) * source_grid.pixel, source_channel, layout.depth, taps,
                                tap_count, block_weights);
                        }
                    }
            if (unit.block >= 0) break;
        }
}

Offset branch_weights(const Problem &problem, const Branch &branch, Direction direction) {
    const Layout layout = layout_of(problem, branch, direction);
    return Offset(layout.outer) * layout.blocks * branch.kernel * branch.kernel * layout.depth * layout.weight_lanes;
}

void forward(const Problem &problem, const Unit &unit, const float *x, const float *weights, float *y, float *sums,
             const Scratch &scratch) {
    int padding = problem.padding;
    if (unit.branch >= 0) padding = problem.branches[unit.branch].kernel / 2;
    const int first = most(0, unit.row_begin * problem.stride - padding);
    const int last = least(problem.height, (unit.row_end - 1) * problem.stride + padding + 1);
    const Grid source = grid_of(problem, first, last - first, problem.width + 2 * problem.padding, problem.in_places);
    const Grid result =
        grid_of(problem, unit.row_begin, unit.row_end - unit.row_begin, problem.out_width, problem.out_places);
    const bool images = problem.lanes_are == Lanes::images;
    Run runs[max_branches];
    int run_count = input_runs(problem, runs);
    if (problem.split && unit.branch >= 0) runs[0] = runs[unit.branch], run_count = 1;
    copy_in(problem, x, unit.image, problem.height, problem.width, problem.in_channels,
            problem.ordered ? nullptr : problem.in_order, runs, run_count, nullptr, source, scratch.source);

    run_count = output_runs(problem, runs);
    if (unit.branch >= 0) runs[0] = runs[unit.branch], run_count = 1;
    if (unit.block >= 0) {
        const Branch &branch = problem.branches[unit.branch];
        const Layout layout = layout_of(problem, branch, Direction::forward);
        const int blocks = least(weight_block, layout.blocks - unit.block);
        run_count = 0;
        for (int b = unit.block; b < unit.block + blocks; ++b) {
            const int at = images ? unit.outer * layout.results + b : unit.outer * lanes + b * most(branch.groups, lanes);
            runs[run_count++] = {branch.out_offset + at, branch.out_place + at,
                                 images ? 1 : least(lanes, branch.out_channels - at)};
        }
    }
    if (unit.branch < 0)
        memset(scratch.result, 0,
               sizeof(float) * (images ? problem.out_places * result.channel : result.rows * result.row));
    for (const Run *run = runs; unit.branch >= 0 && run < runs + run_count; ++run) {
        if (images) {
            memset(scratch.result + run->place * result.channel, 0, sizeof(float) * run->count * result.channel);
            continue;
        }
        float *pixel = scratch.result + run->place;
        for (int at = 0; at < result.rows * problem.out_width; ++at, pixel += result.pixel)
            for (int c = 0; c < run->count; c += lanes) store(pixel + c, zero());
    }
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        if (unit.branch < 0 || unit.branch == b)
            convolve(problem, branch, Direction::forward, unit, weights, source, scratch.source, result,
                     scratch.result);
        weights += branch_weights(problem, branch, Direction::forward);
    }
    const Offset bands_step = Offset(problem.forward_bands) * problem.out_channels;
    copy_out(problem, result, scratch.result, runs, run_count, problem.ordered ? nullptr : problem.out_order, y,
             unit.image, problem.out_height, problem.out_width, problem.out_channels,
             sums ? sums + unit.image * bands_step + Offset(unit.band) * problem.out_channels : nullptr, bands_step);
}

void input_gradient(const Problem &problem, const Unit &unit, const float *dy, const float *add_NK,
                    const float *weights, float *dx, const Scratch &scratch) {
    // Rows of the gradient that reach the unit's rows; none when the stride skips them all.
    const int first = most(0, divide_up(most(0, unit.row_begin - problem.padding), problem.stride));
    const int last = most(first, least(problem.out_height, (unit.row_end - 1 + problem.padding) / problem.stride + 1));
    const Grid source =
        grid_of(problem, first, last - first, problem.out_width + 2 * problem.padding, problem.out_places);
    const Grid result =
        grid_of(problem, unit.row_begin, unit.row_end - unit.row_begin, problem.width, problem.in_places);
    const bool images = problem.lanes_are == Lanes::images;
    Run runs[max_branches];
    copy_in(problem, dy, unit.image, problem.out_height, problem.out_width, problem.out_channels,
            problem.ordered ? nullptr : problem.out_order, runs, output_runs(problem, runs), add_NK, source,
            scratch.source);
    memset(scratch.result, 0, sizeof(float) * (images ? problem.in_places * result.channel : result.rows * result.row));
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        convolve(problem, branch, Direction::backward, unit, weights, source, scratch.source, result, scratch.result);
        weights += branch_weights(problem, branch, Direction::backward);
    }
    copy_out(problem, result, scratch.result, runs, input_runs(problem, runs),
             problem.ordered ? nullptr : problem.in_order, dx, unit.image, problem.height, problem.width,
             problem.in_channels, nullptr, 0);
}

// ------------------------------------------------------------------------------------------------- weight gradient

// x · dy summed over pixels for `taps` (kernel column, channel) pairs and `blocks` vectors of the result.
template <int width, int blocks, int taps>
void correlate(float *gradient, Offset gradient_tap, const float *source, Offset source_pixel, Offset source_row,
               const Offset *tap_offsets, const float *result, Offset result_pixel, Offset result_row,
               Offset result_block, int rows, int pixels) {
    Vector sum[taps][blocks];
    Offset offset[taps];
    for (int t = 0; t < taps; ++t) {
        offset[t] = tap_offsets[t];
        for (int b = 0; b < blocks; ++b) sum[t][b] = zero();
    }
    for (int row = 0; row < rows; ++row, source += source_row, result += result_row) {
        const float *from = source, *dy = result;
        for (int pixel = 0; pixel < pixels; ++pixel, from += source_pixel, dy += result_pixel) {
            Vector g[blocks];
            for (int b = 0; b < blocks; ++b) g[b] = load(dy + b * result_block);
            for (int t = 0; t < taps; ++t) {
                const Vector x = repeat<width>(from + offset[t]);
                for (int b = 0; b < blocks; ++b) sum[t][b] = multiply_add(x, g[b], sum[t][b]);
            }
        }
    }
    for (int t = 0; t < taps; ++t)
        for (int b = 0; b < blocks; ++b) {
            float *to = gradient + t * gradient_tap + b * lanes;
            store(to, add(load(to), sum[t][b]));
        }
}

// The same for all columns of a kernel row and one channel: a source vector is loaded once for all columns. Three
// columns alone would wait for each other's sums.
template <int width, int columns, int at_once>
inline void correlate_pixels(Vector *sum, const float *source, Offset source_pixel, const float *result,
                             Offset result_pixel) {
    Vector g[at_once];
#pragma GCC unroll 16
    for (int p = 0; p < at_once; ++p) g[p] = load(result + p * result_pixel);
#pragma GCC unroll 32
    for (int q = 0; q < at_once + columns - 1; ++q) {
        const Vector x = repeat<width>(source + q * source_pixel);
#pragma GCC unroll 16
        for (int c = 0; c < columns; ++c)
            if (q - c >= 0 && q - c < at_once) sum[c] = multiply_add(x, g[q - c], sum[c]);
    }
}

template <int width, int columns>
void correlate_rows(float *gradient, Offset gradient_column, const float *source, Offset source_pixel,
                    Offset source_row, const float *result, Offset result_pixel, Offset result_row, int rows,
                    int pixels) {
    Vector sum[columns];
#pragma GCC unroll 16
    for (int c = 0; c < columns; ++c) sum[c] = zero();
    for (int row = 0; row < rows; ++row, source += source_row, result += result_row) {
        int pixel = 0;
        for (; pixel + 7 <= pixels; pixel += 7)
            correlate_pixels<width, columns, 7>(sum, source + pixel * source_pixel, source_pixel,
                                                result + pixel * result_pixel, result_pixel);
        for (; pixel + 4 <= pixels; pixel += 4)
            correlate_pixels<width, columns, 4>(sum, source + pixel * source_pixel, source_pixel,
                                                result + pixel * result_pixel, result_pixel);
        for (; pixel < pixels; ++pixel)
            correlate_pixels<width, columns, 1>(sum, source + pixel * source_pixel, source_pixel,
                                                result + pixel * result_pixel, result_pixel);
    }
#pragma GCC unroll 16
    for (int c = 0; c < columns; ++c) {
        float *to = gradient + c * gradient_column;
        store(to, add(load(to), sum[c]));
    }
}

using CorrelateRows = void (*)(float *, Offset, const float *, Offset, Offset, const float *, Offset, Offset, int, int);

template <int width> CorrelateRows correlate_rows_for(int columns) {
    switch (columns) {
        case 5: return correlate_rows<width, 5>;
        case 7: return correlate_rows<width, 7>;
        case 9: return correlate_rows<width, 9>;
        default: return nullptr;
    }
}

CorrelateRows correlate_rows_of(int width, int columns) {
    if constexpr (weights_fit_registers) {
        switch (width) {
            case 1: return correlate_rows_for<1>(columns);
            case 2: return correlate_rows_for<2>(columns);
            case 4: return correlate_rows_for<4>(columns);
            case 8: return correlate_rows_for<8>(columns);
            default: return correlate_rows_for<16>(columns);
        }
    }
    return nullptr;
}

using Correlate = void (*)(float *, Offset, const float *, Offset, Offset, const Offset *, const float *, Offset,
                           Offset, Offset, int, int);

template <int width, int blocks> Correlate correlate_for(int taps) {
    Correlate chosen = nullptr;
#define EPSANET_TAPS(count) \
    if constexpr (count <= max_taps) \
        if (taps == count) chosen = correlate<width, blocks, count>;
    EPSANET_TAPS(1) EPSANET_TAPS(2) EPSANET_TAPS(3) EPSANET_TAPS(4)
    EPSANET_TAPS(5) EPSANET_TAPS(6) EPSANET_TAPS(7) EPSANET_TAPS(8)
#undef EPSANET_TAPS
    return chosen;
}

template <int blocks> Correlate correlate_of(int width, int taps) {
    switch (width) {
        case 1: return correlate_for<1, blocks>(taps);
        case 2: return correlate_for<2, blocks>(taps);
        case 4: return correlate_for<4, blocks>(taps);
        case 8: return correlate_for<8, blocks>(taps);
        default: return correlate_for<16, blocks>(taps);
    }
}

// Adds one unit's share to `gradient`, laid out as branch × outer × kernel row × (kernel column, channel) × block.
void weight_gradient(const Problem &problem, const Unit &unit, const float *x, const float *dy, const float *add_NK,
                     float *gradient, const Scratch &scratch) {
    const int stride = problem.stride;
    const int first = most(0, unit.row_begin * stride - problem.padding);
    const int last = least(problem.height, (unit.row_end - 1) * stride + problem.padding + 1);
    const Grid source = grid_of(problem, first, last - first, problem.width + 2 * problem.padding, problem.in_places);
    const Grid result = grid_of(problem, unit.row_begin, unit.row_end - unit.row_begin,
                                problem.out_width + 2 * problem.padding, problem.out_places);
    const bool images = problem.lanes_are == Lanes::images;
    Run runs[max_branches];
    copy_in(problem, x, unit.image, problem.height, problem.width, problem.in_channels,
            problem.ordered ? nullptr : problem.in_order, runs, input_runs(problem, runs), nullptr, source,
            scratch.source);
    copy_in(problem, dy, unit.image, problem.out_height, problem.out_width, problem.out_channels,
            problem.ordered ? nullptr : problem.out_order, runs, output_runs(problem, runs), add_NK, result,
            scratch.second);

    // Rows that are walked with the same sums in registers: enough to pay for loading and storing those.
    const int rows_at_once = divide_up(48, problem.out_width);
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        const Layout layout = layout_of(problem, branch, Direction::forward);
        const int kernel = branch.kernel, padding = kernel / 2, pairs = kernel * layout.depth;
        const Offset source_channel = images ? source.channel : branch.groups;
        const Offset source_outer = images ? layout.depth * source.channel : lanes;
        const Offset result_block = images ? result.channel : most(branch.groups, lanes);
        const Offset result_outer = images ? layout.results * result.channel : lanes;
        const Offset gradient_tap = Offset(layout.blocks) * lanes;
        for (int row_begin = unit.row_begin; row_begin < unit.row_end; row_begin += rows_at_once)
            for (int outer = 0; outer < layout.outer; ++outer)
                for (int ky = 0; ky < kernel; ++ky) {
                    // Output rows whose input row exists.
                    const int begin = most(row_begin, divide_up(most(0, padding - ky), stride));
                    const int end = least(least(row_begin + rows_at_once, unit.row_end),
                                          (problem.height - 1 + padding - ky) / stride + 1);
                    if (begin >= end || problem.height - 1 + padding - ky < 0) continue;
                    const float *from = source.pixel * (problem.padding - padding) + scratch.source +
                                        branch.in_place * source.channel + outer * source_outer +
                                        (begin * stride + ky - padding - first) * source.row;
                    const float *dy_from = scratch.second + problem.padding * result.pixel +
                                           branch.out_place * result.channel + outer * result_outer +
                                           (begin - unit.row_begin) * result.row;
                    float *to = gradient + Offset(outer * kernel + ky) * pairs * gradient_tap;
                    const CorrelateRows run_rows =
                        stride == 1 && kernel >= 5 && layout.blocks <= 2 ? correlate_rows_of(layout.width, kernel) : nullptr;
                    if (run_rows) {
                        for (int channel = 0; channel < layout.depth; ++channel)
                            for (int block = 0; block < layout.blocks; ++block)
                                run_rows(to + channel * gradient_tap + block * lanes, layout.depth * gradient_tap,
                                         from + channel * source_channel, source.pixel, source.row,
                                         dy_from + block * result_block, result.pixel, result.row, end - begin,
                                         problem.out_width);
                        continue;
                    }
                    for (int pair = 0; pair < pairs; pair += max_taps) {
                        const int taps = least(max_taps, pairs - pair);
                        Offset offsets[max_taps];
                        for (int t = 0; t < taps; ++t)
                            offsets[t] = (pair + t) / layout.depth * source.pixel +
                                         (pair + t) % layout.depth * source_channel;
                        for (int block = 0; block < layout.blocks; block += 2) {
                            const Correlate run = block + 1 < layout.blocks ? correlate_of<2>(layout.width, taps)
                                                                            : correlate_of<1>(layout.width, taps);
                            run(to + pair * gradient_tap + block * lanes, gradient_tap, from, stride * source.pixel,
                                stride * source.row, offsets, dy_from + block * result_block, result.pixel, result.row,
                                result_block, end - begin, problem.out_width);
                        }
                    }
                }
        gradient += Offset(layout.outer) * kernel * pairs * gradient_tap;
    }
}

// ----------------------------------------------------------------------------------------- dense 1×1 convolutions

inline void put(float *to, Vector v, bool past_caches) { past_caches ? stream(to, v) : store(to, v); }

// Where a tile of results goes, and what is done to it on the way.
struct Target {
    float *y;
    const float *bias, *residual;
    Offset pixel;
    int last_lanes;         // of its last vector
    bool first, last, relu;  // of the panels along the depth
    bool past_caches;
    const float *next_source;  // of the next tile, to be fetched meanwhile; null: it is near
};

template <int blocks, int pixels>
void multiply(const float *source, Offset source_pixel, int depth, const float *weights, const Target &to) {
    Vector sum[pixels][blocks];
    for (int p = 0; p < pixels; ++p)
        for (int b = 0; b < blocks; ++b) sum[p][b] = zero();
    const float *next = to.next_source;
    const auto add_channel = [&] {
        if (next) {
            __builtin_prefetch(next);  // a line a channel: as many as 16 pixels have
            next += lanes;
        }
        Vector w[blocks];
        for (int b = 0; b < blocks; ++b) {
            w[b] = load(weights + b * lanes);
            __builtin_prefetch(weights + 2048 + b * lanes);  // 8 KB ahead: a new page makes the processor wait
        }
        for (int p = 0; p < pixels; ++p) {
            const Vector x = repeat<1>(source + p * source_pixel);
            for (int b = 0; b < blocks; ++b) sum[p][b] = multiply_add(x, w[b], sum[p][b]);
        }
        ++source;
        weights += blocks * lanes;
    };
    // What the end of the tile touches is far away in memory, in pieces too short for the processor to foresee.
    int channel = 0;
    for (; channel < least(pixels, depth); ++channel) {
        for (int b = 0; b < blocks; ++b) {
            if (!to.past_caches) __builtin_prefetch(to.y + channel * to.pixel + b * lanes, 1);
            if (to.residual) __builtin_prefetch(to.residual + channel * to.pixel + b * lanes);
        }
        add_channel();
    }
    for (; channel < depth; ++channel) add_channel();
    for (int p = 0; p < pixels; ++p)
        for (int b = 0; b < blocks; ++b) {
            const Offset at = p * to.pixel + b * lanes;
            if (b == blocks - 1 && to.last_lanes < lanes) {
                float values[lanes];
                store(values, sum[p][b]);
                for (int lane = 0; lane < to.last_lanes; ++lane) {
                    float value = values[lane];
                    if (!to.first) value += to.y[at + lane];
                    if (to.last) value += to.bias[b * lanes + lane];
                    if (to.last && to.residual) value += to.residual[at + lane];
                    to.y[at + lane] = to.last && to.relu && value < 0 ? 0 : value;
                }
                continue;
            }
            Vector value = sum[p][b];
            if (!to.first) value = add(value, load(to.y + at));
            if (to.last) {
                value = add(value, load(to.bias + b * lanes));
                if (to.residual) value = add(value, load(to.residual + at));
                if (to.relu) value = positive(value);
            }
            put(to.y + at, value, to.past_caches && to.last);
        }
}

using Multiply = void (*)(const float *, Offset, int, const float *, const Target &);

template <int blocks> Multiply multiply_of(int pixels) {
    Multiply chosen = nullptr;
#define EPSANET_PIXELS(count) \
    if constexpr (count <= max_pixels[1]) \
        if (pixels == count) chosen = multiply<blocks, count>;
    EPSANET_PIXELS(1) EPSANET_PIXELS(2) EPSANET_PIXELS(3) EPSANET_PIXELS(4) EPSANET_PIXELS(5) EPSANET_PIXELS(6)
    EPSANET_PIXELS(7) EPSANET_PIXELS(8) EPSANET_PIXELS(9) EPSANET_PIXELS(10) EPSANET_PIXELS(11) EPSANET_PIXELS(12)
    EPSANET_PIXELS(13) EPSANET_PIXELS(14)
#undef EPSANET_PIXELS
    return chosen;
}

void pointwise(const Pointwise &layer, Offset begin, Offset end, int first, int last, float *scratch) {
    const int stride = layer.stride, in = layer.in_channels, out = layer.out_channels;
    const int out_height = (layer.height - 1) / stride + 1, out_width = (layer.width - 1) / stride + 1;
    const int pixels = int(end - begin), tiles = divide_up(pixels, max_pixels[1]);
    for (int channel = 0; channel < in; channel += panel_depth) {
        const int depth = least(panel_depth, in - channel);
        // A vector more keeps neighbouring pixels off the same cache sets; few channels are read where they are.
        const bool copied = stride > 1 || in > 128;
        const Offset source_pixel = copied ? depth + lanes : in;
        const float *const source = copied ? scratch : layer.x + begin * in;
        for (Offset pixel = begin; copied && pixel < end; ++pixel) {
            Offset from = pixel;
            if (stride > 1) {
                const Offset row = pixel / out_width, image = row / out_height;
                from = (image * layer.height + row % out_height * stride) * layer.width + pixel % out_width * stride;
            }
            memcpy(scratch + (pixel - begin) * source_pixel, layer.x + from * in + channel, sizeof(float) * depth);
        }
        for (int block = first; block < last; block += weight_block) {
            const int blocks = least(weight_block, last - block);
            const float *weights = layer.weights + (Offset(block) * in + Offset(channel) * blocks) * lanes;
            Target to{};
            to.pixel = out;
            to.bias = layer.bias + block * lanes;
            to.last_lanes = least(lanes, out - (block + blocks - 1) * lanes);
            to.first = channel == 0;
            to.last = channel + depth == in;
            to.relu = layer.relu;
            to.past_caches = layer.past_caches;
            for (int tile = 0; tile < tiles; ++tile) {
                const int at = pixels * tile / tiles, count = pixels * (tile + 1) / tiles - at;
                const Offset result = (begin + at) * out + block * lanes;
                to.y = layer.y + result;
                to.residual = layer.residual ? layer.residual + result : nullptr;
                to.next_source = copied || block > first ? nullptr : source + (at + count) * source_pixel;
                const Multiply run = blocks == 1 ? multiply_of<1>(count) : multiply_of<2>(count);
                run(source + at * source_pixel, source_pixel, depth, weights, to);
            }
        }
    }
    finish_streams();
}

constexpr int panel_tiles = 112 / max_pixels[1];

std::size_t pointwise_scratch(int depth) { return panel_tiles * max_pixels[1] * std::size_t(depth + lanes); }

// ----------------------------------------------------------------------------------------------- after the attention

void rescale(float *y, int pixels, int channels, const float *scale, const float *shift, bool relu) {
    for (int pixel = 0; pixel < pixels; ++pixel, y += channels) {
        int c = 0;
        for (; c + lanes <= channels; c += lanes) {
            const Vector value = multiply_add(load(y + c), load(scale + c), load(shift + c));
            store(y + c, relu ? positive(value) : value);
        }
        for (; c < channels; ++c) {
            const float value = y[c] * scale[c] + shift[c];
            // Written so that a NaN stays one.
            y[c] = relu && value < 0 ? 0 : value;
        }
    }
}

}  // namespace
}  // namespace EPSANET_ISA
}  // namespace epsanet

#include "norm_loops.hpp"

namespace epsanet {

#define EPSANET_JOIN_(a, b) a##b
#define EPSANET_JOIN(a, b) EPSANET_JOIN_(a, b)
#define EPSANET_TEXT_(a) #a
#define EPSANET_TEXT(a) EPSANET_TEXT_(a)
extern const Kernels EPSANET_JOIN(kernels_, EPSANET_ISA);
const Kernels EPSANET_JOIN(kernels_, EPSANET_ISA) = {EPSANET_TEXT(EPSANET_ISA), EPSANET_ISA::forward,
                                                     EPSANET_ISA::input_gradient, EPSANET_ISA::weight_gradient,
                                                     EPSANET_ISA::pointwise, EPSANET_ISA::pointwise_scratch,
                                                     EPSANET_ISA::max_pixels[1], EPSANET_ISA::panel_tiles, EPSANET_ISA::rescale,
                                                     EPSANET_ISA::outer_products, EPSANET_ISA::outer_scratch,
                                                     EPSANET_ISA::norm_sums, EPSANET_ISA::norm_apply,
                                                     EPSANET_ISA::norm_gradient_sums, EPSANET_ISA::norm_gradient};
}  // namespace epsanet
