// Launches: the threads of a block are fibers, which run until they wait for one another; blocks follow each
// other. What a GPU would leave undefined throws std::logic_error here.
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace cuda_on_cpu {
namespace {

// Compute capability 9.0; CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr unsigned kMostBlocksX = 0x7fffffff, kMostBlocksYZ = 65535;
constexpr unsigned kMostThreads = 1024, kMostThreadsZ = 64, kWarp = 32;
constexpr size_t kSharedBytes = 48 * 1024;       // without asking
constexpr size_t kMostSharedBytes = 227 * 1024;  // after cudaFuncSetAttribute
constexpr unsigned char kPoison = 0xff;          // NaN in every floating format
constexpr size_t kFenceBytes = 1024;             // on both sides of an array

std::mutex one_launch;
cudaError_t last_error = cudaSuccess;
std::map<const void*, size_t> shared_allowed;  // by kernel
int devices_entered = 0;
int num_launches = 0;

[[noreturn]] void fault(const std::string& what) { throw std::logic_error("cuda_on_cpu: " + what); }

cudaError_t failed(cudaError_t error) { return last_error = error; }

// ---- shared memory ----

class Fenced {
  public:
    explicit Fenced(size_t bytes) { resize(bytes); }

    void resize(size_t bytes) {
        if (!memory_.empty()) ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size());
        bytes_ = bytes;
        memory_.resize(kFenceBytes + bytes + kFenceBytes);  // operator new aligns to 16 bytes
    }

    void poison() {
        ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size());
        std::fill(memory_.begin(), memory_.end(), kPoison);
        ASAN_POISON_MEMORY_REGION(memory_.data(), kFenceBytes);
        ASAN_POISON_MEMORY_REGION(data() + bytes_, kFenceBytes);
    }

    void check_fences() {
        ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size());
        static const std::vector<unsigned char> untouched(kFenceBytes, kPoison);
        if (std::memcmp(memory_.data(), untouched.data(), kFenceBytes) != 0 ||
            std::memcmp(data() + bytes_, untouched.data(), kFenceBytes) != 0)
            fault("a block wrote outside of its " + std::to_string(bytes_) + " bytes of shared memory");
    }

    unsigned char* data() { return memory_.data() + kFenceBytes; }
    size_t bytes() const { return bytes_; }

  private:
    std::vector<unsigned char> memory_;
    size_t bytes_ = 0;
};

struct Shared {
    Fenced memory;
    long long block;  // the last one that used it
};

std::deque<Shared>& shared_arrays() {
    static std::deque<Shared> arrays;
    return arrays;
}

Fenced dynamic_memory(0);
long long block_number = 0;  // over all launches

void finish_shared_memory() {
    size_t bytes = dynamic_memory.bytes();
    if (bytes > 0) dynamic_memory.check_fences();
    for (Shared& array : shared_arrays()) {
        if (array.block != block_number) continue;
        array.memory.check_fences();
        bytes += array.memory.bytes();
    }
    if (bytes > kMostSharedBytes) fault("static and dynamic shared memory are more than a block may have");
}

// ---- threads of a block ----

enum class State { ready, at_barrier, at_shuffle, returned };

struct Thread {
    Fiber fiber;
    State state;
    Place place;
    dim3 index;
    uint64_t offered[2];  // in turns: a lane may be one shuffle ahead of one that has yet to read
    unsigned num_shuffles;
};

std::vector<Thread>& threads() {
    static std::vector<Thread> all(kMostThreads);
    return all;
}

unsigned num_threads, current;
std::exception_ptr thrown;  // by a thread

void wait(State state, Place place) {
    Thread& self = threads()[current];
    self.state = state;
    self.place = place;
    Fiber::suspend();
}

