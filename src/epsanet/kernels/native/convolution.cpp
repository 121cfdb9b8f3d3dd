#include "convolution.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#ifdef EPSANET_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "threads.hpp"

namespace epsanet {

Layout layout_of(const Problem &problem, const Branch &branch, Direction direction) {
    const int seen = branch.in_channels / branch.groups, made = branch.out_channels / branch.groups;
    Layout layout{};
    layout.depth = direction == Direction::forward ? seen : made;
    layout.results = direction == Direction::forward ? made : seen;
    if (problem.lanes_are == Lanes::images) {
        layout.width = lanes;
        layout.outer = branch.groups;
        layout.repeats = 1;
        layout.weight_lanes = 1;
    } else {
        layout.width = std::min(branch.groups, lanes);
        layout.outer = std::max(1, branch.groups / lanes);
        layout.repeats = lanes / layout.width;
        layout.weight_lanes = lanes;
    }
    layout.blocks = (layout.results + layout.repeats - 1) / layout.repeats;
    return layout;
}

namespace {

void require(bool condition, const std::string &message) {
    if (!condition) throw std::invalid_argument(message);
}

// Floats of scratch that stay in a second-level cache of one megabyte.
constexpr std::ptrdiff_t cached = 160 * 1024;

int rows_of_unit(const Problem &problem, int source_width, int source_places, int result_rows, int result_width,
                 int result_places, double source_rows_per_row) {
    const std::ptrdiff_t images = problem.lanes_are == Lanes::images ? lanes : 1;
    const double source_row = double(source_width + 2 * problem.padding) * source_places * images;
    const double row = source_row * source_rows_per_row + double(result_width) * result_places * images;
    const int fitting = int((cached - 2 * problem.padding * source_row) / row);
    const int rows = std::clamp(fitting, std::min(4, result_rows), result_rows);
    const int bands = (result_rows + rows - 1) / rows;
    return (result_rows + bands - 1) / bands;
}

// Small batches are cut into more rows than the cache asks for, so that several threads find work. This looks at the
// shape only: the number of threads does not change a result.
int rows_for_threads(const Problem &problem, int rows, int all_rows, int least) {
    const int units = (problem.batch + (problem.lanes_are == Lanes::images ? lanes : 1) - 1) /
                      (problem.lanes_are == Lanes::images ? lanes : 1);
    if (units >= 8) return rows;
    const int bands = (8 + units - 1) / units;
    return std::max(std::min(rows, (all_rows + bands - 1) / bands), std::min(least, rows));
}

}  // namespace

Problem make_problem(int batch, int height, int width, int in_channels, int out_channels, int stride,
                     const std::vector<BranchShape> &branches, bool split, Lanes lanes_are, bool ordered,
                     const std::int32_t *in_order, const std::int32_t *out_order) {
    const int count = int(branches.size());
    require(batch > 0 && height > 0 && width > 0 && in_channels > 0 && out_channels > 0,
            "batch, height, width and channels must be 1 or more");
    require(stride >= 1 && stride <= 8, "stride must be between 1 and 8");
    require(count >= 1 && count <= max_branches, "there must be 1 to 8 branches");
    require(out_channels % count == 0 && (!split || in_channels % count == 0),
            "channels must be divisible by the number of branches");
    require(lanes_are == Lanes::images || (in_order && out_order), "lanes of groups need both channel orders");
    require(lanes_are == Lanes::groups || !ordered, "lanes of images keep the natural order");
    Problem problem{};
    problem.batch = batch;
    problem.height = height;
    problem.width = width;
    problem.in_channels = in_channels;
    problem.out_channels = out_channels;
    problem.stride = stride;
    problem.out_height = (height - 1) / stride + 1;
    problem.out_width = (width - 1) / stride + 1;
    problem.branch_count = count;
    problem.split = split;
    problem.lanes_are = lanes_are;
    problem.ordered = ordered;
    problem.in_order = lanes_are == Lanes::groups ? in_order : nullptr;
    problem.out_order = lanes_are == Lanes::groups ? out_order : nullptr;
    for (int b = 0; b < count; ++b) {
        Branch &branch = problem.branches[b];
        branch.kernel = branches[b].kernel;
        branch.groups = branches[b].groups;
        branch.in_channels = split ? in_channels / count : in_channels;
        branch.out_channels = out_channels / count;
        require(branch.kernel >= 1 && branch.kernel % 2 == 1 && branch.kernel <= max_kernel,
                "kernel sizes must be odd and at most 31");
        require(branch.groups >= 1 && branch.in_channels % branch.groups == 0 &&
                    branch.out_channels % branch.groups == 0,
                "groups must divide the channels of their branch");
        if (lanes_are == Lanes::groups)
            require(branch.groups % lanes == 0 || lanes % branch.groups == 0,
                    "lanes of groups need 1, 2, 4, 8 or a multiple of 16 groups");
        branch.in_offset = split ? b * branch.in_channels : 0;
        branch.out_offset = b * branch.out_channels;
        const Layout to = layout_of(problem, branch, Direction::forward);
        const Layout back = layout_of(problem, branch, Direction::backward);
        branch.out_place = problem.out_places;
        problem.out_places += to.blocks * to.repeats * branch.groups;
        const int in_places = back.blocks * back.repeats * branch.groups;
        branch.in_place = split ? problem.in_places : 0;
        problem.in_places = split ? problem.in_places + in_places : std::max(problem.in_places, in_places);
        problem.padding = std::max(problem.padding, branch.kernel / 2);
    }
    problem.forward_rows = rows_for_threads(
        problem,
        rows_of_unit(problem, width, problem.in_places, problem.out_height, problem.out_width, problem.out_places,
                     stride),
        problem.out_height, 7);
    problem.backward_rows =
        rows_for_threads(problem,
                         rows_of_unit(problem, problem.out_width, problem.out_places, height, width, problem.in_places,
                                      1.0 / stride),
                         height, 4);
    problem.forward_bands = (problem.out_height + problem.forward_rows - 1) / problem.forward_rows;
    problem.backward_bands = (height + problem.backward_rows - 1) / problem.backward_rows;
    return problem;
}

void check_orders(const Problem &problem) {
    const auto check = [](const std::int32_t *order, int begin, int channels) {
        std::vector<bool> named(channels);
        for (int c = begin; order && c < begin + channels; ++c) {
            const bool inside = order[c] >= begin && order[c] < begin + channels;
            require(inside && !named[order[c] - begin], "a channel order must name each channel of a branch once, at the branch's places");
            named[order[c] - begin] = true;
        }
    };
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        check(problem.in_order, branch.in_offset, branch.in_channels);
        check(problem.out_order, branch.out_offset, branch.out_channels);
    }
}

