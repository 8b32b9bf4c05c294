// A function with a stack of its own, which can stop in the middle and go on later.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace cuda_on_cpu {

class Fiber {
  public:
    Fiber();

    void start(std::function<void()> body);  // runs nothing yet
    void resume();                           // until the body suspends itself or returns
    bool finished() const { return finished_; }

    static void suspend();  // called in a body: back to whoever resumed it

  private:
    static void enter();
    void leave(bool for_good);

    static constexpr size_t kStackBytes = 64 * 1024;

    std::unique_ptr<char[]> stack_;
    std::function<void()> body_;
    void* stack_pointer_ = nullptr;
    void* sanitizers_view_ = nullptr;  // what AddressSanitizer keeps of a stack that is left
    bool finished_ = true;
};

}  // namespace cuda_on_cpu