std::string text(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

bool same(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Lets threads [begin, end) go on if all of them wait in `state`; a fault if only some do, or at several
// places.
bool release(unsigned begin, unsigned end, State state, const char* name) {
    const auto first = threads().begin() + begin, last = threads().begin() + end;
    const auto waits = [&](const Thread& thread) { return thread.state == state; };
    const auto waiting = std::find_if(first, last, waits);
    if (waiting == last) return false;
    for (auto other = first; other != last; ++other) {
        const std::string where = std::string(name) + " at " + text(waiting->place);
        if (other->state == State::returned)
            fault(where + ": thread " + std::to_string(other - threads().begin()) +
                  " has returned before it");
        if (!waits(*other) || !same(other->place, waiting->place))
            fault(where + ": thread " + std::to_string(other - threads().begin()) + " waits at " +
                  text(other->place));
    }
    for (auto thread = first; thread != last; ++thread) thread->state = State::ready;
    return true;
}

bool release_some() {
    bool any = false;
    for (unsigned warp = 0; warp < num_threads; warp += kWarp)
        any |= release(warp, std::min(warp + kWarp, num_threads), State::at_shuffle, "warp shuffle");
    return any || release(0, num_threads, State::at_barrier, "barrier");
}

// ---- orders ----

enum class Order { natural, reversed, random };
Order order = Order::natural;
std::mt19937_64 generator;

template <typename Sequence>
void arrange(Sequence& sequence) {
    if (order == Order::random) std::shuffle(sequence.begin(), sequence.end(), generator);
}

std::vector<unsigned> numbers(unsigned count) {
    std::vector<unsigned> all(count);
    for (unsigned i = 0; i < count; ++i) all[i] = order == Order::reversed ? count - 1 - i : i;
    arrange(all);
    return all;
}

// ---- blocks ----

void run_ready_threads(std::vector<unsigned>& sequence) {
    arrange(sequence);
    for (unsigned t : sequence) {
        Thread& thread = threads()[t];
        if (thread.state != State::ready) continue;
        current = t;
        threadIdx = thread.index;
        thread.fiber.resume();
        if (thread.fiber.finished()) thread.state = State::returned;
        if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
    }
}

void run_block(const std::function<void()>& body) {
    ++block_number;
    if (dynamic_memory.bytes() > 0) dynamic_memory.poison();
    for (unsigned t = 0; t < num_threads; ++t) {
        Thread& thread = threads()[t];
        thread.state = State::ready;
        thread.num_shuffles = 0;
        thread.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
        thread.fiber.start([&body] {
            try {
                body();
            } catch (...) {
                thrown = std::current_exception();
            }
        });
    }
    std::vector<unsigned> sequence = numbers(num_threads);
    do run_ready_threads(sequence);
    while (release_some());
    finish_shared_memory();
}

bool can_launch(const cudaLaunchConfig_t& config, size_t allowed) {
    const dim3 &grid = config.gridDim, &block = config.blockDim;
    const auto within = [](unsigned size, unsigned most) { return size >= 1 && size <= most; };
    return within(grid.x, kMostBlocksX) && within(grid.y, kMostBlocksYZ) && within(grid.z, kMostBlocksYZ) &&
           within(block.x, kMostThreads) && within(block.y, kMostThreads) && within(block.z, kMostThreadsZ) &&
           static_cast<uint64_t>(block.x) * block.y * block.z <= kMostThreads &&
           config.dynamicSmemBytes <= allowed;
}

}  // namespace

void wait_for_block(Place place) { wait(State::at_barrier, place); }

uint64_t exchange(uint64_t value, unsigned from, unsigned mask, Place place) {
    if (blockDim.y * blockDim.z != 1 || blockDim.x % kWarp != 0)
        fault("warp shuffle at " + text(place) + ": only for one-dimensional blocks of whole warps");
    if (mask != ~0u) fault("warp shuffle at " + text(place) + ": only the mask of all lanes is known here");
    Thread& self = threads()[current];
    const unsigned turn = self.num_shuffles++ % 2;
    self.offered[turn] = value;
    wait(State::at_shuffle, place);
    return threads()[from].offered[turn];
}

SharedArray::SharedArray(size_t bytes) : index_(shared_arrays().size()) {
    shared_arrays().push_back({Fenced(bytes), 0});
}

void* SharedArray::of_this_block() {
    Shared& array = shared_arrays()[index_];
    if (array.block != block_number) array.memory.poison();
    array.block = block_number;
    return array.memory.data();
}

void* dynamic_shared() { return dynamic_memory.data(); }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> lock(one_launch);
    if (devices_entered == 0)
        fault("launch without a device guard: it would run on whichever device is current");
    if (config.stream != current_stream()) fault("launch on another stream than PyTorch's current one");
    const auto allowed = shared_allowed.find(kernel);
    if (!can_launch(config, allowed == shared_allowed.end() ? kSharedBytes : allowed->second))
        return failed(cudaErrorInvalidConfiguration);
    ++num_launches;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    num_threads = blockDim.x * blockDim.y * blockDim.z;
    dynamic_memory.resize(config.dynamicSmemBytes);
    for (unsigned z : numbers(gridDim.z))
        for (unsigned y : numbers(gridDim.y))
            for (unsigned x : numbers(gridDim.x)) {
                blockIdx = dim3(x, y, z);
                run_block(thread);
            }
    return cudaSuccess;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > kMostSharedBytes) return failed(cudaErrorInvalidValue);
    shared_allowed[kernel] = static_cast<size_t>(bytes);
    return cudaSuccess;
}

cudaStream_t current_stream() {
    static int stream;
    return &stream;
}

void enter_device() { ++devices_entered; }
void leave_device() { --devices_entered; }

}  // namespace cuda_on_cpu

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        default:
            return "invalid argument";
    }
}

// For Python: the order of threads and blocks, and how many kernels have run.
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cuda_on_cpu_set_order(const char* name) {
    using cuda_on_cpu::Order;
    cuda_on_cpu::order = std::strcmp(name, "random") == 0     ? Order::random
                         : std::strcmp(name, "reversed") == 0 ? Order::reversed
                                                              : Order::natural;
}

EXPORT int cuda_on_cpu_num_launches() { return cuda_on_cpu::num_launches; }