// ----------------------------------------------------------------------------------------------------------- weights

namespace {

// Natural channels of one position of a lane set: the group it belongs to and its index there.
struct Place {
    int group, index;
};

// Position `index × groups + group` of a branch, or the channel itself where lanes are images.
Place place_of(const Problem &problem, const Branch &branch, bool input, int group, int index) {
    if (problem.lanes_are == Lanes::images) return {group, index};
    const std::int32_t *order = input ? problem.in_order : problem.out_order;
    const int offset = input ? branch.in_offset : branch.out_offset;
    const int size = (input ? branch.in_channels : branch.out_channels) / branch.groups;
    const int channel = order[offset + index * branch.groups + group] - offset;
    return {channel / size, channel % size};
}

// Calls visit(result vector, lane, depth index, first natural weight, tap) for every weight of one set of lanes of a
// branch; lanes without a result are left out. Few taps at a time: theirs are far apart where lanes are packed.
template <class Visit>
void each_weight(const Problem &problem, const Branch &branch, Direction direction, int outer, const Visit &visit) {
    const Layout layout = layout_of(problem, branch, direction);
    const bool images = problem.lanes_are == Lanes::images, forward = direction == Direction::forward;
    const int made = branch.out_channels / branch.groups, seen = branch.in_channels / branch.groups;
    const int taps = branch.kernel * branch.kernel;
    constexpr int taps_at_once = 8;
    std::vector<std::ptrdiff_t> natural(std::size_t(layout.depth) * layout.weight_lanes);
    for (int block = 0; block < layout.blocks; ++block) {
        const int used = images ? 1 : std::min(lanes, (layout.results - block * layout.repeats) * layout.width);
        for (int lane = 0; lane < used; ++lane) {
            const int group = images ? outer : outer * lanes + lane % layout.width;
            const int result = images ? block : block * layout.repeats + lane / layout.width;
            const Place result_place = place_of(problem, branch, !forward, group, result);
            for (int depth = 0; depth < layout.depth; ++depth) {
                const Place source_place = place_of(problem, branch, forward, group, depth);
                const int out = result_place.group * made + (forward ? result_place : source_place).index;
                const int in = (forward ? source_place : result_place).index;
                natural[std::size_t(depth) * used + lane] = (std::ptrdiff_t(out) * seen + in) * taps;
            }
        }
        for (int tap_begin = 0; tap_begin < taps; tap_begin += taps_at_once)
            for (int depth = 0; depth < layout.depth; ++depth)
                for (int lane = 0; lane < used; ++lane)
                    for (int tap = tap_begin; tap < std::min(taps, tap_begin + taps_at_once); ++tap)
                        visit(block, lane, depth, natural[std::size_t(depth) * used + lane], tap);
    }
}

}  // namespace

