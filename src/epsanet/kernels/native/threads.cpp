#include "threads.hpp"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace epsanet {
namespace {

struct Team {
    const std::function<void(int, int)> *work;
    int pieces;
    std::atomic<int> next_piece{0}, next_thread{0};
    std::exception_ptr error;
    std::mutex error_lock;
};

void join(void *data) {
    Team &team = *static_cast<Team *>(data);
    const int thread = team.next_thread.fetch_add(1);
    try {
        for (int piece = team.next_piece.fetch_add(1); piece < team.pieces; piece = team.next_piece.fetch_add(1))
            (*team.work)(piece, thread);
    } catch (...) {
        const std::lock_guard<std::mutex> guard(team.error_lock);
        team.error = std::current_exception();
    }
}

// A process that has loaded torch has GNU OpenMP's pool, whose idle threads spin on the cores for a while. Joining
// that pool rather than starting another keeps two from competing. Elsewhere threads are started for each call.
using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

std::atomic<int> last_used{0};

}  // namespace

void share(int pieces, int threads, const std::function<void(int, int)> &work) {
    if (threads > pieces) threads = pieces;
    Team team;
    team.work = &work;
    team.pieces = pieces;
    if (threads <= 1) {
        join(&team);
    } else {
        static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        if (parallel) {
            parallel(join, &team, unsigned(threads), 0);
        } else {
            std::vector<std::thread> others;
            others.reserve(threads);
            try {
                for (int t = 1; t < threads; ++t) others.emplace_back(join, &team);
            } catch (const std::system_error &) {
                // The system gives no more of them: those that have started, and this one, do the work.
            }
            join(&team);
            for (std::thread &other : others) other.join();
        }
    }
    last_used = team.next_thread.load();
    if (team.error) std::rethrow_exception(team.error);
}

int threads_used() { return last_used; }

}  // namespace epsanet
