// Shares numbered pieces of work between threads.
#pragma once

#include <functional>

namespace epsanet {

// Calls work(piece, thread) for every piece below `pieces`, on at most `threads` threads, the caller's among them.
void share(int pieces, int threads, const std::function<void(int, int)> &work);

// How many threads the last call of `share` that ended had.
int threads_used();

}  // namespace epsanet