std::size_t packed_size(const Problem &problem, Direction direction) {
    std::size_t size = 0;
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        const Layout layout = layout_of(problem, branch, direction);
        size += std::size_t(layout.outer) * layout.blocks * branch.kernel * branch.kernel * layout.depth *
                layout.weight_lanes;
    }
    return size;
}

void pack_weights(const Problem &problem, Direction direction, const float *const *weights, float *packed,
                  int threads) {
    struct Piece {
        int branch, outer;
        float *to;
    };
    std::vector<Piece> pieces;
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        const Layout layout = layout_of(problem, branch, direction);
        const std::ptrdiff_t size =
            std::ptrdiff_t(layout.blocks) * branch.kernel * branch.kernel * layout.depth * layout.weight_lanes;
        for (int outer = 0; outer < layout.outer; ++outer, packed += size) pieces.push_back({b, outer, packed});
    }
    if (packed_size(problem, direction) < 65536) threads = 1;
    share(int(pieces.size()), threads, [&](int number, int) {
        const Piece &piece = pieces[number];
        const Branch &branch = problem.branches[piece.branch];
        const Layout layout = layout_of(problem, branch, direction);
        const int taps = branch.kernel * branch.kernel;
        const std::ptrdiff_t block_size = std::ptrdiff_t(taps) * layout.depth * layout.weight_lanes;
        if (layout.blocks * layout.repeats != layout.results)
            std::memset(piece.to, 0, sizeof(float) * layout.blocks * block_size);
        each_weight(problem, branch, direction, piece.outer,
                    [&](int block, int lane, int depth, std::ptrdiff_t natural, int tap) {
                        const int first = block - block % weight_block;
                        const int side = std::min(weight_block, layout.blocks - first);
                        const std::ptrdiff_t row = (std::ptrdiff_t(tap) * layout.depth + depth) * side + block - first;
                        piece.to[first * block_size + row * layout.weight_lanes + lane] =
                            weights[piece.branch][natural + tap];
                    });
    });
}

std::uint64_t fingerprint(const float *values, std::size_t count, std::uint64_t before) {
    // Four chains of multiply and exclusive-or (FNV-1a over eight bytes at a time) keep up with memory.
    constexpr std::uint64_t prime = 0x100000001b3;
    std::uint64_t chains[4] = {before, before ^ 1, before ^ 2, before ^ 3};
    std::size_t at = 0;
    for (; at + 8 <= count; at += 8)
        for (int chain = 0; chain < 4; ++chain) {
            std::uint64_t bits;
            std::memcpy(&bits, values + at + 2 * chain, sizeof bits);
            chains[chain] = (chains[chain] ^ bits ^ (chains[chain] >> 29)) * prime;
        }
    for (; at < count; ++at) {
        std::uint32_t bits;
        std::memcpy(&bits, values + at, sizeof bits);
        chains[0] = (chains[0] ^ bits ^ (chains[0] >> 29)) * prime;
    }
    std::uint64_t all = count;
    for (const std::uint64_t chain : chains) all = (all ^ chain ^ (all >> 29)) * prime;
    return all ^ (all >> 32);
}

// ---------------------------------------------------------------------------------------------------------- dispatch

namespace {

#ifdef EPSANET_AMX
// Whether this processor multiplies tiles of bfloat16, and the system lets this process do it.
bool tiles_granted() {
    static const bool granted = [] {
        constexpr unsigned tile_unit = 1u << 24, bfloat16 = 1u << 22;  // of leaf 7's EDX
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile_unit) == 0 || (d & bfloat16) == 0) return false;
        constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return granted;
}
#endif

std::vector<const Kernels *> available_kernels() {
    std::vector<const Kernels *> found;
#ifdef EPSANET_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
#ifdef EPSANET_AMX
        if (tiles_granted()) found.push_back(&kernels_amx());
#endif
        found.push_back(&kernels_avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kernels_avx2);
#endif
    found.push_back(&kernels_portable);
    return found;
}

const Kernels *&chosen_kernels() {
    static const Kernels *kernels = available_kernels().front();
    return kernels;
}

struct Free {
    void operator()(float *pointer) const { std::free(pointer); }
};

// Memory of a thread that is kept between calls: fresh pages cost as much as a small convolution.
class Workspace {
  public:
    float *at_least(std::size_t floats) {
        if (floats > size_) {
            memory_.reset();
            size_ = 0;
            memory_.reset(static_cast<float *>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
            if (!memory_) throw std::bad_alloc();
            size_ = floats;
        }
        return memory_.get();
    }

  private:
    std::unique_ptr<float, Free> memory_;
    std::size_t size_ = 0;
};

thread_local Workspace workspace;

std::size_t whole_vectors(std::size_t floats) { return (floats + lanes - 1) / lanes * lanes; }

// Floats of a scratch copy of `rows` rows; mirrors grid_of in loops.hpp.
std::size_t scratch_size(const Problem &problem, int rows, int width, int places) {
    if (problem.lanes_are == Lanes::images) return std::size_t(places) * (std::size_t(rows) * width + 1) * lanes;
    return whole_vectors(std::size_t(rows) * width * (places + lanes)) + lanes;
}

Scratch scratch_of(std::size_t source, std::size_t second, std::size_t result) {
    float *memory = workspace.at_least(source + second + result);
    return {memory, memory + source, memory + source + second};
}

std::vector<Unit> units_of(const Problem &problem, int all_rows, int rows) {
    std::vector<Unit> units;
    const int images = problem.lanes_are == Lanes::images ? lanes : 1;
    for (int image = 0; image < problem.batch; image += images)
        for (int row = 0, band = 0; row < all_rows; row += rows, ++band)
            units.push_back({image, band, row, std::min(all_rows, row + rows), -1, -1, -1});
    return units;
}

// Multiplications of a call that do not pay for waking another thread.
constexpr double small = 200e3;

double multiplications(const Problem &problem) {
    double count = 0;
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        count += double(branch.kernel) * branch.kernel * branch.in_channels / branch.groups * branch.out_channels;
    }
    return count * problem.batch * problem.out_height * problem.out_width;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels *kernels : available_kernels()) names.push_back(kernels->name);
    return names;
}

std::string instruction_set() { return chosen_kernels()->name; }

void set_kernels(const Kernels &kernels) { chosen_kernels() = &kernels; }

const Kernels &kernels_in_use() { return *chosen_kernels(); }

void set_instruction_set(const std::string &name) {
    std::string known;
    for (const Kernels *kernels : available_kernels()) {
        if (kernels->name == name) {
            set_kernels(*kernels);
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is not on this processor; use one of " + known);
}

// -------------------------------------------------------------------------------------------------------- operations

void forward(const Problem &problem, const float *x, const float *packed, float *y, float *sums, int threads) {
    if (multiplications(problem) < small) threads = 1;
    std::vector<Unit> units = units_of(problem, problem.out_height, problem.forward_rows);
    if (threads > 1 && int(units.size()) < 2 * threads && int(units.size()) != threads) {
        // Too few units: share the branches of each, or else their result channels.
        const bool whole_branches = int(units.size()) * problem.branch_count >= 2 * threads;
        std::vector<Unit> parts;
        for (const Unit &unit : units)
            for (int b = problem.branch_count - 1; b >= 0; --b) {
                if (whole_branches) {
                    parts.push_back(unit);
                    parts.back().branch = b;
                    continue;
                }
                const Layout layout = layout_of(problem, problem.branches[b], Direction::forward);
                for (int outer = 0; outer < layout.outer; ++outer)
                    for (int block = 0; block < layout.blocks; block += weight_block) {
                        parts.push_back(unit);
                        parts.back().branch = b;
                        parts.back().outer = outer;
                        parts.back().block = block;
                    }
            }
        units = std::move(parts);
    }
    const std::size_t channels = problem.out_channels, bands = problem.forward_bands;
    std::vector<float> band_sums(sums && bands > 1 ? problem.batch * bands * channels : 0);
    float *sums_of_bands = sums && bands > 1 ? band_sums.data() : sums;
    const int source_rows = std::min(problem.height, (problem.forward_rows - 1) * problem.stride + 1 + 2 * problem.padding);
    const std::size_t source = scratch_size(problem, source_rows, problem.width + 2 * problem.padding, problem.in_places);
    const std::size_t result = scratch_size(problem, problem.forward_rows, problem.out_width, problem.out_places);
    const Kernels &kernels = *chosen_kernels();
    share(int(units.size()), threads, [&](int unit, int) {
        kernels.forward(problem, units[unit], x, packed, y, sums_of_bands, scratch_of(source, 0, result));
    });
    if (sums && bands > 1)
        for (int image = 0; image < problem.batch; ++image)
            for (std::size_t channel = 0; channel < channels; ++channel) {
                float sum = 0;
                for (std::size_t band = 0; band < bands; ++band)
                    sum += sums_of_bands[(image * bands + band) * channels + channel];
                sums[image * channels + channel] = sum;
            }
}

namespace {

// softmax(sigmoid(W2 relu(W1 g + b1) + b2)) of one image, in natural order: section 3.2, equations 6 to 8.
void attend(const Problem &problem, const Attention &attention, const float *sums, float *weights) {
    const int branches = problem.branch_count, channels = problem.out_channels / branches;
    const float share = 1.0f / (float(problem.out_height) * float(problem.out_width));
    std::vector<float> pooled(problem.out_channels), hidden(attention.hidden);
    for (int c = 0; c < problem.out_channels; ++c)
        pooled[problem.ordered ? problem.out_order[c] : c] = sums[c] * share;
    for (int b = 0; b < branches; ++b) {
        const float *in = pooled.data() + b * channels;
        for (int h = 0; h < attention.hidden; ++h) {
            float sum = attention.fc1_bias[h];
            for (int c = 0; c < channels; ++c) sum += attention.fc1_weight[h * channels + c] * in[c];
            hidden[h] = std::max(sum, 0.0f);
        }
        for (int c = 0; c < channels; ++c) {
            float sum = attention.fc2_bias[c];
            for (int h = 0; h < attention.hidden; ++h)
                sum += attention.fc2_weight[c * attention.hidden + h] * hidden[h];
            // The sigmoid lies between 0 and 1, so its exponential needs no shift.
            weights[b * channels + c] = std::exp(1 / (1 + std::exp(-sum)));
        }
    }
    const int sets = attention.over_scales ? channels : branches, members = attention.over_scales ? branches : channels;
    const int set_step = attention.over_scales ? 1 : channels, member_step = attention.over_scales ? channels : 1;
    for (int set = 0; set < sets; ++set) {
        float total = 0;
        for (int m = 0; m < members; ++m) total += weights[set * set_step + m * member_step];
        for (int m = 0; m < members; ++m) weights[set * set_step + m * member_step] /= total;
    }
}

}  // namespace

void recalibrate(const Problem &problem, const Attention &attention, const float *sums, float *y, int threads) {
    const int pixels = problem.out_height * problem.out_width, channels = problem.out_channels;
    // Single images are cut, so that threads can share them; each piece repeats the small attention.
    const int pieces = problem.batch >= 2 * threads || pixels < 256 ? 1 : 4;
    if (double(problem.batch) * pixels * channels < 65536) threads = 1;
    const Kernels &kernels = *chosen_kernels();
    share(problem.batch * pieces, threads, [&](int number, int) {
        const int image = number / pieces, piece = number % pieces;
        std::vector<float> weights(channels), scale(channels);
        attend(problem, attention, sums + std::ptrdiff_t(image) * channels, weights.data());
        for (int c = 0; c < channels; ++c)
            scale[c] = weights[problem.ordered ? problem.out_order[c] : c] * attention.scale[c];
        const int begin = int(std::ptrdiff_t(pixels) * piece / pieces), end = int(std::ptrdiff_t(pixels) * (piece + 1) / pieces);
        kernels.rescale(y + (std::ptrdiff_t(image) * pixels + begin) * channels, end - begin, channels, scale.data(),
                        attention.shift, attention.relu);
    });
}

void pointwise(const Pointwise &layer, int threads) {
    const std::ptrdiff_t pixels = std::ptrdiff_t(layer.batch) * ((layer.height - 1) / layer.stride + 1) *
                                  ((layer.width - 1) / layer.stride + 1);
    if (double(pixels) * layer.in_channels * layer.out_channels < small) threads = 1;
    const int blocks = (layer.out_channels + lanes - 1) / lanes, pairs = (blocks + weight_block - 1) / weight_block;
    const Kernels &kernels = *chosen_kernels();
    const int tile = kernels.pixels_of_tile, tiles = int((pixels + tile - 1) / tile);
    const int panels = (tiles + kernels.tiles_of_panel - 1) / kernels.tiles_of_panel;
    // Few panels that do not go round: threads share the result channels of each.
    int parts = 1;
    while (parts < pairs && panels * parts < 4 * threads && panels * parts % threads) ++parts;
    const std::size_t scratch = kernels.pointwise_scratch(std::min(layer.in_channels, panel_depth));
    share(panels * parts, threads, [&](int unit, int) {
        const int number = unit / parts, part = unit % parts;
        const auto first_block = [&](int of_part) { return std::min(blocks, pairs * of_part / parts * weight_block); };
        const auto first_pixel = [&](int of_panel) {
            return std::min(pixels, std::ptrdiff_t(tiles) * of_panel / panels * tile);
        };
        kernels.pointwise(layer, first_pixel(number), first_pixel(number + 1), first_block(part), first_block(part + 1),
                          workspace.at_least(scratch));
    });
}

void input_gradient(const Problem &problem, const float *dy, const float *add, const float *packed, float *dx,
                    int threads) {
    if (multiplications(problem) < small) threads = 1;
    const std::vector<Unit> units = units_of(problem, problem.height, problem.backward_rows);
    const int source_rows =
        std::min(problem.out_height, (problem.backward_rows - 1 + 2 * problem.padding) / problem.stride + 2);
    const std::size_t source =
        scratch_size(problem, source_rows, problem.out_width + 2 * problem.padding, problem.out_places);
    const std::size_t result = scratch_size(problem, problem.backward_rows, problem.width, problem.in_places);
    const Kernels &kernels = *chosen_kernels();
    share(int(units.size()), threads, [&](int unit, int) {
        kernels.input_gradient(problem, units[unit], dy, add, packed, dx, scratch_of(source, 0, result));
    });
}

void weight_gradient(const Problem &problem, const float *x, const float *dy, const float *add,
                     float *const *gradients, int threads) {
    if (multiplications(problem) < small) threads = 1;
    const std::vector<Unit> units = units_of(problem, problem.out_height, problem.forward_rows);
    const int source_rows = std::min(problem.height, (problem.forward_rows - 1) * problem.stride + 1 + 2 * problem.padding);
    const std::size_t source = scratch_size(problem, source_rows, problem.width + 2 * problem.padding, problem.in_places);
    const std::size_t second = scratch_size(problem, problem.forward_rows, problem.out_width + 2 * problem.padding, problem.out_places);

    std::vector<std::size_t> starts{0};
    for (int b = 0; b < problem.branch_count; ++b) {
        const Branch &branch = problem.branches[b];
        const Layout layout = layout_of(problem, branch, Direction::forward);
        starts.push_back(starts.back() + std::size_t(layout.outer) * branch.kernel * branch.kernel * layout.depth *
                                             layout.blocks * lanes);
    }
    // Every share of the units has sums of its own, added in a fixed order: repeated runs agree to the last bit.
    const int shares = std::max(1, std::min(threads, int(units.size())));
    const std::size_t size = starts.back();
    const std::unique_ptr<float, Free> sums(
        static_cast<float *>(std::aligned_alloc(64, (shares * size * sizeof(float) + 63) / 64 * 64)));
    if (!sums) throw std::bad_alloc();
    const Kernels &kernels = *chosen_kernels();
    share(shares, threads, [&](int number, int) {
        float *own = sums.get() + number * size;
        std::memset(own, 0, size * sizeof(float));
        const Scratch scratch = scratch_of(source, second, 0);
        const std::size_t begin = units.size() * number / shares, end = units.size() * (number + 1) / shares;
        for (std::size_t unit = begin; unit < end; ++unit)
            kernels.weight_gradient(problem, units[unit], x, dy, add, own, scratch);
    });

    struct Piece {
        int branch, outer;
    };
    std::vector<Piece> pieces;
    for (int b = 0; b < problem.branch_count; ++b)
        for (int outer = 0; outer < layout_of(problem, problem.branches[b], Direction::forward).outer; ++outer)
            pieces.push_back({b, outer});
    share(int(pieces.size()), size < 65536 ? 1 : threads, [&](int number, int) {
        const Piece &piece = pieces[number];
        const Branch &branch = problem.branches[piece.branch];
        const Layout layout = layout_of(problem, branch, Direction::forward);
        const int taps = branch.kernel * branch.kernel;
        const bool lanes_are_images = problem.lanes_are == Lanes::images;
        const float *from = sums.get() + starts[piece.branch] +
                            std::size_t(piece.outer) * taps * layout.depth * layout.blocks * lanes;
        each_weight(problem, branch, Direction::forward, piece.outer,
                    [&](int block, int lane, int depth, std::ptrdiff_t natural, int tap) {
                        const float *at =
                            from + ((std::size_t(tap) * layout.depth + depth) * layout.blocks + block) * lanes;
                        float sum = 0;
                        for (int share = 0; share < shares; ++share, at += size) {
                            if (lanes_are_images)
                                for (int image = 0; image < lanes; ++image) sum += at[image];
                            else
                                sum += at[lane];
                        }
                        gradients[piece.branch][natural + tap] = sum;
                    });
    });
}

}  // namespace epsanet
